// What the kernels for sm_90a get besides: the tensors as TMA sees them, and how many tasks there
// are, since a block takes one after the other.
#pragma once

#include "cuda/args.h"
#include "cuda/tensor_map.h"

namespace sparse_attn::cuda {

/// A tensor, for each step of the pass that there is a map for.
struct MappedRows {
  TensorMap maps[kMostSteps];
  std::int32_t steps[kMostSteps] = {};  // 0: none
};

struct Sm90Arguments {
  Arguments base;
  std::int64_t tasks = 0;                     // of all heads
  MappedRows query, grad_output, key, value;  // X and Y of the rows, X and Y of the keys
};

static_assert(sizeof(Sm90Arguments) <= 4032, "parameters of a kernel end at 4096 bytes");

}  // namespace sparse_attn::cuda
