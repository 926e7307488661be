// Differentiation, as ATen's own kernels do it: a Node with saved variables at the Autograd key.
// (torch::autograd::Function would refuse the transforms of torch.func.)
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/library.h>

#include <mutex>
#include <utility>

#include "ops/checks.h"
#include "ops/node.h"

namespace sparse_attn {
namespace {

using torch::autograd::edge_list;
using torch::autograd::Node;
using torch::autograd::SavedVariable;
using torch::autograd::variable_list;

class AttentionBackward final : public Node {
 public:
  explicit AttentionBackward(edge_list&& next_edges) : Node(std::move(next_edges)) {}

  std::string name() const override { return "SparseAttentionBackward"; }

  void save_inputs(const AttentionArguments& a) {
    query_ = SavedVariable(a.query, false);
    key_ = SavedVariable(a.key, false);
    value_ = SavedVariable(a.value, false);
    has_padding_ = a.key_padding_mask.has_value();
    has_globals_ = a.global_mask.has_value();
    if (has_padding_) key_padding_mask_ = SavedVariable(*a.key_padding_mask, false);
    if (has_globals_) global_mask_ = SavedVariable(*a.global_mask, false);
    pattern_ = a.pattern.vec();
    for (const at::Tensor& tensor : a.pattern_tensors.value_or(at::ArrayRef<at::Tensor>()))
      pattern_tensors_.emplace_back(tensor, false);
    scale_ = a.scale;
    enable_gqa_ = a.enable_gqa;
  }

  void save_outputs(const Outputs& outputs) {
    output_ = SavedVariable(std::get<0>(outputs), true);
    logsumexp_ = SavedVariable(std::get<1>(outputs), true);
  }

  variable_list apply(variable_list&& grads) override {
    const std::lock_guard<std::mutex> lock(mutex_);
    const at::Tensor &grad_output = grads[0], &grad_logsumexp = grads[1];
    if (!grad_output.defined() && !grad_logsumexp.defined()) return variable_list(3);
    const at::Tensor output = output_.unpack(getptr());
    std::vector<at::Tensor> pattern_tensors;
    for (const SavedVariable& saved : pattern_tensors_) pattern_tensors.push_back(saved.unpack());
    const Gradients made = call_backward({
        grad_output.defined() ? grad_output : at::zeros_like(output),
        grad_logsumexp.defined() ? OptionalTensor(grad_logsumexp) : std::nullopt,
        query_.unpack(),
        key_.unpack(),
        value_.unpack(),
        output,
        logsumexp_.unpack(getptr()),
        pattern_,
        at::ArrayRef<at::Tensor>(pattern_tensors),
        has_padding_ ? OptionalTensor(key_padding_mask_.unpack()) : std::nullopt,
        has_globals_ ? OptionalTensor(global_mask_.unpack()) : std::nullopt,
        scale_,
        enable_gqa_,
    });
    return {std::get<0>(made), std::get<1>(made), std::get<2>(made)};
  }

  void release_variables() override {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (SavedVariable* saved :
         {&query_, &key_, &value_, &output_, &logsumexp_, &key_padding_mask_, &global_mask_}) {
      saved->reset_data();
    }
    for (SavedVariable& saved : pattern_tensors_) saved.reset_data();
  }

 private:
  SavedVariable query_, key_, value_, output_, logsumexp_, key_padding_mask_, global_mask_;
  bool has_padding_ = false, has_globals_ = false, enable_gqa_ = false;
  std::vector<std::int64_t> pattern_;
  std::vector<SavedVariable> pattern_tensors_;
  std::optional<double> scale_;
};

/// Stands behind gradients, whose own derivatives are not built yet: better an error than a wrong
/// zero.
class NoSecondDerivative final : public Node {
 public:
  explicit NoSecondDerivative(edge_list&& next_edges) : Node(std::move(next_edges)) {}
  std::string name() const override { return "SparseAttentionBackwardBackward"; }
  variable_list apply(variable_list&&) override {
    TORCH_CHECK_NOT_IMPLEMENTED(false,
                                "sparse_attn: expected at most one backward pass (the second "
                                "derivative is not built yet), got a "
                                "backward pass through gradients");
  }
};

template <class... Tensors>
void check_no_tangent(const Tensors&... tensors) {
  TORCH_CHECK_NOT_IMPLEMENTED(
      (... && !torch::autograd::isFwGradDefined(tensors)),
      "sparse_attn: expected no tangent (forward-mode differentiation is not built yet), got one");
}

Outputs attention_autograd(c10::DispatchKeySet keys, const AttentionArguments& a) {
  check_built(a);  // the node below knows of no other arguments
  check_no_tangent(a.query, a.key, a.value);
  AttentionBackward* node = nullptr;
  NodePtr owner;
  if (torch::autograd::compute_requires_grad(a.query, a.key, a.value)) {
    std::tie(node, owner) =
        make_node<AttentionBackward>(torch::autograd::collect_next_edges(a.query, a.key, a.value));
    node->save_inputs(a);
  }
  Outputs outputs = [&] {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    return redispatch_attention(keys & c10::after_autograd_keyset, a);
  }();
  if (node) {
    torch::autograd::set_history(std::get<0>(outputs), owner);
    torch::autograd::set_history(std::get<1>(outputs), owner);
    node->save_outputs(outputs);
  }
  return outputs;
}

Gradients backward_autograd(c10::DispatchKeySet keys, const BackwardArguments& a) {
  check_no_tangent(a.grad_output, a.grad_logsumexp, a.query, a.key, a.value);
  NodePtr owner;
  const at::Tensor grad_logsumexp = a.grad_logsumexp.value_or(at::Tensor());
  if (torch::autograd::compute_requires_grad(a.grad_output, grad_logsumexp, a.query, a.key,
                                             a.value)) {
    owner =
        make_node<NoSecondDerivative>(torch::autograd::collect_next_edges(
                                          a.grad_output, grad_logsumexp, a.query, a.key, a.value))
            .second;
  }
  Gradients gradients = [&] {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    return redispatch_backward(keys & c10::after_autograd_keyset, a);
  }();
  if (owner) {
    torch::autograd::set_history(std::get<0>(gradients), owner);
    torch::autograd::set_history(std::get<1>(gradients), owner);
    torch::autograd::set_history(std::get<2>(gradients), owner);
  }
  return gradients;
}

}  // namespace

TORCH_LIBRARY_IMPL(sparse_attn, Autograd, m) {
  m.impl("attention", TORCH_FN(attention_kernel<attention_autograd>));
  m.impl("attention_backward", TORCH_FN(backward_kernel<backward_autograd>));
}

}  // namespace sparse_attn
