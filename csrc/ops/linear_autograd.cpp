// Derivatives of the ops of linear attention, of any order, and along a tangent.
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/library.h>

#include <cmath>
#include <mutex>
#include <utility>

#include "ops/linear.h"
#include "ops/node.h"

namespace sparse_attn {
namespace {

using torch::autograd::edge_list;
using torch::autograd::isFwGradDefined;
using torch::autograd::Node;
using torch::autograd::SavedVariable;
using torch::autograd::variable_list;

at::Tensor multiply(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                    bool reverse) {
  return causal_products_op().call(query, key, value, reverse);
}

/// Sum of both, either of which may be undefined.
at::Tensor joined(const at::Tensor& a, const at::Tensor& b) {
  return !a.defined() ? b : !b.defined() ? a : a + b;
}

at::Tensor tangent(const at::Tensor& x) { return x._fw_grad(0); }
at::Tensor primal(const at::Tensor& x) { return x._fw_primal(0); }

class CausalProductsBackward final : public Node {
 public:
  explicit CausalProductsBackward(edge_list&& next_edges) : Node(std::move(next_edges)) {}

  std::string name() const override { return "CausalProductsBackward"; }

  void save(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value, bool reverse) {
    query_ = SavedVariable(query, false);
    key_ = SavedVariable(key, false);
    value_ = SavedVariable(value, false);
    reverse_ = reverse;
  }

  variable_list apply(variable_list&& grads) override {
    const std::lock_guard<std::mutex> lock(mutex_);
    variable_list gradients(3);
    const at::Tensor& grad = grads[0];
    if (!grad.defined()) return gradients;
    const at::Tensor query = query_.unpack(), key = key_.unpack(), value = value_.unpack();
    // A query gets from the keys that it sees, a key from the queries that see it.
    if (task_should_compute_output(0)) gradients[0] = multiply(grad, value, key, reverse_);
    if (task_should_compute_output(1)) gradients[1] = multiply(value, grad, query, !reverse_);
    if (task_should_compute_output(2)) gradients[2] = multiply(key, query, grad, !reverse_);
    return gradients;
  }

  void release_variables() override {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (SavedVariable* saved : {&query_, &key_, &value_}) saved->reset_data();
  }

 private:
  SavedVariable query_, key_, value_;
  bool reverse_ = false;
};

at::Tensor products_autograd(c10::DispatchKeySet keys, const at::Tensor& query,
                             const at::Tensor& key, const at::Tensor& value, bool reverse) {
  CausalProductsBackward* node = nullptr;
  NodePtr owner;
  if (torch::autograd::compute_requires_grad(query, key, value)) {
    std::tie(node, owner) =
        make_node<CausalProductsBackward>(torch::autograd::collect_next_edges(query, key, value));
    node->save(query, key, value, reverse);
  }
  const at::Tensor result = [&] {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    return causal_products_op().redispatch(keys & c10::after_autograd_keyset, query, key, value,
                                           reverse);
  }();
  if (node) torch::autograd::set_history(result, owner);
  at::Tensor along;
  const at::Tensor factors[3] = {query, key, value};
  for (int i = 0; i < 3; ++i) {
    if (!isFwGradDefined(factors[i])) continue;
    const auto factor = [&](int j) { return i == j ? tangent(factors[j]) : primal(factors[j]); };
    along = joined(along, multiply(factor(0), factor(1), factor(2), reverse));
  }
  if (along.defined()) result._set_fw_grad(along, 0, false);
  return result;
}

at::Tensor outer_sums(const at::Tensor& key, const at::Tensor& value) {
  return outer_sums_op().call(key, value);
}
at::Tensor sum_products(const at::Tensor& query, const at::Tensor& sums) {
  return sum_products_op().call(query, sums);
}

/// Of outer_sums and sum_products, each of which is the other's derivative.
class BilinearBackward final : public Node {
 public:
  explicit BilinearBackward(edge_list&& next_edges) : Node(std::move(next_edges)) {}

