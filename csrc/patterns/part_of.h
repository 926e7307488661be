// Primitives of a whole sequence as a part of it numbers its tokens.
#pragma once

#include "patterns/expand.h"
#include "patterns/part.h"

namespace sparse_attn {

/// The part's terms out of those of the whole. Throws std::invalid_argument if `sizes`, of the
/// part, do not fit.
Terms take_part(const Part& part, Sizes sizes, Terms whole);

}  // namespace sparse_attn
