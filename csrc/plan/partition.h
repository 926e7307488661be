// Cuts the passes of a plan into chunks that threads can take without waiting for each other.
//
// The cut depends on sizes alone, never on the number of threads: results are bitwise the same on
// any machine.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "plan/plan.h"
#include "plan/schedule.h"

namespace sparse_attn {

enum class Direction { kForward, kBackward };

struct PassPartition {
  std::vector<Run> runs;
  std::vector<Segment> segments;
  std::vector<Chunk> chunks;
  std::vector<SharedTile> shared_tiles;
  std::vector<Reduction> row_reductions;
  std::vector<Reduction> key_reductions;
  std::int32_t row_slots = 0;
  std::int32_t key_slots = 0;

  std::int64_t bytes() const {
    return bytes_of(runs) + bytes_of(segments) + bytes_of(chunks) + bytes_of(shared_tiles) +
           bytes_of(row_reductions) + bytes_of(key_reductions);
  }
};

/// A plan, its partition, and the view of both that kernels walk.
class Schedule {
 public:
  Schedule(std::shared_ptr<const Plan> plan, Direction direction, int chunks);
  Schedule(const Schedule&) = delete;
  Schedule& operator=(const Schedule&) = delete;

  const Plan& plan() const { return *plan_; }
  const PlanView& view() const { return view_; }
  /// Of the partition and of the plan, which it keeps alive.
  std::int64_t bytes() const;

 private:
  std::shared_ptr<const Plan> plan_;
  std::vector<PassPartition> partitions_;
  std::vector<PassView> passes_;
  Lists queries_of_key_;
  PlanView view_;
};

/// How many chunks a head's work is cut into when `heads` (batch times heads) run side by side.
int chunk_count(const Plan& plan, std::int64_t heads);

}  // namespace sparse_attn
