// What the kernels for sm_90a get besides: the tensors as TMA sees them, and how many tasks there
// are, since a block takes one after the other.
#pragma once

#include "cuda/args.h"
#include "cuda/tensor_map.h"

namespace sparse_attn::cuda {

/// A tensor for each step of the pass.
struct MappedRows {
  TensorMap maps[kMostSteps];
};

struct Sm90Arguments {
  Arguments base;
  std::int64_t tasks = 0;                     // of all heads
  MappedRows query, grad_output, key, value;  // X and Y of the rows, X and Y of the keys
};

}  // namespace sparse_attn::cuda
