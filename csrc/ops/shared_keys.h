// sparse_attn::shared_keys: for each query the keys that share a group with it.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>

namespace sparse_attn {

struct SharedKeysArguments {
  at::Tensor query_members;  // (batch, heads, places) int64
  at::Tensor query_offsets;  // (batch, heads, groups + 1) int64, into the places
  at::Tensor key_members;
  at::Tensor key_offsets;
  c10::SymInt n_q;
  c10::SymInt n_k;
  std::optional<at::Tensor> key_padding_mask;
  bool is_causal = false;
};

using IndicesAndCounts = std::tuple<at::Tensor, at::Tensor>;

/// Shapes, types and devices.
void check_shared_keys(const SharedKeysArguments& arguments);

/// Makes the function that the dispatcher wants out of one that takes the struct.
template <IndicesAndCounts (*kKernel)(const SharedKeysArguments&)>
IndicesAndCounts shared_keys_kernel(const at::Tensor& query_members,
                                    const at::Tensor& query_offsets, const at::Tensor& key_members,
                                    const at::Tensor& key_offsets, c10::SymInt n_q, c10::SymInt n_k,
                                    const std::optional<at::Tensor>& key_padding_mask,
                                    bool is_causal) {
  const SharedKeysArguments arguments{query_members,  query_offsets,  key_members,      key_offsets,
                                      std::move(n_q), std::move(n_k), key_padding_mask, is_causal};
  check_shared_keys(arguments);
  return kKernel(arguments);
}

}  // namespace sparse_attn
