// The one struct that crosses from torch to the kernels: sizes, pointers, strides, plans. No torch
// in here.
#pragma once

#include <cstdint>

#include "logit.h"
#include "plan/schedule.h"
#include "whole.h"

namespace sparse_attn {

enum class DataType : std::int32_t { kFloat32, kFloat64, kBFloat16, kFloat16 };

/// A (batch, heads, length, size) tensor; strides count elements and the last one is 1.
struct TensorView {
  void* data = nullptr;
  std::int64_t batch_stride = 0;
  std::int64_t head_stride = 0;
  std::int64_t row_stride = 0;
};

/// "Real" below is double for float64 tensors and float for all others.
struct AttentionParams {
  DataType dtype = DataType::kFloat32;
  std::int64_t batch = 0;
  std::int64_t heads = 0;     // of the queries
  std::int64_t heads_kv = 0;  // divides heads
  std::int64_t n_q = 0;
  std::int64_t n_k = 0;
  std::int64_t head_dim = 0;
  std::int64_t value_dim = 0;
  double scale = 1.0;

  TensorView query;     // (batch, heads, n_q, head_dim)
  TensorView key;       // (batch, heads_kv, n_k, head_dim)
  TensorView value;     // (batch, heads_kv, n_k, value_dim)
  TensorView output;    // (batch, heads, n_q, value_dim)
  void* lse = nullptr;  // (batch, heads, n_q) Real, natural logarithm, -inf without keys
  const std::uint8_t* key_padding = nullptr;  // (batch, n_k), 1 = ignore; null = none
  Modifiers modifiers;
  WholeTokens whole;
  /// Of positions from the numbers of queries in the whole.
  SPARSE_ATTN_HOST_DEVICE_INLINE std::int64_t offset() const {
    return whole.queries ? whole.n_k - whole.n_q : n_k - n_q;
  }
  /// Query i and key j of the call by their numbers in the whole.
  SPARSE_ATTN_HOST_DEVICE_INLINE PairPlace place(std::int64_t i, std::int64_t j) const {
    const std::int64_t number = whole.query(i);
    return {number, number + offset(), whole.key(j)};
  }

  const PlanView* const* plans = nullptr;  // (batch, heads)

  // Backward only.
  TensorView grad_output;          // (batch, heads, n_q, value_dim)
  const void* grad_lse = nullptr;  // (batch, heads, n_q) Real; null = zero
  TensorView grad_query;           // as query
  TensorView grad_key;             // as key, zero-filled
  TensorView grad_value;           // as value, zero-filled

  // Gradients of the tables alone: each of its table's shape, zero-filled, contiguous.
  LogitTable grad_bias;
  LogitTable grad_gate;

  // Derivatives along a tangent of the inputs.
  TensorView query_tangent;  // as query
  TensorView key_tangent;    // as key
  TensorView value_tangent;  // as value
  LogitTable bias_tangent;   // as modifiers.bias; none = zero
  LogitTable gate_tangent;
  TensorView output_tangent;    // as output
  void* lse_tangent = nullptr;  // as lse

  void* workspace = nullptr;  // as many bytes as the kernel asked for, 64-byte aligned
};

/// Runs body(context, thread) once for each thread in [0, threads), in any order and on any
/// threads.
struct Parallel {
  int threads = 1;
  void (*run)(int threads, void (*body)(void* context, int thread), void* context) = nullptr;
};

}  // namespace sparse_attn
