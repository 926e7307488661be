// The schemas. What each op computes is in the documentation of the Python function that fronts it.
#include <torch/library.h>

#include "ops/arguments.h"

namespace sparse_attn {
namespace {

// What stands in a schema, in this order: tensors, the pattern, options, results.
const std::string kInputs = "Tensor query, Tensor key, Tensor value";
const std::string kForGradients =
    "Tensor grad_output, Tensor? grad_logsumexp, Tensor query, Tensor key, Tensor value, "
    "Tensor output, Tensor logsumexp";
const std::string kTangents =
    ", Tensor? query_tangent, Tensor? key_tangent, Tensor? value_tangent, Tensor? bias_tangent, "
    "Tensor? gate_tangent";
const std::string kGeneralPattern = "int[] pattern, Tensor[]? pattern_tensors=None";
const std::string kOptions =
    ", *, Tensor? key_padding_mask=None, Tensor? global_mask=None, Tensor? bias=None, "
    "int bias_kind=1, Tensor? gate=None, int gate_kind=1, float dropout_p=0.0, "
    "Tensor? dropout_seed=None, float? scale=None, float? softcap=None, Tensor? sink=None, "
    "bool enable_gqa=False) -> ";
const std::string kOutputs = "(Tensor output, Tensor logsumexp)";
const std::string kGradients = "(Tensor grad_query, Tensor grad_key, Tensor grad_value)";
const std::string kTableGradients = "(Tensor grad_bias, Tensor grad_gate)";

std::string schema(const std::string& name, const std::string& tensors, const std::string& pattern,
                   const std::string& results) {
  return name + "(" + tensors + ", " + pattern + kOptions + results;
}

}  // namespace

TORCH_LIBRARY(sparse_attn, m) {
  const auto define = [&](const std::string& text) {
    m.def(torch::schema(text.c_str()), {at::Tag::pt2_compliant_tag});
  };
  define(schema("attention", kInputs, kGeneralPattern, kOutputs));
  define(schema("attention_backward", kForGradients, kGeneralPattern, kGradients));
  define(schema("attention_table_backward", kForGradients, kGeneralPattern, kTableGradients));
  define(schema("attention_tangent", kInputs + ", Tensor output, Tensor logsumexp" + kTangents,
                kGeneralPattern, "(Tensor output_tangent, Tensor logsumexp_tangent)"));
  define(schema("attention_backward_backward", kForGradients + kTangents, kGeneralPattern,
                "(Tensor grad_grad_output, Tensor grad_grad_logsumexp, Tensor grad_query, "
                "Tensor grad_key, Tensor grad_value, Tensor grad_bias, Tensor grad_gate)"));

  for (const auto& [name, pattern] :
       {std::pair<std::string, std::string>{"window_attention", "int left, int? right=None"},
        {"dilated_attention", "int left, int? right=None, int dilation=1"},
        {"global_attention", "int[] tokens, int left, int? right=None, int dilation=1"},
        {"index_attention", "Tensor indices, Tensor? counts=None"}}) {
    define(schema(name, kInputs, pattern, kOutputs));
    define(schema(name + "_backward", kForGradients, pattern, kGradients));
  }

  // What patterns know about themselves.
  const std::string pattern = "int[] pattern, Tensor[]? pattern_tensors, int n_q, int n_k";
  m.def("_pattern_causal(int[] pattern) -> bool");
  m.def(("_pattern_mask(" + pattern + ", int? heads=None) -> Tensor").c_str());
  m.def("_pattern_allows(int[] pattern, Tensor positions, Tensor keys, int n_k) -> Tensor");
  m.def(("_pattern_cost(" + pattern + ", int[]? tile=None) -> int[]").c_str());
  m.def(("_pattern_plan(" + pattern + ") -> str").c_str());
  m.def(("_pattern_seen(" + pattern + ") -> (Tensor queries, Tensor keys)").c_str());
  m.def(("_pattern_global_queries(" + pattern + ") -> Tensor").c_str());
  m.def(("_pattern_step(" + pattern + ") -> int").c_str());
  m.def("_cuda_archs() -> str[]");
  // Which kernels serve a call: simt, mma (tensor cores) or sm90. With modifiers: bias, gate, ...
  m.def("_cuda_kernels(Tensor query, Tensor value, bool modified=False) -> str");
  m.def("_plan_cache_size() -> int");
  m.def("_clear_plan_cache() -> ()");
}

const AttentionOp& attention_op() {
  static const AttentionOp op("sparse_attn::attention");
  return op;
}

const BackwardOp& backward_op() {
  static const BackwardOp op("sparse_attn::attention_backward");
  return op;
}

const TableBackwardOp& table_backward_op() {
  static const TableBackwardOp op("sparse_attn::attention_table_backward");
  return op;
}

const TangentOp& tangent_op() {
  static const TangentOp op("sparse_attn::attention_tangent");
  return op;
}

const SecondOp& second_op() {
  static const SecondOp op("sparse_attn::attention_backward_backward");
  return op;
}

}  // namespace sparse_attn
