// The tokens of a part of a sequence by their numbers in the whole: patterns, tables and dropout go
// by these, plans and kernels by places in the part.
#pragma once

#include <cstdint>

#include "host_device.h"

namespace sparse_attn {

/// What a place without a token has.
constexpr std::int64_t kNoToken = -1;

/// Null where a call is about all of a sequence.
struct WholeTokens {
  const std::int64_t* queries = nullptr;  // (n_q of the part)
  const std::int64_t* keys = nullptr;     // (n_k of the part)
  std::int64_t n_q = 0;                   // of the whole
  std::int64_t n_k = 0;

  SPARSE_ATTN_HOST_DEVICE_INLINE std::int64_t query(std::int64_t place) const {
    return queries ? queries[place] : place;
  }
  SPARSE_ATTN_HOST_DEVICE_INLINE std::int64_t key(std::int64_t place) const {
    return keys ? keys[place] : place;
  }
};

}  // namespace sparse_attn
