// A sink: a logit of each head that takes its share of the softmax and has no value. So the output
// is that over the keys times their share, σ(lse - sink), and no kernel need know of it.
#pragma once

#include <ATen/ATen.h>

#include "ops/arguments.h"

namespace sparse_attn {

/// The keys' share of the softmax, (batch, heads, queries); differentiable. It follows from the
/// smaller of the two shares, so that derivatives are as precise: that of σ near 1 has 1 - σ in it,
/// where nothing is left of a small other share. That of a query without keys does not matter: it
/// is finite, and so are its gradients.
inline at::Tensor share_of_keys(const at::Tensor& logsumexp, const at::Tensor& sink) {
  const at::Tensor finite = at::where(at::isneginf(logsumexp), 0.0, logsumexp);
  const at::Tensor lead = finite - sink.to(logsumexp.scalar_type()).view({1, -1, 1});
  const at::Tensor keys_lead = lead >= 0;
  const at::Tensor smaller = at::sigmoid(at::where(keys_lead, -lead, lead));
  return at::where(keys_lead, 1 - smaller, smaller);
}

/// Rows like the output, times their shares.
inline at::Tensor scale_rows(const at::Tensor& rows, const at::Tensor& shares) {
  return (rows * shares.unsqueeze(-1)).to(rows.scalar_type());
}

template <class Arguments>
Arguments without_sink(Arguments arguments) {
  arguments.sink = std::nullopt;
  return arguments;
}

inline Outputs with_sink(const Outputs& of_keys, const at::Tensor& sink) {
  const auto& [output, logsumexp] = of_keys;
  return {scale_rows(output, share_of_keys(logsumexp, sink)), logsumexp};
}

/// The call over the keys alone that has the same gradients of all but the sink: delta, the rows'
/// sums of dO ∘ O less the gradient of the log-sum-exp, comes out right with O as it is.
inline BackwardArguments over_keys(const BackwardArguments& a) {
  BackwardArguments keys = without_sink(a);
  keys.grad_output = scale_rows(a.grad_output, share_of_keys(a.logsumexp, *a.sink));
  return keys;
}

}  // namespace sparse_attn
