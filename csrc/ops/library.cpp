// The schemas. What each op computes is in the documentation of the Python function that fronts it.
#include <torch/library.h>

#include "ops/arguments.h"

namespace sparse_attn {
namespace {

/// A front's schema differs from the general op's in how it says the pattern.
std::string front(const std::string& name, const std::string& pattern) {
  return name + "(Tensor query, Tensor key, Tensor value, " + pattern +
         ", *, Tensor? key_padding_mask=None, Tensor? global_mask=None, float? scale=None, bool "
         "enable_gqa=False)"
         " -> (Tensor output, Tensor logsumexp)";
}

std::string backward(const std::string& name, const std::string& pattern) {
  return name +
         "_backward(Tensor grad_output, Tensor? grad_logsumexp, Tensor query, Tensor key, Tensor "
         "value, Tensor output, "
         "Tensor logsumexp, " +
         pattern +
         ", *, Tensor? key_padding_mask=None, Tensor? global_mask=None, float? scale=None, bool "
         "enable_gqa=False)"
         " -> (Tensor grad_query, Tensor grad_key, Tensor grad_value)";
}

const char* const kGeneralPattern = "int[] pattern, Tensor[]? pattern_tensors=None";

}  // namespace

TORCH_LIBRARY(sparse_attn, m) {
  const auto define = [&](const std::string& schema) {
    m.def(torch::schema(schema.c_str()), {at::Tag::pt2_compliant_tag});
  };
  define(std::string("attention(Tensor query, Tensor key, Tensor value, ") + kGeneralPattern +
         ", *, Tensor? key_padding_mask=None, Tensor? global_mask=None, Tensor? bias=None, Tensor? "
         "gate=None, "
         "float dropout_p=0.0, Tensor? dropout_seed=None, float? scale=None, float? softcap=None, "
         "Tensor? sink=None, "
         "bool enable_gqa=False) -> (Tensor output, Tensor logsumexp)");
  define(backward("attention", kGeneralPattern));

  for (const auto& [name, pattern] :
       {std::pair<std::string, std::string>{"window_attention", "int left, int? right=None"},
        {"dilated_attention", "int left, int? right=None, int dilation=1"},
        {"global_attention", "int[] tokens, int left, int? right=None, int dilation=1"},
        {"index_attention", "Tensor indices, Tensor? counts=None"}}) {
    define(front(name, pattern));
    define(backward(name, pattern));
  }

  // What patterns know about themselves.
  const std::string pattern = "int[] pattern, Tensor[]? pattern_tensors, int n_q, int n_k";
  m.def("_pattern_causal(int[] pattern) -> bool");
  m.def(("_pattern_mask(" + pattern + ", int? heads=None) -> Tensor").c_str());
  m.def(("_pattern_cost(" + pattern + ", int[]? tile=None) -> int[]").c_str());
  m.def(("_pattern_plan(" + pattern + ") -> str").c_str());
  m.def("_cuda_archs() -> str[]");
  m.def("_plan_cache_size() -> int");
  m.def("_clear_plan_cache() -> ()");
}

namespace {

template <class Function>
const c10::TypedOperatorHandle<Function>& handle(const char* name) {
  static const c10::TypedOperatorHandle<Function> op =
      c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Function>();
  return op;
}

template <class Invoke>
auto with_forward(const AttentionArguments& a, const Invoke& invoke) {
  return invoke(a.query, a.key, a.value, a.pattern, a.pattern_tensors, a.key_padding_mask,
                a.global_mask, a.bias, a.gate, a.dropout_p, a.dropout_seed, a.scale, a.softcap,
                a.sink, a.enable_gqa);
}

template <class Invoke>
auto with_backward(const BackwardArguments& a, const Invoke& invoke) {
  return invoke(a.grad_output, a.grad_logsumexp, a.query, a.key, a.value, a.output, a.logsumexp,
                a.pattern, a.pattern_tensors, a.key_padding_mask, a.global_mask, a.scale,
                a.enable_gqa);
}

const c10::TypedOperatorHandle<AttentionFunction>& attention_op() {
  return handle<AttentionFunction>("sparse_attn::attention");
}

const c10::TypedOperatorHandle<BackwardFunction>& backward_op() {
  return handle<BackwardFunction>("sparse_attn::attention_backward");
}

}  // namespace

Outputs call_attention(const AttentionArguments& arguments) {
  return with_forward(arguments, [](const auto&... a) { return attention_op().call(a...); });
}

Outputs redispatch_attention(c10::DispatchKeySet keys, const AttentionArguments& arguments) {
  return with_forward(arguments,
                      [&](const auto&... a) { return attention_op().redispatch(keys, a...); });
}

Gradients call_backward(const BackwardArguments& arguments) {
  return with_backward(arguments, [](const auto&... a) { return backward_op().call(a...); });
}

Gradients redispatch_backward(c10::DispatchKeySet keys, const BackwardArguments& arguments) {
  return with_backward(arguments,
                       [&](const auto&... a) { return backward_op().redispatch(keys, a...); });
}

}  // namespace sparse_attn
