// Derivatives of the ops of listed pairs, of any order: a form that is linear in each of three
// factors.
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/library.h>

#include <mutex>
#include <utility>

#include "ops/node.h"
#include "ops/pairs.h"

namespace sparse_attn {
namespace {

using torch::autograd::edge_list;
using torch::autograd::Node;
using torch::autograd::SavedVariable;
using torch::autograd::variable_list;

/// The factors that an op is given, in the order of its schema.
std::pair<Factor, Factor> inputs_of(Factor made) {
  return {made == Factor::kValues ? Factor::kRows : Factor::kValues,
          made == Factor::kColumns ? Factor::kRows : Factor::kColumns};
}

class PairsBackward final : public Node {
 public:
  explicit PairsBackward(edge_list&& next_edges) : Node(std::move(next_edges)) {}

  std::string name() const override { return "SparsePairsBackward"; }

  void save(Factor made, Factors given, const PairIndices& pairs) {
    made_ = made;
    const auto [first, second] = inputs_of(made);
    first_ = SavedVariable(given[first], false);
    second_ = SavedVariable(given[second], false);
    crow_ = SavedVariable(pairs.crow, false);
    col_ = SavedVariable(pairs.col, false);
    heads_kv_ = pairs.heads_kv;
    n_k_ = pairs.n_k;
  }

  variable_list apply(variable_list&& grads) override {
    const std::lock_guard<std::mutex> lock(mutex_);
    variable_list gradients(2);
    if (!grads[0].defined()) return gradients;
    const auto [first, second] = inputs_of(made_);
    Factors factors;
    factors[made_] = grads[0];
    factors[first] = first_.unpack();
    factors[second] = second_.unpack();
    const PairIndices pairs{crow_.unpack(), col_.unpack(), heads_kv_, n_k_};
    if (task_should_compute_output(0)) gradients[0] = call_pairs(first, factors, pairs);
    if (task_should_compute_output(1)) gradients[1] = call_pairs(second, factors, pairs);
    return gradients;
  }

  void release_variables() override {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (SavedVariable* saved : {&first_, &second_, &crow_, &col_}) saved->reset_data();
  }

 private:
  Factor made_ = Factor::kValues;
  SavedVariable first_, second_, crow_, col_;
  c10::SymInt heads_kv_, n_k_;
};

/// The op with one factor replaced by its tangent, for each that has one; undefined if none has.
at::Tensor tangent_of(Factor made, const Factors& given, const PairIndices& pairs) {
  const auto [first, second] = inputs_of(made);
  at::Tensor sum;
  for (const Factor factor : {first, second}) {
    Factors factors = given;
    if (!torch::autograd::isFwGradDefined(factors[factor])) continue;
    const at::Tensor tangent = factors[factor]._fw_grad(0);
    for (const Factor other : {first, second}) factors[other] = factors[other]._fw_primal(0);
    factors[factor] = tangent;
    const at::Tensor part = call_pairs(made, factors, pairs);
    sum = sum.defined() ? sum + part : part;
  }
  return sum;
}

at::Tensor pairs_autograd(c10::DispatchKeySet keys, Factor made, const Factors& given,
                          const PairIndices& pairs) {
  const auto [first, second] = inputs_of(made);
  Factors factors = given;
  const at::Tensor &a = factors[first], &b = factors[second];
  PairsBackward* node = nullptr;
  NodePtr owner;
  if (torch::autograd::compute_requires_grad(a, b)) {
    std::tie(node, owner) = make_node<PairsBackward>(torch::autograd::collect_next_edges(a, b));
    node->save(made, given, pairs);
  }
  at::Tensor result = [&] {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    return redispatch_pairs(keys & c10::after_autograd_keyset, made, given, pairs);
  }();
  if (node) torch::autograd::set_history(result, owner);
  const at::Tensor tangent = tangent_of(made, given, pairs);
  if (tangent.defined()) result._set_fw_grad(tangent, 0, false);
  return result;
}

}  // namespace

TORCH_LIBRARY_IMPL(sparse_attn, Autograd, m) { implement_pairs<pairs_autograd>(m); }

}  // namespace sparse_attn
