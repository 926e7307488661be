// Tensors as the kernels see them.
#pragma once

#include <ATen/ATen.h>

#include <limits>

#include "ops/checks.h"
#include "params.h"

namespace sparse_attn {

inline DataType data_type(at::ScalarType type) {
  switch (type) {
    case at::kDouble:
      return DataType::kFloat64;
    case at::kBFloat16:
      return DataType::kBFloat16;
    case at::kHalf:
      return DataType::kFloat16;
    default:
      return DataType::kFloat32;
  }
}

/// Strides are free as long as the last one is 1.
inline at::Tensor with_unit_stride(const at::Tensor& tensor) {
  return tensor.stride(-1) == 1 || tensor.size(-1) <= 1 ? tensor : tensor.contiguous();
}

inline TensorView view(const at::Tensor& tensor) {
  return {tensor.mutable_data_ptr(), tensor.stride(0), tensor.stride(1), tensor.stride(2)};
}

/// A constant tensor may be shared copy-on-write: reading it must not copy it.
inline TensorView const_view(const at::Tensor& tensor) {
  return {const_cast<void*>(tensor.const_data_ptr()), tensor.stride(0), tensor.stride(1),
          tensor.stride(2)};
}

/// Sizes, scale and inputs of a call; the tensors that the views look at are the caller's to keep.
inline AttentionParams params_of(const AttentionArguments& a, const at::Tensor& query,
                                 const at::Tensor& key, const at::Tensor& value) {
  AttentionParams params;
  params.dtype = data_type(query.scalar_type());
  params.batch = query.size(0);
  params.heads = query.size(1);
  params.heads_kv = key.size(1);
  params.n_q = query.size(2);
  params.n_k = key.size(2);
  params.head_dim = query.size(3);
  params.value_dim = value.size(3);
  params.scale = a.scale.value_or(default_scale(a.query));
  params.query = const_view(query);
  params.key = const_view(key);
  params.value = const_view(value);
  return params;
}

/// There is nothing to compute.
inline bool is_empty(const AttentionArguments& a) {
  return a.query.size(0) == 0 || a.query.size(1) == 0 || a.query.size(2) == 0;
}

/// No query has a key.
inline bool has_no_pairs(const AttentionArguments& a) { return is_empty(a) || a.key.size(2) == 0; }

/// Of a table; without one, empty.
inline at::Tensor empty_like_table(const OptionalTensor& table, const at::Tensor& query) {
  return table ? at::empty_symint(table->sym_sizes(), table->options())
               : at::empty({0}, query.options());
}

/// Of queries without a single key.
inline Outputs without_keys(const at::Tensor& output, const at::Tensor& lse) {
  return {output.zero_(), lse.fill_(-std::numeric_limits<double>::infinity())};
}

inline at::Tensor empty_lse(const at::Tensor& query) {
  return at::empty({query.size(0), query.size(1), query.size(2)},
                   query.options().dtype(lse_type(query)));
}

}  // namespace sparse_attn
