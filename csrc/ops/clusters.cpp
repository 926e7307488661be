// The op of clusters: its schema, and its shape without data. It is the package's own: what it is
// given was checked.
#include "ops/clusters.h"

#include <ATen/ATen.h>
#include <torch/library.h>

namespace sparse_attn {
namespace {

at::Tensor own_pairs_meta(const at::Tensor& query_members, const at::Tensor& key_members,
                          c10::SymInt, c10::SymInt, const std::optional<at::Tensor>&,
                          const std::optional<at::Tensor>&, bool, at::ScalarType dtype) {
  auto sizes = query_members.sym_sizes().vec();
  sizes.push_back(key_members.sym_size(2));
  return at::empty_symint(sizes, query_members.options().dtype(dtype));
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(sparse_attn, m) {
  m.def(torch::schema("_own_pairs(Tensor query_members, Tensor key_members, SymInt n_q, SymInt "
                      "n_k, Tensor? query_hidden, Tensor? key_hidden, bool is_causal, ScalarType "
                      "dtype) -> Tensor"),
        {at::Tag::pt2_compliant_tag});
}

TORCH_LIBRARY_IMPL(sparse_attn, Meta, m) { m.impl("_own_pairs", TORCH_FN(own_pairs_meta)); }

}  // namespace sparse_attn