  std::string name() const override { return "OuterSumsBackward"; }

  void save(bool of_sums, const at::Tensor& first, const at::Tensor& second) {
    of_sums_ = of_sums;
    first_ = SavedVariable(first, false);
    second_ = SavedVariable(second, false);
  }

  variable_list apply(variable_list&& grads) override {
    const std::lock_guard<std::mutex> lock(mutex_);
    variable_list gradients(2);
    const at::Tensor& grad = grads[0];
    if (!grad.defined()) return gradients;
    const at::Tensor first = first_.unpack(), second = second_.unpack();
    if (task_should_compute_output(0)) {
      gradients[0] = of_sums_ ? sum_products(second, grad.mT()) : sum_products(grad, second.mT());
    }
    if (task_should_compute_output(1)) {
      gradients[1] = of_sums_ ? sum_products(first, grad) : outer_sums(first, grad);
    }
    return gradients;
  }

  void release_variables() override {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (SavedVariable* saved : {&first_, &second_}) saved->reset_data();
  }

 private:
  bool of_sums_ = false;
  SavedVariable first_, second_;
};

template <bool kOfSums>
at::Tensor bilinear_autograd(c10::DispatchKeySet keys, const at::Tensor& first,
                             const at::Tensor& second) {
  const auto op = kOfSums ? outer_sums_op() : sum_products_op();
  BilinearBackward* node = nullptr;
  NodePtr owner;
  if (torch::autograd::compute_requires_grad(first, second)) {
    std::tie(node, owner) =
        make_node<BilinearBackward>(torch::autograd::collect_next_edges(first, second));
    node->save(kOfSums, first, second);
  }
  const at::Tensor result = [&] {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    return op.redispatch(keys & c10::after_autograd_keyset, first, second);
  }();
  if (node) torch::autograd::set_history(result, owner);
  at::Tensor along;
  if (isFwGradDefined(first)) along = op.call(tangent(first), primal(second));
  if (isFwGradDefined(second)) along = joined(along, op.call(primal(first), tangent(second)));
  if (along.defined()) result._set_fw_grad(along, 0, false);
  return result;
}

/// What is known of a call of positive_features after it.
struct FeatureCall {
  at::Tensor input, projection, maximum, constant, index;
  FeatureOptions options;

  bool running() const { return options.reference == Reference::kRunning; }
  at::Tensor scaled_projection() const { return projection * std::sqrt(options.scale); }

  /// Of numbers for each product of a head, that of the row's reference; 0 if it has none.
  at::Tensor at_references(const at::Tensor& products) const {
    return products.flatten(2).gather(2, index.clamp_min(0)).masked_fill(index < 0, 0);
  }
  /// The opposite: adds what rows have to products.
  at::Tensor add_at_references(const at::Tensor& products, const at::Tensor& rows) const {
    return products.flatten(2)
        .scatter_add(2, index.clamp_min(0), rows.masked_fill(index < 0, 0))
        .view_symint(products.sym_sizes());
  }

