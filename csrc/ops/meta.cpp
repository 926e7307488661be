// Shapes without data: what torch.compile and torch.export see. Symbolic sizes only.
#include <ATen/ATen.h>
#include <torch/library.h>

#include "ops/checks.h"
#include "ops/tensors.h"

namespace sparse_attn {
namespace {

Outputs outputs_of(const AttentionArguments& a) {
  return {empty_rows(a.query, a.value.sym_size(3)),
          at::empty_symint({a.query.sym_size(0), a.query.sym_size(1), a.query.sym_size(2)},
                           a.query.options().dtype(lse_type(a.query)))};
}

Gradients gradients_of(const AttentionArguments& a) {
  // Sums of keys go to contiguous rows, whatever the layout of the keys: see reads_rows_in_place.
  return {empty_rows(a.query, a.query.sym_size(3)),
          at::empty_symint(a.key.sym_sizes(), a.key.options()),
          at::empty_symint(a.value.sym_sizes(), a.value.options())};
}

TableGradients table_gradients_of(const AttentionArguments& a) {
  return {empty_like_table(a.bias, a.query), empty_like_table(a.gate, a.query)};
}

Outputs attention_meta(c10::DispatchKeySet, const AttentionArguments& a) {
  check_attention(a);
  return outputs_of(a);
}

Gradients backward_meta(c10::DispatchKeySet, const BackwardArguments& a) {
  check_backward(a);
  return gradients_of(a);
}

TableGradients table_backward_meta(c10::DispatchKeySet, const BackwardArguments& a) {
  check_backward(a);
  return table_gradients_of(a);
}

Outputs tangent_meta(c10::DispatchKeySet, const TangentArguments& a) {
  check_tangent(a);
  return outputs_of(a);
}

SecondGradients second_meta(c10::DispatchKeySet, const SecondArguments& a) {
  check_second(a);
  return std::tuple_cat(outputs_of(a), gradients_of(a), table_gradients_of(a));
}

}  // namespace

TORCH_LIBRARY_IMPL(sparse_attn, Meta, m) {
  m.impl("attention", TORCH_FN(AttentionOp::kernel<attention_meta>));
  m.impl("attention_backward", TORCH_FN(BackwardOp::kernel<backward_meta>));
  m.impl("attention_table_backward", TORCH_FN(TableBackwardOp::kernel<table_backward_meta>));
  m.impl("attention_tangent", TORCH_FN(TangentOp::kernel<tangent_meta>));
  m.impl("attention_backward_backward", TORCH_FN(SecondOp::kernel<second_meta>));
}

}  // namespace sparse_attn
