// The op of clusters that choose their members: _own_pairs.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

namespace sparse_attn {

struct OwnPairsArguments {
  at::Tensor query_members;  // (sets, clusters, width) int64
  at::Tensor key_members;
  std::int64_t n_q;
  std::int64_t n_k;
  std::optional<at::Tensor> query_hidden;  // (batch, n_q) bool
  std::optional<at::Tensor> key_hidden;    // (batch, n_k) bool
  bool is_causal;
  at::ScalarType dtype;  // float32 or float64
};

/// (sets, clusters, queries, keys): -inf for what is hidden, later, or an earlier cluster's, too.
using OwnPairsBias = at::Tensor(const OwnPairsArguments&);

template <OwnPairsBias* kKernel>
at::Tensor own_pairs_kernel(const at::Tensor& query_members, const at::Tensor& key_members,
                            std::int64_t n_q, std::int64_t n_k,
                            const std::optional<at::Tensor>& query_hidden,
                            const std::optional<at::Tensor>& key_hidden, bool is_causal,
                            at::ScalarType dtype) {
  return kKernel(
      {query_members, key_members, n_q, n_k, query_hidden, key_hidden, is_causal, dtype});
}

}  // namespace sparse_attn
