// What crosses from torch to the kernels of linear attention.
#pragma once

#include "params.h"

namespace sparse_attn {

/// output[i] = sum over the keys j <= i + n_k - n_q of (query[i] . key[j]) value[j], or over those
/// from there on if `reverse`. Of sums, output = sum of key[j]^T value[j], (size, value_dim).
struct ProductParams {
  DataType dtype = DataType::kFloat32;
  bool reverse = false;
  std::int64_t batch = 0;
  std::int64_t heads = 0;
  std::int64_t n_q = 0;
  std::int64_t n_k = 0;
  std::int64_t size = 0;
  std::int64_t value_dim = 0;

  TensorView query;   // (batch, heads, n_q, size)
  TensorView key;     // (batch, heads, n_k, size)
  TensorView value;   // (batch, heads, n_k, value_dim)
  TensorView output;  // (batch, heads, n_q, value_dim)

  void* workspace = nullptr;  // as many bytes as the kernel asked for, 64-byte aligned
};

/// What positive features are taken relative to: the largest product of the row itself, of all rows
/// of the head that are not padded, or of the row and those before it.
enum class Reference : std::int32_t { kRow, kHead, kRunning };

/// features = factor (exp(product - scale |input|^2 / 2 - reference) + eps) of float32 or float64
/// numbers; 0 for padded rows. With kRunning they are relative to a constant of the head.
struct FeatureParams {
  DataType dtype = DataType::kFloat32;
  Reference reference = Reference::kRow;
  std::int64_t batch = 0;
  std::int64_t heads = 0;
  std::int64_t n = 0;
  std::int64_t count = 0;     // features of a row
  std::int64_t head_dim = 0;  // of the input
  double scale = 1.0;
  double factor = 1.0;
  double eps = 0.0;

  // Contiguous.
  const void* input = nullptr;            // (batch, heads, n, head_dim)
  const std::uint8_t* padding = nullptr;  // (batch, n), 1 = padded; null = none
  void* features = nullptr;               // (batch, heads, n, count); products before
  void* sums = nullptr;                   // (batch, heads, n), of each row's features
  void* maximum = nullptr;                // (batch, heads, n), the reference, less the constant
  void* constant = nullptr;               // (batch, heads), zero-filled; only kRunning has one
  std::int64_t* index = nullptr;  // (batch, heads, n): where in the head's products it is; -1 =
                                  // nowhere

  // Backward only, of sums and maximum null = zero.
  const void* grad_features = nullptr;
  const void* grad_sums = nullptr;
  const void* grad_maximum = nullptr;
  void* grad_products = nullptr;
  void* grad_norms = nullptr;  // (batch, heads, n), of scale |input|^2 / 2, negated
};

/// features · sums, relative to each row's largest product, or featuresᵀ · values, relative to the
/// head's. Backward has both as inputs, one of them the gradient. What is not wanted is null.
struct FeatureProductParams {
  DataType dtype = DataType::kFloat32;
  bool transposed = false;  // featuresᵀ · values
  bool backward = false;
  std::int64_t batch = 0;
  std::int64_t heads = 0;
  std::int64_t n = 0;
  std::int64_t count = 0;     // features of a row
  std::int64_t head_dim = 0;  // of the input
  std::int64_t value_dim = 0;
  double scale = 1.0;
  double factor = 1.0;
  double eps = 0.0;

  TensorView input;                       // (batch, heads, n, head_dim)
  const void* projection = nullptr;       // (heads, count, head_dim)
  std::int64_t projection_stride = 0;     // of heads; 0 = one for all
  const std::uint8_t* padding = nullptr;  // (batch, n), 1 = padded; null = none
  TensorView values;                      // (batch, heads, n, value_dim)
  const void* sums = nullptr;             // (batch, heads, count, value_dim)

  // Contiguous. Backward reads the maxima and where they are, as of FeatureParams.
  void* maximum = nullptr;
  std::int64_t* index = nullptr;
  void* to_values = nullptr;
  void* to_sums = nullptr;
  void* grad_input = nullptr;
  void* grad_projection = nullptr;  // (batch, heads, count, head_dim)

  void* workspace = nullptr;
};

}  // namespace sparse_attn
