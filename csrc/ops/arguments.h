// The arguments of the ops as structs, so that their long signatures stand in one place.
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
using TableGradients = std::tuple<at::Tensor, at::Tensor>;         // of bias, gate
/// Of grad_output, grad_logsumexp, query, key, value, bias, gate.
using SecondGradients =
    std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

/// Kinds of tables, as the ops take them; a positive one is the side of blocks.
constexpr std::int64_t kSlopesKind = -1, kSlotsKind = 0, kDenseKind = 1;

/// What all ops take, after their tensors, in the order of their schemas.
struct CallOptions {
  at::IntArrayRef pattern;
  OptionalTensors pattern_tensors = std::nullopt;
  OptionalTensor key_padding_mask = std::nullopt;
  OptionalTensor global_mask = std::nullopt;
  OptionalTensor bias = std::nullopt;
  std::int64_t bias_kind = kDenseKind;
  OptionalTensor gate = std::nullopt;
  std::int64_t gate_kind = kDenseKind;
  double dropout_p = 0.0;
  OptionalTensor dropout_seed = std::nullopt;
  std::optional<double> scale = std::nullopt;
  std::optional<double> softcap = std::nullopt;
  OptionalTensor sink = std::nullopt;
  bool enable_gqa = false;
};

/// A tangent of the inputs, or what multiplies a second derivative.
struct Tangents {
  OptionalTensor query, key, value, bias, gate;
  bool any() const { return query || key || value || bias || gate; }
};

// Each struct knows how the tensors of its op stand in the schema: front() and make().

/// Of sparse_attn::attention.
struct AttentionArguments : CallOptions {
  at::Tensor query;
  at::Tensor key;
  at::Tensor value;

  auto front() const { return std::tie(query, key, value); }
  static AttentionArguments make(const CallOptions& options, const at::Tensor& query,
                                 const at::Tensor& key, const at::Tensor& value) {
    return {options, query, key, value};
  }
};

/// Of sparse_attn::attention_backward and attention_table_backward.
struct BackwardArguments : AttentionArguments {
  at::Tensor grad_output;
  OptionalTensor grad_logsumexp;
  at::Tensor output;
  at::Tensor logsumexp;

  auto front() const {
    return std::tie(grad_output, grad_logsumexp, query, key, value, output, logsumexp);
  }
  static BackwardArguments make(const CallOptions& options, const at::Tensor& grad_output,
                                const OptionalTensor& grad_logsumexp, const at::Tensor& query,
                                const at::Tensor& key, const at::Tensor& value,
                                const at::Tensor& output, const at::Tensor& logsumexp) {
    return {{options, query, key, value}, grad_output, grad_logsumexp, output, logsumexp};
  }
};

/// Of sparse_attn::attention_tangent.
struct TangentArguments : AttentionArguments {
  at::Tensor output;
  at::Tensor logsumexp;
  Tangents tangents;

  auto front() const {
    const Tangents& t = tangents;
    return std::tie(query, key, value, output, logsumexp, t.query, t.key, t.value, t.bias, t.gate);
  }
  static TangentArguments make(const CallOptions& options, const at::Tensor& query,
                               const at::Tensor& key, const at::Tensor& value,
                               const at::Tensor& output, const at::Tensor& logsumexp,
                               const OptionalTensor& query_tangent,
                               const OptionalTensor& key_tangent,
                               const OptionalTensor& value_tangent,
                               const OptionalTensor& bias_tangent,
                               const OptionalTensor& gate_tangent) {
    return {{options, query, key, value},
            output,
            logsumexp,
            {query_tangent, key_tangent, value_tangent, bias_tangent, gate_tangent}};
  }
};

/// Of sparse_attn::attention_backward_backward.
struct SecondArguments : BackwardArguments {
  Tangents tangents;

  auto front() const {
    const Tangents& t = tangents;
    return std::tie(grad_output, grad_logsumexp, query, key, value, output, logsumexp, t.query,
                    t.key, t.value, t.bias, t.gate);
  }
  static SecondArguments make(const CallOptions& options, const at::Tensor& grad_output,
                              const OptionalTensor& grad_logsumexp, const at::Tensor& query,
                              const at::Tensor& key, const at::Tensor& value,
                              const at::Tensor& output, const at::Tensor& logsumexp,
                              const OptionalTensor& query_tangent,
                              const OptionalTensor& key_tangent,
                              const OptionalTensor& value_tangent,
                              const OptionalTensor& bias_tangent,
                              const OptionalTensor& gate_tangent) {
    return {{{options, query, key, value}, grad_output, grad_logsumexp, output, logsumexp},
            {query_tangent, key_tangent, value_tangent, bias_tangent, gate_tangent}};
  }
};

