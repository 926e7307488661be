// What a device does for one head: what of its pattern is planned on the host, and programs for the
// rest.
#pragma once

#include <cstdint>

#include "patterns/expression.h"
#include "plan/image.h"

namespace sparse_attn {

/// With `global_tensor` >= 0 each example brings global tokens of its own, as that tensor of the
/// call; rows and columns of them are then allowed as well, as far as a causal pattern lets them.
/// Throws std::invalid_argument as `expand` and `split` do.
HeadPlan head_plan(const Expression& expression, Sizes sizes, std::int32_t global_tensor = -1);

}  // namespace sparse_attn
