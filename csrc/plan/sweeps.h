// Cuts a pass into the tasks of thread blocks, by tiles of rows and by tiles of keys.
#pragma once

#include <cstdint>
#include <vector>

#include "plan/grid.h"
#include "plan/plan.h"

namespace sparse_attn {

/// How many tiles a task may have, by rows and by keys: what the kernels hold in registers.
struct Grouping {
  int rows = 1;
  int keys = 1;
};

/// The arrays of one side of a pass.
struct SweepArrays {
  std::vector<Task> tasks;
  std::vector<Visits> visits;
  std::vector<Reduction> reductions;     // by round
  std::vector<std::int32_t> round_ends;  // reductions of one round touch different tokens
  std::int32_t slots = 0;
};

struct PassArrays {
  SweepArrays rows, keys;
};

/// `heads` run side by side: batch times heads. Without `backward` there is no sweep of keys.
PassArrays sweeps_of(const Plan& plan, const Pass& pass, Grouping grouping, std::int64_t heads,
                     bool backward);

}  // namespace sparse_attn