/// An op: its kernels take the struct, and so do those who call it through the dispatcher.
template <class Result, class Arguments, class... Front>
class Op {
 public:
  using Function = Result(Front..., at::IntArrayRef, OptionalTensors, const OptionalTensor&,
                          const OptionalTensor&, const OptionalTensor&, std::int64_t,
                          const OptionalTensor&, std::int64_t, double, const OptionalTensor&,
                          std::optional<double>, std::optional<double>, const OptionalTensor&,
                          bool);

  /// Makes the function that the dispatcher wants out of one that takes the struct.
  template <Result (*kKernel)(c10::DispatchKeySet, const Arguments&)>
  static Result kernel(c10::DispatchKeySet keys, Front... front, at::IntArrayRef pattern,
                       OptionalTensors pattern_tensors, const OptionalTensor& key_padding_mask,
                       const OptionalTensor& global_mask, const OptionalTensor& bias,
                       std::int64_t bias_kind, const OptionalTensor& gate, std::int64_t gate_kind,
                       double dropout_p, const OptionalTensor& dropout_seed,
                       std::optional<double> scale, std::optional<double> softcap,
                       const OptionalTensor& sink, bool enable_gqa) {
    return kKernel(keys, Arguments::make({pattern, pattern_tensors, key_padding_mask, global_mask,
                                          bias, bias_kind, gate, gate_kind, dropout_p, dropout_seed,
                                          scale, softcap, sink, enable_gqa},
                                         front...));
  }

  explicit Op(const char* name)
      : handle_(
            c10::Dispatcher::singleton().findSchemaOrThrow(name, "").template typed<Function>()) {}

  /// From the top, or with the keys that are left.
  Result call(const Arguments& a) const {
    return invoke(a, [&](const auto&... all) { return handle_.call(all...); });
  }
  Result redispatch(c10::DispatchKeySet keys, const Arguments& a) const {
    return invoke(a, [&](const auto&... all) { return handle_.redispatch(keys, all...); });
  }

 private:
  template <class Invoke>
  static Result invoke(const Arguments& a, const Invoke& body) {
    const auto options = std::tie(a.pattern, a.pattern_tensors, a.key_padding_mask, a.global_mask,
                                  a.bias, a.bias_kind, a.gate, a.gate_kind, a.dropout_p,
                                  a.dropout_seed, a.scale, a.softcap, a.sink, a.enable_gqa);
    return std::apply(body, std::tuple_cat(a.front(), options));
  }

  c10::TypedOperatorHandle<Function> handle_;
};

using TensorArgument = const at::Tensor&;
using OptionalArgument = const OptionalTensor&;

using AttentionOp = Op<Outputs, AttentionArguments, TensorArgument, TensorArgument, TensorArgument>;
template <class Result>
using AnyBackwardOp =
    Op<Result, BackwardArguments, TensorArgument, OptionalArgument, TensorArgument, TensorArgument,
       TensorArgument, TensorArgument, TensorArgument>;
using BackwardOp = AnyBackwardOp<Gradients>;
using TableBackwardOp = AnyBackwardOp<TableGradients>;
using TangentOp = Op<Outputs, TangentArguments, TensorArgument, TensorArgument, TensorArgument,
                     TensorArgument, TensorArgument, OptionalArgument, OptionalArgument,
                     OptionalArgument, OptionalArgument, OptionalArgument>;
using SecondOp =
    Op<SecondGradients, SecondArguments, TensorArgument, OptionalArgument, TensorArgument,
       TensorArgument, TensorArgument, TensorArgument, TensorArgument, OptionalArgument,
       OptionalArgument, OptionalArgument, OptionalArgument, OptionalArgument>;

const AttentionOp& attention_op();
const BackwardOp& backward_op();
const TableBackwardOp& table_backward_op();
const TangentOp& tangent_op();
const SecondOp& second_op();

}  // namespace sparse_attn
