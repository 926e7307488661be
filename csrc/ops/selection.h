// Ops that choose keys by their logits, scale · (q · k): the k largest, those above a bound, and
// the log-sum-exp that bounds are made of. What they return has no gradient.
#pragma once

#include "ops/arguments.h"
#include "selection_params.h"

namespace sparse_attn {

struct SelectionArguments {
  at::Tensor query;  // (batch, heads, n_q, head_dim)
  at::Tensor key;    // (batch, heads_kv, n_k, head_dim)
  OptionalTensor key_padding_mask;
  bool is_causal = false;
  std::optional<double> scale;
  bool enable_gqa = false;
};

/// Shapes, types and devices, on symbolic sizes.
void check_selection(const SelectionArguments& arguments);
void check_top(const SelectionArguments& arguments, const c10::SymInt& k);
void check_bounds(const SelectionArguments& arguments, const at::Tensor& bounds);

/// (batch, heads, n_q, ...) of another dtype, zero-filled.
at::Tensor zeros_of_rows(const SelectionArguments& arguments, at::ScalarType type);
at::Tensor zeros_of_lists(const SelectionArguments& arguments, const c10::SymInt& width);

/// What kernels of either device are called with, and what keeps its pointers alive.
class SelectionCall {
 public:
  explicit SelectionCall(const SelectionArguments& arguments);
  SelectionParams params;

 private:
  at::Tensor query_, key_, padding_;
};

/// The functions that the dispatcher wants, of a device's three kernels.
using ChosenKeys = std::tuple<at::Tensor, at::Tensor>;  // indices, counts
using TopKernel = ChosenKeys (*)(const SelectionArguments&, c10::SymInt k);
using AboveKernel = ChosenKeys (*)(const SelectionArguments&, const at::Tensor& bounds);
using LseKernel = at::Tensor (*)(const SelectionArguments&);

template <TopKernel kKernel>
ChosenKeys top_keys_kernel(const at::Tensor& query, const at::Tensor& key, c10::SymInt k,
                           const OptionalTensor& key_padding_mask, bool is_causal,
                           std::optional<double> scale, bool enable_gqa) {
  return kKernel({query, key, key_padding_mask, is_causal, scale, enable_gqa}, k);
}

template <AboveKernel kKernel>
ChosenKeys keys_above_kernel(const at::Tensor& query, const at::Tensor& key,
                             const at::Tensor& bounds, const OptionalTensor& key_padding_mask,
                             bool is_causal, std::optional<double> scale, bool enable_gqa) {
  return kKernel({query, key, key_padding_mask, is_causal, scale, enable_gqa}, bounds);
}

template <LseKernel kKernel>
at::Tensor keys_logsumexp_kernel(const at::Tensor& query, const at::Tensor& key,
                                 const OptionalTensor& key_padding_mask, bool is_causal,
                                 std::optional<double> scale, bool enable_gqa) {
  return kKernel({query, key, key_padding_mask, is_causal, scale, enable_gqa});
}

template <TopKernel kTop, AboveKernel kAbove, LseKernel kLse, class Library>
void implement_selection(Library& m) {
  m.impl("top_keys", TORCH_FN(top_keys_kernel<kTop>));
  m.impl("keys_above", TORCH_FN(keys_above_kernel<kAbove>));
  m.impl("keys_logsumexp", TORCH_FN(keys_logsumexp_kernel<kLse>));
}

}  // namespace sparse_attn