  /// The features without eps, differentiable; the constant of a running maximum is none.
  at::Tensor exponentials() const {
    const at::Tensor products = feature_products(input, projection, options.scale);
    const at::Tensor norms = input.square().sum(-1) * (options.scale / 2);
    const at::Tensor shift = norms + (running() ? constant.unsqueeze(-1) : at_references(products));
    const at::Tensor x =
        (products - shift.unsqueeze(-1)).exp() * feature_factor(projection.sym_size(-2));
    if (!options.padding) return x;
    return x.masked_fill(options.padding->unsqueeze(1).unsqueeze(-1), 0);
  }
};

/// Gradients of the products and of -scale |input|^2 / 2, differentiable, from the features without
/// eps and the gradients of features, sums and maximum.
std::pair<at::Tensor, at::Tensor> differentiable_gradients(const FeatureCall& call,
                                                           const at::Tensor& exponentials,
                                                           const variable_list& grads) {
  at::Tensor products;
  if (grads[0].defined()) products = exponentials * grads[0];
  if (grads[1].defined()) products = joined(products, exponentials * grads[1].unsqueeze(-1));
  if (!products.defined()) products = at::zeros_like(exponentials);
  const at::Tensor norms = products.sum(-1);
  at::Tensor references = grads[2];
  if (!call.running()) references = joined(references, -norms);
  if (references.defined()) products = call.add_at_references(products, references);
  return {products, norms};
}

/// Those of input and projection.
at::Tensor input_gradient(const FeatureCall& call, const at::Tensor& products,
                          const at::Tensor& norms) {
  return at::matmul(products, call.scaled_projection()) -
         call.input * (norms * call.options.scale).unsqueeze(-1);
}
at::Tensor projection_gradient(const FeatureCall& call, const at::Tensor& products) {
  const at::Tensor sum = outer_sums(products, call.input).sum(0) * std::sqrt(call.options.scale);
  return call.projection.dim() == 2 ? sum.sum(0) : sum;
}

class PositiveFeaturesBackwardNode final : public Node {
 public:
  explicit PositiveFeaturesBackwardNode(edge_list&& next_edges) : Node(std::move(next_edges)) {}

  std::string name() const override { return "PositiveFeaturesBackward"; }

  void save(const FeatureCall& call) {
    input_ = SavedVariable(call.input, false);
    projection_ = SavedVariable(call.projection, false);
    options_ = call.options;
    if (options_.padding) padding_ = SavedVariable(*options_.padding, false);
    options_.padding.reset();
  }
  void save_results(const at::Tensor& features, const at::Tensor& constant,
                    const at::Tensor& index) {
    // Without history, which would be a cycle: higher derivatives compute the features again.
    features_ = SavedVariable(features.detach(), false);
    constant_ = SavedVariable(constant, false);
    index_ = SavedVariable(index, false);
  }

  variable_list apply(variable_list&& grads) override {
    const std::lock_guard<std::mutex> lock(mutex_);
    variable_list gradients(2);
    if (!grads[0].defined() && !grads[1].defined() && !grads[2].defined()) return gradients;
    FeatureCall call{input_.unpack(),    projection_.unpack(), {},
                     constant_.unpack(), index_.unpack(),      options_};
    const at::Tensor padding = padding_.unpack();
    if (padding.defined()) call.options.padding = padding;
    const auto [products, norms] = at::GradMode::is_enabled()
                                       ? differentiable_gradients(call, call.exponentials(), grads)
                                       : fused(call, grads);
    if (task_should_compute_output(0)) gradients[0] = input_gradient(call, products, norms);
    if (task_should_compute_output(1)) gradients[1] = projection_gradient(call, products);
    return gradients;
  }

  void release_variables() override {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (SavedVariable* saved :
         {&input_, &projection_, &padding_, &features_, &constant_, &index_}) {
      saved->reset_data();
    }
  }

 private:
  std::pair<at::Tensor, at::Tensor> fused(const FeatureCall& call, const variable_list& grads) {
    const auto given = [](const at::Tensor& x) {
      return x.defined() ? std::optional<at::Tensor>(x) : std::nullopt;
    };
    const at::Tensor features = features_.unpack();
    const auto [products, norms] = positive_features_backward_op().call(
        grads[0].defined() ? grads[0] : at::zeros_like(features), given(grads[1]), given(grads[2]),
        features, call.index, call.options.padding, static_cast<std::int64_t>(options_.reference),
        options_.eps);
    return {products, norms};
  }

