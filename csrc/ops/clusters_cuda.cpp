// The op of clusters on a GPU: a composition of ATen's.
#include <ATen/ATen.h>
#include <c10/core/DeviceGuard.h>
#include <torch/library.h>

#include <limits>

#include "ops/clusters.h"

namespace sparse_attn {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr std::int64_t kWord = 63;  // bits of a word, but its sign

/// (sets, clusters, width, words): the clusters of each member, as bits.
at::Tensor memberships(const at::Tensor& members, std::int64_t length) {
  const std::int64_t sets = members.size(0), clusters = members.size(1);
  const std::int64_t words = (clusters + kWord - 1) / kWord;
  const at::Tensor cluster = at::arange(clusters, members.options()).unsqueeze(1);
  const at::Tensor place = members * words + at::floor_divide(cluster, kWord);
  const at::Tensor bit = at::bitwise_left_shift(at::ones_like(cluster), cluster.remainder(kWord));
  const at::Tensor all = at::zeros({sets, length * words}, members.options());
  all.scatter_add_(1, place.flatten(1), bit.expand_as(place).flatten(1));
  const at::Tensor index = members.flatten(1).unsqueeze(2).expand({-1, -1, words});
  return all.view({sets, length, words}).gather(1, index).view({sets, clusters, -1, words});
}

at::Tensor among(const at::Tensor& members, const at::Tensor& hidden) {
  const std::int64_t heads = members.size(0) / hidden.size(0);
  return hidden.repeat_interleave(heads, 0).gather(1, members.flatten(1)).view(members.sizes());
}

at::Tensor own_pairs_cuda(const OwnPairsArguments& a) {
  const c10::DeviceGuard guard(a.query_members.device());
  const at::Tensor &queries = a.query_members, &keys = a.key_members;
  const at::Tensor of_queries = memberships(queries, a.n_q), of_keys = memberships(keys, a.n_k);
  at::Tensor excluded = at::zeros({1}, queries.options().dtype(at::kBool));
  const at::Tensor clusters = at::arange(queries.size(1), queries.options());
  for (std::int64_t w = 0; w < of_queries.size(3); ++w) {
    const at::Tensor before = (clusters - w * kWord).clamp(0, kWord);
    const at::Tensor below = at::bitwise_left_shift(at::ones_like(before), before) - 1;
    const at::Tensor earlier = of_queries.select(3, w).bitwise_and(below.unsqueeze(1));
    const at::Tensor shared =
        earlier.unsqueeze(3).bitwise_and(of_keys.select(3, w).unsqueeze(2)) != 0;
    excluded = excluded | shared;
  }
  if (a.is_causal)
    excluded = excluded | (keys.unsqueeze(2) > queries.unsqueeze(3) + (a.n_k - a.n_q));
  if (a.key_hidden) excluded = excluded | among(keys, *a.key_hidden).unsqueeze(2);
  if (a.query_hidden) excluded = excluded | among(queries, *a.query_hidden).unsqueeze(3);
  return at::zeros(excluded.sizes(), queries.options().dtype(a.dtype))
      .masked_fill_(excluded, -kInfinity);
}

}  // namespace

#ifndef SPARSE_ATTN_CUDA_KERNELS_FOR
#define SPARSE_ATTN_CUDA_KERNELS_FOR CUDA
#endif

TORCH_LIBRARY_IMPL(sparse_attn, SPARSE_ATTN_CUDA_KERNELS_FOR, m) {
  m.impl("_own_pairs", TORCH_FN(own_pairs_kernel<own_pairs_cuda>));
}

}  // namespace sparse_attn
