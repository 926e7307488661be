// The plan as thread blocks see it: tasks, each of one or two tiles and what they visit. Plain
// data, copied to the device as it stands.
#pragma once

#include <cstdint>

#include "patterns/instruction.h"
#include "plan/schedule.h"

namespace sparse_attn {

/// Marks a visit that one tile of a pair does not take part in.
constexpr std::int32_t kSkip = -2;

/// Marks visits whose masks only the pass's program knows, when it runs on the device.
constexpr std::int32_t kEvaluate = -3;

/// `count` consecutive tiles of the other side and the mask of each of the task's tiles with them:
/// kFull, kSkip, kEvaluate or the number of a mask. Masked ones come one to a run.
struct Visits {
  std::int32_t tile;
  std::int32_t count;
  std::int32_t masks[2];
};

/// What one thread block does: one or two tiles (the second -1 if there is none) of one side, and
/// a share of their visits to the other side. With `slot` >= 0 the result of the first tile goes to
/// that slot and that of the second to slot + slot_step.
struct Task {
  std::int32_t tiles[2];
  std::int32_t slot;
  std::int32_t slot_step;
  std::uint32_t first_visit;
  std::uint32_t end_visit;
};

/// One side of a pass, those tasks that take longest first. The slots [first_slot, end_slot) of a
/// reduction add up to its tile; one without slots is there to fill a round up.
struct Sweep {
  const Task* tasks;
  const Visits* visits;
  const Reduction* reductions;
  std::int32_t task_count;
  std::int32_t reduction_count;
};

/// One pass of one plan.
struct GridPass {
  const RowTile* row_tiles;
  const Tile* key_tiles;
  const std::int64_t* token_list;
  const std::uint64_t (*masks)[kMaxTile];          // as PlanView's: a word of rows for each key
  const std::uint64_t (*masks_of_rows)[kMaxTile];  // the same: a word of keys for each row
  Sweep rows;                                      // tiles of rows visit tiles of keys: forward, dQ
  Sweep keys;                                      // tiles of keys visit tiles of rows: dK, dV
  const Instruction* program;                      // of visits marked kEvaluate
  std::int32_t program_size;
};

}  // namespace sparse_attn
