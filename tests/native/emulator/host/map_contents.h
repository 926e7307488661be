// A tensor map as make_tensor_map writes it and tma_load reads it.
#pragma once

#include <cstdint>

#include "cuda/tensor_map.h"

namespace sparse_attn::cuda::emulator {

/// What the words of a TensorMap are here.
struct MapContents {
  static constexpr std::uint64_t kMark = 0x70616d726f736e65;

  std::uint64_t mark;
  const char* data;
  std::int64_t dimensions[5];
  std::int64_t strides[5];  // in bytes
};
static_assert(sizeof(MapContents) <= sizeof(TensorMap));

}  // namespace sparse_attn::cuda::emulator
