// What crosses from torch to the kernels that choose keys by their logits, scale * (q . k).
#pragma once

#include "params.h"

namespace sparse_attn {

/// "Real" is double for float64 tensors and float for all others. Logits are Real.
struct SelectionParams {
  DataType dtype = DataType::kFloat32;
  std::int64_t batch = 0;
  std::int64_t heads = 0;     // of the queries
  std::int64_t heads_kv = 0;  // divides heads
  std::int64_t n_q = 0;
  std::int64_t n_k = 0;
  std::int64_t head_dim = 0;
  double scale = 1.0;
  bool is_causal = false;

  TensorView query;                           // (batch, heads, n_q, head_dim)
  TensorView key;                             // (batch, heads_kv, n_k, head_dim)
  const std::uint8_t* key_padding = nullptr;  // (batch, n_k), 1 = ignore; null = none

  const void* bounds = nullptr;     // (batch, heads, n_q) Real
  std::int64_t width = 0;           // of a list
  std::int32_t* indices = nullptr;  // (batch, heads, n_q, width), zero-filled; null = only count
  std::int32_t* counts = nullptr;   // (batch, heads, n_q)
  double* lse = nullptr;            // (batch, heads, n_q), natural logarithm, -inf without keys

  void* workspace = nullptr;  // as many bytes as the kernel asked for, 64-byte aligned
};

}  // namespace sparse_attn
