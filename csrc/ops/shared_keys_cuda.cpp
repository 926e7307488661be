// The keys of groups on a GPU: compositions of ATen's. Every pair of every group is made once; then
// they are sorted, and what several groups have in common is dropped.
#include <ATen/ATen.h>
#include <c10/core/DeviceGuard.h>
#include <torch/library.h>

#include "ops/shared_keys.h"

namespace sparse_attn {
namespace {

void check_contents(const char* side, const at::Tensor& members, const at::Tensor& offsets,
                    std::int64_t tokens) {
  const std::int64_t places = members.size(2);
  const at::Tensor ascend =
      (offsets.diff() >= 0).all() & (offsets >= 0).all() & (offsets <= places).all();
  TORCH_CHECK_VALUE(ascend.item<bool>(), "sparse_attn: expected ", side,
                    "_offsets that ascend from 0 to the number of members, ", places,
                    ", got others");
  const at::Tensor place = at::arange(places, offsets.options());
  const at::Tensor used = (place >= offsets.narrow(2, 0, 1)) & (place < offsets.narrow(2, -1, 1));
  const at::Tensor wrong = used & ((members < 0) | (members >= tokens));
  TORCH_CHECK_VALUE(!wrong.any().item<bool>(), "sparse_attn: expected ", side, "_members in [0, ",
                    tokens, "), got ",
                    members.masked_select(wrong).flatten()[0].item<std::int64_t>());
}

/// For each place of the list that holds counts[i] places of i: i, and which of them it is.
std::tuple<at::Tensor, at::Tensor> repeated(const at::Tensor& counts) {
  const at::Tensor number = at::repeat_interleave(counts);
  const at::Tensor first = counts.cumsum(0) - counts;
  return {number, at::arange(number.size(0), number.options()) - first.index_select(0, number)};
}

/// The pairs of all groups as (row of all heads) · n_k + key, ascending, each once.
at::Tensor pairs_of(const SharedKeysArguments& a, std::int64_t n_q, std::int64_t n_k) {
  const std::int64_t groups = a.query_offsets.size(2) - 1, heads = a.query_members.size(1);
  const auto [group, place] = repeated(a.query_offsets.diff().flatten());
  const at::Tensor set = at::floor_divide(group, std::max<std::int64_t>(groups, 1));
  const auto at_place = [](const at::Tensor& members, const at::Tensor& of_set,
                           const at::Tensor& within) {
    return members.flatten().index_select(0, of_set * members.size(2) + within);
  };
  const auto starts = [&](const at::Tensor& offsets) {
    return offsets.narrow(2, 0, groups).flatten().index_select(0, group);
  };
  const at::Tensor query = at_place(a.query_members, set, starts(a.query_offsets) + place);
  const auto [member, nth] = repeated(a.key_offsets.diff().flatten().index_select(0, group));
  const at::Tensor set_of_pair = set.index_select(0, member);
  const at::Tensor key =
      at_place(a.key_members, set_of_pair, starts(a.key_offsets).index_select(0, member) + nth);
  const at::Tensor query_of_pair = query.index_select(0, member);
  const at::Tensor codes = (set_of_pair * n_q + query_of_pair) * n_k + key;
  at::Tensor seen = at::ones_like(codes, at::kBool);
  if (a.is_causal) seen = key <= query_of_pair + (n_k - n_q);
  if (a.key_padding_mask) {
    const at::Tensor padded = at::floor_divide(set_of_pair, heads) * n_k + key;
    seen = seen.logical_and(~a.key_padding_mask->flatten().index_select(0, padded));
  }
  return std::get<0>(at::_unique(codes.masked_select(seen), /*sorted=*/true));
}

IndicesAndCounts shared_keys_cuda(const SharedKeysArguments& a) {
  const c10::DeviceGuard guard(a.query_members.device());
  const std::int64_t batch = a.query_members.size(0), heads = a.query_members.size(1),
                     n_q = a.n_q.expect_int(), n_k = a.n_k.expect_int(), rows = batch * heads * n_q;
  check_contents("query", a.query_members, a.query_offsets, n_q);
  check_contents("key", a.key_members, a.key_offsets, n_k);
  const at::Tensor codes = pairs_of(a, n_q, n_k);
  const auto options = codes.options().dtype(at::kInt);
  const at::Tensor row = at::floor_divide(codes, std::max<std::int64_t>(n_k, 1));
  const at::Tensor ends = at::searchsorted(row, at::arange(rows + 1, codes.options()));
  const at::Tensor counts = ends.diff();
  const std::int64_t longest = codes.size(0) == 0 ? 0 : counts.max().item<std::int64_t>();
  const at::Tensor indices = at::zeros({rows * longest}, options);
  const at::Tensor nth = at::arange(codes.size(0), codes.options()) - ends.index_select(0, row);
  indices.index_put_({row * longest + nth}, (codes - row * n_k).to(at::kInt));
  return {indices.view({batch, heads, n_q, longest}),
          counts.to(at::kInt).view({batch, heads, n_q})};
}

}  // namespace

#ifndef SPARSE_ATTN_CUDA_KERNELS_FOR
#define SPARSE_ATTN_CUDA_KERNELS_FOR CUDA
#endif

TORCH_LIBRARY_IMPL(sparse_attn, SPARSE_ATTN_CUDA_KERNELS_FOR, m) {
  m.impl("shared_keys", TORCH_FN(shared_keys_kernel<shared_keys_cuda>));
}

}  // namespace sparse_attn
