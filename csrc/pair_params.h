// What crosses from torch to the kernels of listed pairs: the allowed (query, key) pairs of all
// heads in CSR form.
#pragma once

#include "params.h"

namespace sparse_attn {

/// "Real" is double for float64 tensors and float for all others.
struct PairParams {
  DataType dtype = DataType::kFloat32;
  std::int64_t batch = 0;
  std::int64_t heads = 0;     // of the rows
  std::int64_t heads_kv = 0;  // of the columns; divides heads
  std::int64_t n_q = 0;
  std::int64_t n_k = 0;
  std::int64_t size = 0;

  TensorView rows;         // (batch, heads, n_q, size)
  TensorView columns;      // (batch, heads_kv, n_k, size)
  void* values = nullptr;  // (pairs) Real

  const std::int64_t* crow = nullptr;  // (batch, heads, n_q + 1), offsets into col and values
  const std::int64_t* col = nullptr;   // (pairs) keys

  // The same pairs by key, for the sums of columns only.
  const std::int64_t* starts = nullptr;   // (batch, heads, n_k + 1), offsets into the next two
  const std::int32_t* queries = nullptr;  // (pairs)
  const std::int64_t* entries = nullptr;  // (pairs) where their values are

  void* workspace = nullptr;  // as many bytes as the kernel asked for, 64-byte aligned
};

}  // namespace sparse_attn
