// Plans and schedules are built once and kept: a bounded, thread-safe cache, least recently used
// first out.
#pragma once

#include <cstdint>
#include <memory>

#include "plan/partition.h"

namespace sparse_attn {

/// The plan of one head's pattern; one that depends on `tensors` is made anew. Throws
/// std::invalid_argument as `expand` does.
std::shared_ptr<const Plan> plan_of(const Expression& expression, Sizes sizes,
                                    const PatternTensor* tensors, Target target = Target::kCpu);

/// The same, cut for `heads` (batch times heads) that run side by side; `chunks` = 0 lets the sizes
/// decide.
std::shared_ptr<const Schedule> schedule_of(const Expression& expression, Sizes sizes,
                                            const PatternTensor* tensors, Direction direction,
                                            std::int64_t heads, int chunks = 0);

/// The same if it is at hand, else null. Much quicker than making one.
std::shared_ptr<const Schedule> kept_schedule(const Expression& expression, Sizes sizes,
                                              Direction direction, std::int64_t heads,
                                              int chunks = 0);

void clear_plan_cache();
std::int64_t plan_cache_size();

}  // namespace sparse_attn
