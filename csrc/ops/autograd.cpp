// Differentiation, as ATen's own kernels do it: a Node with saved variables at the Autograd key.
// (torch::autograd::Function would refuse the transforms of torch.func.)
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/library.h>

#include <mutex>
#include <utility>

#include "ops/checks.h"
#include "ops/node.h"
#include "ops/saved_call.h"
#include "ops/sink.h"

namespace sparse_attn {
namespace {

using torch::autograd::edge_list;
using torch::autograd::Node;
using torch::autograd::set_history;
using torch::autograd::variable_list;

// ---- arguments ----------------------------------------------------------------------------------

at::Tensor or_undefined(const OptionalTensor& tensor) { return tensor.value_or(at::Tensor()); }

OptionalTensor or_none(const at::Tensor& tensor) {
  return tensor.defined() ? OptionalTensor(tensor) : std::nullopt;
}

/// What every op is differentiated by: query, key, value, bias, gate.
template <class Op>
auto with_inputs(const AttentionArguments& a, const Op& op) {
  return op(a.query, a.key, a.value, or_undefined(a.bias), or_undefined(a.gate));
}

// ---- nodes --------------------------------------------------------------------------------------

/// A node that works out gradients of all its inputs at once, under a lock, as ATen's do.
class LockedNode : public Node {
 public:
  using Node::Node;

  variable_list apply(variable_list&& grads) final {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (const at::Tensor& grad : grads) {
      if (grad.defined()) return gradients(grads);
    }
    return variable_list(num_outputs());
  }
  void release_variables() final {
    const std::lock_guard<std::mutex> lock(mutex_);
    release();
  }

 protected:
  virtual variable_list gradients(const variable_list& grads) = 0;
  virtual void release() = 0;

  /// Whether any of the inputs from `first` to before `end` wants a gradient.
  bool wants(std::size_t first, std::size_t end) {
    for (std::size_t i = first; i < end; ++i) {
      if (task_should_compute_output(i)) return true;
    }
    return false;
  }
};

/// The gradients of query, key, value, bias and gate: two ops, of which `wanted` says which to run.
variable_list input_gradients(const BackwardArguments& a, bool of_inputs, bool of_tables) {
  variable_list all(5);
  if (of_inputs) std::tie(all[0], all[1], all[2]) = backward_op().call(a);
  if (of_tables && (a.bias || a.gate)) {
    const auto [bias, gate] = table_backward_op().call(a);
    if (a.bias) all[3] = bias;
    if (a.gate) all[4] = gate;
  }
  return all;
}

class AttentionBackward final : public LockedNode {
 public:
  using LockedNode::LockedNode;
  std::string name() const override { return "SparseAttentionBackward"; }

  void save(const AttentionArguments& a, const Outputs& outputs) {
    call_.save(a);
    output_ = SavedVariable(std::get<0>(outputs), true);
    logsumexp_ = SavedVariable(std::get<1>(outputs), true);
  }

 protected:
  variable_list gradients(const variable_list& grads) override {
    std::vector<at::Tensor> tensors;
    const at::Tensor output = output_.unpack(getptr());
    const BackwardArguments a{call_.unpack(tensors),
                              grads[0].defined() ? grads[0] : at::zeros_like(output),
                              or_none(grads[1]), output, logsumexp_.unpack(getptr())};
    return input_gradients(a, wants(0, 3), wants(3, 5));
  }
  void release() override {
    call_.reset();
    output_.reset_data();
    logsumexp_.reset_data();
  }

 private:
  SavedCall call_;
  SavedVariable output_, logsumexp_;
};

/// Stands behind what is linear in a tangent or in gradients of the outputs: gradients of the
/// inputs, of the tables, and tangents. What it computes with them is the second derivative.
class SecondDerivative : public LockedNode {
 public:
  using LockedNode::LockedNode;

  void save(const AttentionArguments& a, const at::Tensor& output, const at::Tensor& logsumexp) {
    call_.save(a);
    output_ = SavedVariable(output, false);
    logsumexp_ = SavedVariable(logsumexp, false);
  }

 protected:
  SecondArguments arguments(std::vector<at::Tensor>& tensors, const at::Tensor& grad_output,
                            const at::Tensor& grad_logsumexp, const Tangents& tangents) const {
    const at::Tensor output = output_.unpack();
    return {{call_.unpack(tensors), grad_output.defined() ? grad_output : at::zeros_like(output),
             or_none(grad_logsumexp), output, logsumexp_.unpack()},
            tangents};
  }
  void release() override {
    call_.reset();
    output_.reset_data();
    logsumexp_.reset_data();
  }

