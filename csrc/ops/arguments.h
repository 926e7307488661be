// The arguments of the ops as structs, so that their long signatures stand in one place each.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>

#include <optional>
#include <tuple>

namespace sparse_attn {

using OptionalTensor = std::optional<at::Tensor>;
using OptionalTensors = std::optional<at::ArrayRef<at::Tensor>>;
using Outputs = std::tuple<at::Tensor, at::Tensor>;                // output, logsumexp
using Gradients = std::tuple<at::Tensor, at::Tensor, at::Tensor>;  // of query, key, value

/// Of sparse_attn::attention, in the order of its schema.
struct AttentionArguments {
  at::Tensor query;
  at::Tensor key;
  at::Tensor value;
  at::IntArrayRef pattern;
  OptionalTensors pattern_tensors = std::nullopt;
  OptionalTensor key_padding_mask = std::nullopt;
  OptionalTensor global_mask = std::nullopt;
  OptionalTensor bias = std::nullopt;
  OptionalTensor gate = std::nullopt;
  double dropout_p = 0.0;
  OptionalTensor dropout_seed = std::nullopt;
  std::optional<double> scale = std::nullopt;
  std::optional<double> softcap = std::nullopt;
  OptionalTensor sink = std::nullopt;
  bool enable_gqa = false;
};

using AttentionFunction = Outputs(const at::Tensor&, const at::Tensor&, const at::Tensor&,
                                  at::IntArrayRef, OptionalTensors, const OptionalTensor&,
                                  const OptionalTensor&, const OptionalTensor&,
                                  const OptionalTensor&, double, const OptionalTensor&,
                                  std::optional<double>, std::optional<double>,
                                  const OptionalTensor&, bool);

/// Makes the function that the dispatcher wants out of one that takes the struct.
template <Outputs (*kKernel)(c10::DispatchKeySet, const AttentionArguments&)>
Outputs attention_kernel(c10::DispatchKeySet keys, const at::Tensor& query, const at::Tensor& key,
                         const at::Tensor& value, at::IntArrayRef pattern,
                         OptionalTensors pattern_tensors, const OptionalTensor& key_padding_mask,
                         const OptionalTensor& global_mask, const OptionalTensor& bias,
                         const OptionalTensor& gate, double dropout_p,
                         const OptionalTensor& dropout_seed, std::optional<double> scale,
                         std::optional<double> softcap, const OptionalTensor& sink,
                         bool enable_gqa) {
  return kKernel(keys, {query, key, value, pattern, pattern_tensors, key_padding_mask, global_mask,
                        bias, gate, dropout_p, dropout_seed, scale, softcap, sink, enable_gqa});
}

/// Of sparse_attn::attention_backward, in the order of its schema.
struct BackwardArguments {
  at::Tensor grad_output;
  OptionalTensor grad_logsumexp;
  at::Tensor query;
  at::Tensor key;
  at::Tensor value;
  at::Tensor output;
  at::Tensor logsumexp;
  at::IntArrayRef pattern;
  OptionalTensors pattern_tensors;
  OptionalTensor key_padding_mask;
  OptionalTensor global_mask;
  std::optional<double> scale;
  bool enable_gqa;

  /// The forward call that these belong to.
  AttentionArguments forward() const {
    AttentionArguments arguments{query, key, value, pattern, pattern_tensors};
    arguments.key_padding_mask = key_padding_mask;
    arguments.global_mask = global_mask;
    arguments.scale = scale;
    arguments.enable_gqa = enable_gqa;
    return arguments;
  }
};

using BackwardFunction = Gradients(const at::Tensor&, const OptionalTensor&, const at::Tensor&,
                                   const at::Tensor&, const at::Tensor&, const at::Tensor&,
                                   const at::Tensor&, at::IntArrayRef, OptionalTensors,
                                   const OptionalTensor&, const OptionalTensor&,
                                   std::optional<double>, bool);

template <Gradients (*kKernel)(c10::DispatchKeySet, const BackwardArguments&)>
Gradients backward_kernel(c10::DispatchKeySet keys, const at::Tensor& grad_output,
                          const OptionalTensor& grad_logsumexp, const at::Tensor& query,
                          const at::Tensor& key, const at::Tensor& value, const at::Tensor& output,
                          const at::Tensor& logsumexp, at::IntArrayRef pattern,
                          OptionalTensors pattern_tensors, const OptionalTensor& key_padding_mask,
                          const OptionalTensor& global_mask, std::optional<double> scale,
                          bool enable_gqa) {
  return kKernel(keys, {grad_output, grad_logsumexp, query, key, value, output, logsumexp, pattern,
                        pattern_tensors, key_padding_mask, global_mask, scale, enable_gqa});
}

/// Calls the ops through the dispatcher, from the top or with the keys that are left.
Outputs call_attention(const AttentionArguments& arguments);
Outputs redispatch_attention(c10::DispatchKeySet keys, const AttentionArguments& arguments);
Gradients call_backward(const BackwardArguments& arguments);
Gradients redispatch_backward(c10::DispatchKeySet keys, const BackwardArguments& arguments);

}  // namespace sparse_attn
