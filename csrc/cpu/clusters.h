// Which pairs of the tokens that clusters took are their own.
#pragma once

#include <cstdint>

#include "params.h"

namespace sparse_attn::cpu {

/// The members of all clusters of one side: (sets, clusters, width), each at most once in a
/// cluster.
struct Members {
  const std::int64_t* tokens = nullptr;
  std::int64_t width = 0;
  std::int64_t length = 0;       // tokens are below
  const bool* hidden = nullptr;  // (sets / heads, length); null = none
};

struct OwnPairs {
  Members queries, keys;
  std::int64_t sets = 0;   // heads of all examples
  std::int64_t heads = 1;  // of an example
  std::int64_t clusters = 0;
  bool is_causal = false;
};

/// bias (sets, clusters, queries, keys): -inf for pairs that an earlier cluster has, too, for
/// hidden tokens and for later keys; else 0. Throws std::invalid_argument if a member is no token.
template <class T>
void bias_of_own_pairs(const OwnPairs& call, T* bias, const Parallel& parallel);

}  // namespace sparse_attn::cpu
