// Shapes without data: what torch.compile and torch.export see. Symbolic sizes only.
#include <ATen/ATen.h>
#include <torch/library.h>

#include "ops/checks.h"

namespace sparse_attn {
namespace {

Outputs attention_meta(c10::DispatchKeySet, const AttentionArguments& a) {
  check_attention(a);
  return {empty_rows(a.query, a.value.sym_size(3)),
          at::empty_symint({a.query.sym_size(0), a.query.sym_size(1), a.query.sym_size(2)},
                           a.query.options().dtype(lse_type(a.query)))};
}

Gradients backward_meta(c10::DispatchKeySet, const BackwardArguments& a) {
  check_backward(a);
  // Sums of keys go to contiguous rows, whatever the layout of the keys: see reads_rows_in_place.
  return {empty_rows(a.query, a.query.sym_size(3)),
          at::empty_symint(a.key.sym_sizes(), a.key.options()),
          at::empty_symint(a.value.sym_sizes(), a.value.options())};
}

}  // namespace

TORCH_LIBRARY_IMPL(sparse_attn, Meta, m) {
  m.impl("attention", TORCH_FN(attention_kernel<attention_meta>));
  m.impl("attention_backward", TORCH_FN(backward_kernel<backward_meta>));
}

}  // namespace sparse_attn