 private:
  SavedCall call_;
  SavedVariable output_, logsumexp_;
};

/// Of gradients: inputs are grad_output, grad_logsumexp and those of the call.
class BackwardBackward final : public SecondDerivative {
 public:
  /// `of_tables`: of bias and gate rather than of query, key and value.
  BackwardBackward(edge_list&& next_edges, bool of_tables)
      : SecondDerivative(std::move(next_edges)), of_tables_(of_tables) {}
  std::string name() const override { return "SparseAttentionBackwardBackward"; }

  void save(const BackwardArguments& a) {
    SecondDerivative::save(a, a.output, a.logsumexp);
    grad_output_ = SavedVariable(a.grad_output, false);
    grad_logsumexp_.save(a.grad_logsumexp);
  }

 protected:
  variable_list gradients(const variable_list& grads) override {
    Tangents tangents;
    const OptionalTensor none;
    if (of_tables_) {
      tangents = {none, none, none, or_none(grads[0]), or_none(grads[1])};
    } else {
      tangents = {or_none(grads[0]), or_none(grads[1]), or_none(grads[2]), none, none};
    }
    std::vector<at::Tensor> tensors;
    const OptionalTensor grad_logsumexp = grad_logsumexp_.unpack();
    const SecondArguments a =
        arguments(tensors, grad_output_.unpack(), or_undefined(grad_logsumexp), tangents);
    auto [output, logsumexp, query, key, value, bias, gate] = second_op().call(a);
    if (!grad_logsumexp) logsumexp.reset();
    if (!a.bias) bias.reset();
    if (!a.gate) gate.reset();
    return {output, logsumexp, query, key, value, bias, gate};
  }
  void release() override {
    SecondDerivative::release();
    grad_output_.reset_data();
    grad_logsumexp_.reset();
  }

 private:
  const bool of_tables_;
  SavedVariable grad_output_;
  SavedOptional grad_logsumexp_;
};

/// Of tangents: inputs are those of the call, then their tangents, in which the op is linear.
class TangentBackward final : public SecondDerivative {
 public:
  using SecondDerivative::SecondDerivative;
  std::string name() const override { return "SparseAttentionTangentBackward"; }

  void save(const TangentArguments& a) {
    SecondDerivative::save(a, a.output, a.logsumexp);
    const Tangents& t = a.tangents;
    for (const OptionalTensor* tangent : {&t.query, &t.key, &t.value, &t.bias, &t.gate}) {
      tangents_.emplace_back();
      tangents_.back().save(*tangent);
    }
  }

 protected:
  variable_list gradients(const variable_list& grads) override {
    std::vector<at::Tensor> tensors;
    const SecondArguments a =
        arguments(tensors, grads[0], grads[1],
                  {tangents_[0].unpack(), tangents_[1].unpack(), tangents_[2].unpack(),
                   tangents_[3].unpack(), tangents_[4].unpack()});
    variable_list all(5);
    if (wants(0, 5)) {
      auto [output, logsumexp, query, key, value, bias, gate] = second_op().call(a);
      all = {query, key, value, a.bias ? bias : at::Tensor(), a.gate ? gate : at::Tensor()};
    }
    const variable_list of_tangents = input_gradients(a, wants(5, 8), wants(8, 10));
    all.insert(all.end(), of_tangents.begin(), of_tangents.end());
    return all;
  }
  void release() override {
    SecondDerivative::release();
    for (SavedOptional& tangent : tangents_) tangent.reset();
  }

