// From an expression to the primitives that it is for given sizes.
#pragma once

#include <cstdint>

#include "patterns/expression.h"
#include "patterns/pattern.h"

namespace sparse_attn {

struct Sizes {
  std::int64_t n_q = 0;
  std::int64_t n_k = 0;
  /// Query i stands at position i + offset(): the ends are aligned.
  std::int64_t offset() const { return n_k - n_q; }
  bool operator==(const Sizes& other) const { return n_q == other.n_q && n_k == other.n_k; }
};

/// One head's slice of a tensor that belongs to a pattern, contiguous: bytes of a layout (blocks of
/// queries, columns), int64 indices (n_q, columns), int64 counts (n_q).
struct PatternTensor {
  const void* data = nullptr;
  std::int64_t columns = 0;
  bool is_int32 = false;  // of indices, which are int64 else
};

/// The union of intersections that `expression` is. Throws std::invalid_argument where a token, an
/// index or a count is out of range. Primitives read `tensors`, in the order in which the
/// expression takes them, as long as they live.
Terms expand(const Expression& expression, Sizes sizes, const PatternTensor* tensors = nullptr);

}  // namespace sparse_attn
