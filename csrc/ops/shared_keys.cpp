// The op that lists the keys of groups: schema and checks. Its shapes depend on the data: without
// data they are told in Python (sparse_attn/functional/clustered.py).
#include "ops/shared_keys.h"

#include <ATen/ATen.h>
#include <torch/library.h>

namespace sparse_attn {

void check_shared_keys(const SharedKeysArguments& a) {
  const at::Tensor& first = a.query_members;
  for (const auto& [name, tensor] :
       {std::pair<const char*, const at::Tensor&>{"query_members", a.query_members},
        {"query_offsets", a.query_offsets},
        {"key_members", a.key_members},
        {"key_offsets", a.key_offsets}}) {
    TORCH_CHECK_TYPE(tensor.scalar_type() == at::kLong && tensor.layout() == at::kStrided,
                     "sparse_attn: expected ", name, " to be a dense tensor of dtype int64, got ",
                     tensor.scalar_type(), " (", tensor.layout(), ")");
    TORCH_CHECK_VALUE(tensor.dim() == 3, "sparse_attn: expected ", name,
                      " of shape (batch, heads, length), got ", tensor.sym_sizes());
    TORCH_CHECK_VALUE(
        tensor.sym_size(0) == first.sym_size(0) && tensor.sym_size(1) == first.sym_size(1),
        "sparse_attn: expected ", name, " of shape (", first.sym_size(0), ", ", first.sym_size(1),
        ", length), as query_members, got ", tensor.sym_sizes());
    TORCH_CHECK_VALUE(tensor.device() == first.device(), "sparse_attn: expected ", name,
                      " on device ", first.device(), ", as query_members, got ", tensor.device());
  }
  TORCH_CHECK_VALUE(
      a.query_offsets.sym_size(2) >= 1 && a.query_offsets.sym_size(2) == a.key_offsets.sym_size(2),
      "sparse_attn: expected query_offsets and key_offsets of as many groups, got shapes ",
      a.query_offsets.sym_sizes(), " and ", a.key_offsets.sym_sizes());
  TORCH_CHECK_VALUE(a.n_q >= 0 && a.n_k >= 0,
                    "sparse_attn: expected n_q and n_k of at least 0, got ", a.n_q, " and ", a.n_k);
  if (!a.key_padding_mask) return;
  const at::Tensor& mask = *a.key_padding_mask;
  TORCH_CHECK_TYPE(mask.scalar_type() == at::kBool,
                   "sparse_attn: expected key_padding_mask of dtype bool, got ",
                   mask.scalar_type());
  TORCH_CHECK_VALUE(
      mask.dim() == 2 && mask.sym_size(0) == first.sym_size(0) && mask.sym_size(1) == a.n_k,
      "sparse_attn: expected key_padding_mask of shape (", first.sym_size(0), ", ", a.n_k,
      ") (batch, keys), got ", mask.sym_sizes());
  TORCH_CHECK_VALUE(mask.device() == first.device(),
                    "sparse_attn: expected key_padding_mask on device ", first.device(),
                    ", as query_members, got ", mask.device());
}

TORCH_LIBRARY_FRAGMENT(sparse_attn, m) {
  m.def(torch::schema("shared_keys(Tensor query_members, Tensor query_offsets, Tensor key_members, "
                      "Tensor key_offsets, SymInt n_q, SymInt n_k, *, Tensor? "
                      "key_padding_mask=None, bool is_causal=False) -> (Tensor indices, Tensor "
                      "counts)"),
        {at::Tag::pt2_compliant_tag, at::Tag::dynamic_output_shape});
}

}  // namespace sparse_attn