  SavedVariable input_, projection_, padding_, features_, constant_, index_;
  FeatureOptions options_{};
};

/// The derivatives of features, sums and maximum along the tangents of input and projection.
void set_feature_tangents(const FeatureCall& call, const FeatureOutputs& outputs) {
  FeatureCall at_point = call;
  at_point.input = primal(call.input);
  at_point.projection = primal(call.projection);
  at::Tensor products, norms;
  if (isFwGradDefined(call.input)) {
    const at::Tensor input = tangent(call.input);
    products = feature_products(input, at_point.projection, call.options.scale);
    norms = (at_point.input * input).sum(-1, true) * call.options.scale;
  }
  if (isFwGradDefined(call.projection)) {
    products = joined(
        products, feature_products(at_point.input, tangent(call.projection), call.options.scale));
  }
  const at::Tensor reference = call.at_references(products);
  at::Tensor exponent = norms.defined() ? products - norms : products;
  if (!call.running()) exponent = exponent - reference.unsqueeze(-1);
  const at::Tensor features = at_point.exponentials() * exponent;
  std::get<0>(outputs)._set_fw_grad(features, 0, false);
  std::get<1>(outputs)._set_fw_grad(features.sum(-1), 0, false);
  std::get<2>(outputs)._set_fw_grad(reference, 0, false);
}

FeatureOutputs features_autograd(c10::DispatchKeySet keys, const at::Tensor& input,
                                 const at::Tensor& projection,
                                 const std::optional<at::Tensor>& padding, std::int64_t reference,
                                 double scale, double eps) {
  FeatureCall call{input, projection, {},
                   {},    {},         {padding, static_cast<Reference>(reference), scale, eps}};
  PositiveFeaturesBackwardNode* node = nullptr;
  NodePtr owner;
  if (torch::autograd::compute_requires_grad(input, projection)) {
    std::tie(node, owner) = make_node<PositiveFeaturesBackwardNode>(
        torch::autograd::collect_next_edges(input, projection));
    node->save(call);
  }
  const FeatureOutputs outputs = [&] {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    return positive_features_op().redispatch(keys & c10::after_autograd_keyset, input, projection,
                                             padding, reference, scale, eps);
  }();
  std::tie(std::ignore, std::ignore, call.maximum, call.constant, call.index) = outputs;
  if (node) {
    node->save_results(std::get<0>(outputs), call.constant, call.index);
    for (const at::Tensor& output : {std::get<0>(outputs), std::get<1>(outputs), call.maximum}) {
      torch::autograd::set_history(output, owner);
    }
  }
  if (isFwGradDefined(input) || isFwGradDefined(projection)) set_feature_tangents(call, outputs);
  return outputs;
}

at::Tensor multiply(const FeatureProduct& call, const at::Tensor& features) {
  return call.transposed ? outer_sums(features, call.other) : sum_products(features, call.other);
}

class FeatureProductsBackwardNode final : public Node {
 public:
  explicit FeatureProductsBackwardNode(edge_list&& next_edges) : Node(std::move(next_edges)) {}

  std::string name() const override { return "FeatureProductsBackward"; }

  void save(const FeatureProduct& call) {
    input_ = SavedVariable(call.input, false);
    projection_ = SavedVariable(call.projection, false);
    other_ = SavedVariable(call.other, false);
    if (call.padding) padding_ = SavedVariable(*call.padding, false);
    transposed_ = call.transposed;
    scale_ = call.scale;
    eps_ = call.eps;
  }
  void save_results(const at::Tensor& maximum, const at::Tensor& index) {
    maximum_ = SavedVariable(maximum, false);
    index_ = SavedVariable(index, false);
  }