 private:
  std::vector<SavedOptional> tangents_;
};

/// Stands behind second derivatives, whose own are not built: better an error than a wrong zero.
class NoThirdDerivative final : public Node {
 public:
  explicit NoThirdDerivative(edge_list&& next_edges) : Node(std::move(next_edges)) {}
  std::string name() const override { return "SparseAttentionThirdDerivative"; }
  variable_list apply(variable_list&&) override {
    TORCH_CHECK_NOT_IMPLEMENTED(false,
                                "sparse_attn: expected to differentiate attention at most twice, "
                                "got a third derivative");
  }
};

// ---- forward mode -------------------------------------------------------------------------------

OptionalTensor tangent_of(const at::Tensor& tensor) {
  return torch::autograd::isFwGradDefined(tensor) ? or_none(tensor._fw_grad(0)) : std::nullopt;
}
OptionalTensor tangent_of(const OptionalTensor& tensor) {
  return tensor ? tangent_of(*tensor) : std::nullopt;
}

Tangents tangents_of(const AttentionArguments& a) {
  return {tangent_of(a.query), tangent_of(a.key), tangent_of(a.value), tangent_of(a.bias),
          tangent_of(a.gate)};
}

/// Without its tangent.
at::Tensor primal_of(const at::Tensor& tensor) {
  return torch::autograd::isFwGradDefined(tensor) ? tensor._fw_primal(0) : tensor;
}
OptionalTensor primal_of(const OptionalTensor& tensor) {
  return tensor ? OptionalTensor(primal_of(*tensor)) : std::nullopt;
}
template <class Arguments>
Arguments primals_of(Arguments a) {
  for (at::Tensor* tensor : {&a.query, &a.key, &a.value}) *tensor = primal_of(*tensor);
  for (OptionalTensor* tensor : {&a.bias, &a.gate}) *tensor = primal_of(*tensor);
  return a;
}

void set_tangent(const at::Tensor& tensor, const at::Tensor& tangent) {
  if (tangent.defined()) tensor._set_fw_grad(tangent, /*level=*/0, /*is_inplace_op=*/false);
}

void check_no_tangent(const Tangents& t) {
  TORCH_CHECK_NOT_IMPLEMENTED(!t.any(),
                              "sparse_attn: expected to differentiate attention at most twice, "
                              "got a tangent of a second derivative");
}

/// The sum of two tensors of which either may not exist.
at::Tensor sum_of(const at::Tensor& a, const at::Tensor& b) {
  if (!a.defined()) return b;
  return b.defined() ? a + b : a;
}

/// How the gradients of an op change: with the inputs, by the second derivative, and with the
/// gradients of the outputs, in which they are linear.
template <class Backward>
variable_list backward_tangents(const BackwardArguments& a, const Backward& backward) {
  const Tangents t = tangents_of(a);
  const OptionalTensor grad_output = tangent_of(a.grad_output),
                       grad_logsumexp = tangent_of(a.grad_logsumexp);
  variable_list with_inputs(5), with_gradients(5);
  if (!t.any() && !grad_output && !grad_logsumexp) return with_inputs;
  BackwardArguments along = primals_of(a);
  along.grad_output = primal_of(a.grad_output);
  along.grad_logsumexp = primal_of(a.grad_logsumexp);
  along.output = primal_of(a.output);
  along.logsumexp = primal_of(a.logsumexp);
  if (t.any()) {
    auto [output, logsumexp, query, key, value, bias, gate] = second_op().call({along, t});
    with_inputs = {query, key, value, bias, gate};
  }
  if (grad_output || grad_logsumexp) {
    along.grad_output = grad_output ? *grad_output : at::zeros_like(a.grad_output);
    along.grad_logsumexp = grad_logsumexp;
    with_gradients = backward(along);
  }
  variable_list all;
  for (std::size_t i = 0; i < 5; ++i) all.push_back(sum_of(with_inputs[i], with_gradients[i]));
  return all;
}

// ---- kernels ------------------------------------------------------------------------------------

template <class Body>
auto below_autograd(const Body& body) {
  const at::AutoDispatchBelowADInplaceOrView guard;
  return body();
}

Outputs attention_autograd(c10::DispatchKeySet keys, const AttentionArguments& a) {
  if (a.sink) {
    check_attention(a);
    return with_sink(attention_op().call(without_sink(a)), *a.sink);
  }
  AttentionBackward* node = nullptr;
  NodePtr owner;
  with_inputs(a, [&](const auto&... inputs) {
    if (torch::autograd::compute_requires_grad(inputs...))
      std::tie(node, owner) =
          make_node<AttentionBackward>(torch::autograd::collect_next_edges(inputs...));
  });
  const Tangents tangents = tangents_of(a);
  const Outputs outputs = below_autograd(
      [&] { return attention_op().redispatch(keys & c10::after_autograd_keyset, a); });
  const auto& [output, logsumexp] = outputs;
  if (node) {
    torch::autograd::set_history(output, owner);
    torch::autograd::set_history(logsumexp, owner);
    node->save(a, outputs);
  }
  if (tangents.any()) {
    const auto [along_output, along_logsumexp] =
        tangent_op().call({primals_of(a), output, logsumexp, tangents});
    set_tangent(output, along_output);
    set_tangent(logsumexp, along_logsumexp);
  }
  return outputs;
}

/// Puts a node behind the gradients of a call.
template <class Results>
void set_second_derivative(const BackwardArguments& a, const Results& results, bool of_tables) {
  with_inputs(a, [&](const auto&... inputs) {
    const at::Tensor grad_logsumexp = or_undefined(a.grad_logsumexp);
    if (!torch::autograd::compute_requires_grad(a.grad_output, grad_logsumexp, inputs...)) return;
    const auto [node, owner] = make_node<BackwardBackward>(
        torch::autograd::collect_next_edges(a.grad_output, grad_logsumexp, inputs...), of_tables);
    node->save(a);
    std::apply([&, to = owner](const auto&... result) { (set_history(result, to), ...); }, results);
  });
}

Gradients backward_autograd(c10::DispatchKeySet keys, const BackwardArguments& a) {
  if (a.sink) return backward_op().call(over_keys(a));
  const Gradients gradients = below_autograd(
      [&] { return backward_op().redispatch(keys & c10::after_autograd_keyset, a); });
  set_second_derivative(a, gradients, false);
  const auto& [query, key, value] = gradients;
  const variable_list along = backward_tangents(
      a, [](const BackwardArguments& b) { return input_gradients(b, true, false); });
  set_tangent(query, along[0]);
  set_tangent(key, along[1]);
  set_tangent(value, along[2]);
  return gradients;
}

TableGradients table_backward_autograd(c10::DispatchKeySet keys, const BackwardArguments& a) {
  if (a.sink) return table_backward_op().call(over_keys(a));
  const TableGradients gradients = below_autograd(
      [&] { return table_backward_op().redispatch(keys & c10::after_autograd_keyset, a); });
  set_second_derivative(a, gradients, true);
  const auto& [bias, gate] = gradients;
  const variable_list along = backward_tangents(
      a, [](const BackwardArguments& b) { return input_gradients(b, false, true); });
  if (a.bias) set_tangent(bias, along[3]);
  if (a.gate) set_tangent(gate, along[4]);
  return gradients;
}

Outputs tangent_autograd(c10::DispatchKeySet keys, const TangentArguments& a) {
  const Tangents& t = a.tangents;
  check_no_tangent(tangents_of(a));
  check_no_tangent({tangent_of(t.query), tangent_of(t.key), tangent_of(t.value), tangent_of(t.bias),
                    tangent_of(t.gate)});
  const Outputs outputs =
      below_autograd([&] { return tangent_op().redispatch(keys & c10::after_autograd_keyset, a); });
  with_inputs(a, [&](const auto&... inputs) {
    const auto with_all = [&](const auto& body) {
      return body(inputs..., or_undefined(t.query), or_undefined(t.key), or_undefined(t.value),
                  or_undefined(t.bias), or_undefined(t.gate));
    };
    with_all([&](const auto&... all) {
      if (!torch::autograd::compute_requires_grad(all...)) return;
      const auto [node, owner] =
          make_node<TangentBackward>(torch::autograd::collect_next_edges(all...));
      node->save(a);
      torch::autograd::set_history(std::get<0>(outputs), owner);
      torch::autograd::set_history(std::get<1>(outputs), owner);
    });
  });
  return outputs;
}

SecondGradients second_autograd(c10::DispatchKeySet keys, const SecondArguments& a) {
  check_no_tangent(tangents_of(a));
  const SecondGradients gradients =
      below_autograd([&] { return second_op().redispatch(keys & c10::after_autograd_keyset, a); });
  with_inputs(a, [&](const auto&... inputs) {
    const Tangents& t = a.tangents;
    const at::Tensor grad_logsumexp = or_undefined(a.grad_logsumexp);
    const auto with_all = [&](const auto& body) {
      return body(inputs..., a.grad_output, grad_logsumexp, or_undefined(t.query),
                  or_undefined(t.key), or_undefined(t.value), or_undefined(t.bias),
                  or_undefined(t.gate));
    };
    with_all([&](const auto&... all) {
      if (!torch::autograd::compute_requires_grad(all...)) return;
      const auto [node, owner] =
          make_node<NoThirdDerivative>(torch::autograd::collect_next_edges(all...));
      std::apply([&, to = owner](const auto&... result) { (set_history(result, to), ...); },
                 gradients);
    });
  });
  return gradients;
}

}  // namespace

TORCH_LIBRARY_IMPL(sparse_attn, Autograd, m) {
  m.impl("attention", TORCH_FN(AttentionOp::kernel<attention_autograd>));
  m.impl("attention_backward", TORCH_FN(BackwardOp::kernel<backward_autograd>));
  m.impl("attention_table_backward", TORCH_FN(TableBackwardOp::kernel<table_backward_autograd>));
  m.impl("attention_tangent", TORCH_FN(TangentOp::kernel<tangent_autograd>));
  m.impl("attention_backward_backward", TORCH_FN(SecondOp::kernel<second_autograd>));
}

}  // namespace sparse_attn
