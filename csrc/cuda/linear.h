// Causal linear attention on any device. No CUDA in here.
#pragma once

#include <algorithm>
#include <cstdint>

#include "linear_params.h"

namespace sparse_attn::cuda {

/// How a call is cut: segments of keys, whose sums key^T value are made first, then the sums before
/// each, then the products of all chunks of 64 queries at once.
struct LinearCall {
  ProductParams params;
  std::int64_t segment = 0;   // keys of a segment
  std::int64_t segments = 0;  // of a head
  std::int64_t size_blocks = 0, value_blocks = 0;
  // Of queries, by position: chunk c has those from 64 c on, negative before the first key.
  std::int64_t first_chunk = 0, chunks = 0;

  std::int64_t heads() const { return params.batch * params.heads; }
};

/// Queues one kernel.
using LinearLaunch = void (*)(const LinearCall& call, void* stream);

struct LinearKernels {
  int real_bytes;     // of the numbers that sums are kept in
  int block_columns;  // of values, of a thread block
  LinearLaunch sums;
  LinearLaunch prefix;
  LinearLaunch products;
};

const LinearKernels& linear_kernels_for(DataType type);

/// The cut of a call; its workspace is to hold heads * segments * size * value_dim numbers.
/// Segments are so long that the sums take no more memory than the tensors do.
inline LinearCall linear_call(const ProductParams& params, const LinearKernels& kernels) {
  LinearCall call{params};
  const std::int64_t wanted = std::max({std::int64_t{256}, params.size, params.value_dim});
  call.segment = (wanted + kMaxTile - 1) / kMaxTile * kMaxTile;
  call.segments = (params.n_k + call.segment - 1) / call.segment;
  call.size_blocks = (params.size + kMaxTile - 1) / kMaxTile;
  call.value_blocks = (params.value_dim + kernels.block_columns - 1) / kernels.block_columns;
  const std::int64_t offset = params.n_k - params.n_q;
  call.first_chunk = offset >= 0 ? offset / kMaxTile : -((kMaxTile - 1 - offset) / kMaxTile);
  call.chunks = (params.n_k + kMaxTile - 1) / kMaxTile - call.first_chunk;
  return call;
}

}  // namespace sparse_attn::cuda