  variable_list apply(variable_list&& grads) override {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (!grads[0].defined()) return variable_list(3);
    FeatureProduct call{input_.unpack(),
                        projection_.unpack(),
                        other_.unpack(),
                        std::nullopt,
                        transposed_,
                        scale_,
                        eps_};
    const at::Tensor padding = padding_.unpack();
    if (padding.defined()) call.padding = padding;
    const std::array<bool, 3> wanted{task_should_compute_output(0), task_should_compute_output(1),
                                     task_should_compute_output(2)};
    if (at::GradMode::is_enabled()) return differentiable(call, index_.unpack(), grads[0], wanted);
    const auto [input, projection, other] = feature_products_backward_op().call(
        grads[0], call.input, call.projection, call.other, maximum_.unpack(), index_.unpack(),
        call.padding, transposed_, scale_, eps_, wanted);
    return {wanted[0] ? input : at::Tensor(), wanted[1] ? projection : at::Tensor(),
            wanted[2] ? other : at::Tensor()};
  }

  void release_variables() override {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (SavedVariable* saved : {&input_, &projection_, &other_, &padding_, &maximum_, &index_})
      saved->reset_data();
  }

 private:
  /// With the features kept.
  static variable_list differentiable(const FeatureProduct& product, const at::Tensor& index,
                                      const at::Tensor& grad, std::array<bool, 3> wanted) {
    const FeatureCall call{product.input, product.projection, {}, {}, index, product.options()};
    const at::Tensor x = call.exponentials();
    at::Tensor features = x + product.eps * feature_factor(call.projection.sym_size(-2));
    if (product.padding)
      features = features.masked_fill(product.padding->unsqueeze(1).unsqueeze(-1), 0);
    variable_list gradients(3);
    if (wanted[2]) {
      gradients[2] = product.transposed ? sum_products(features, grad) : outer_sums(features, grad);
    }
    const at::Tensor of_features = product.transposed ? sum_products(product.other, grad.mT())
                                                      : sum_products(grad, product.other.mT());
    const auto [products, norms] =
        differentiable_gradients(call, x, {of_features, at::Tensor(), at::Tensor()});
    if (wanted[0]) gradients[0] = input_gradient(call, products, norms);
    if (wanted[1]) gradients[1] = projection_gradient(call, products);
    return gradients;
  }

  SavedVariable input_, projection_, other_, padding_, maximum_, index_;
  bool transposed_ = false;
  double scale_ = 1.0, eps_ = 0.0;
};

ProductOutputs feature_products_autograd(c10::DispatchKeySet keys, const at::Tensor& input,
                                         const at::Tensor& projection, const at::Tensor& other,
                                         const std::optional<at::Tensor>& padding, bool transposed,
                                         double scale, double eps) {
  const FeatureProduct call{input, projection, other, padding, transposed, scale, eps};
  if (isFwGradDefined(input) || isFwGradDefined(projection) || isFwGradDefined(other)) {
    const FeatureOutputs made = features_of(call);
    return {multiply(call, std::get<0>(made)), std::get<2>(made), std::get<4>(made)};
  }
  FeatureProductsBackwardNode* node = nullptr;
  NodePtr owner;
  if (torch::autograd::compute_requires_grad(input, projection, other)) {
    std::tie(node, owner) = make_node<FeatureProductsBackwardNode>(
        torch::autograd::collect_next_edges(input, projection, other));
    node->save(call);
  }
  const ProductOutputs outputs = [&] {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    return feature_products_op().redispatch(keys & c10::after_autograd_keyset, input, projection,
                                            other, padding, transposed, scale, eps);
  }();
  if (node) {
    node->save_results(std::get<1>(outputs), std::get<2>(outputs));
    torch::autograd::set_history(std::get<0>(outputs), owner);
  }
  return outputs;
}

}  // namespace

TORCH_LIBRARY_IMPL(sparse_attn, Autograd, m) {
  m.impl("causal_products", TORCH_FN(products_autograd));
  m.impl("positive_features", TORCH_FN(features_autograd));
  m.impl("outer_sums", TORCH_FN(bilinear_autograd<true>));
  m.impl("sum_products", TORCH_FN(bilinear_autograd<false>));
  m.impl("feature_products", TORCH_FN(feature_products_autograd));
}

}  // namespace sparse_attn
