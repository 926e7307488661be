// The ops of linear attention: schemas, checks, shapes without data.
#include "ops/linear.h"

#include <ATen/ATen.h>
#include <torch/library.h>

#include <cmath>

#include "ops/checks.h"

namespace sparse_attn {
namespace {

template <class Function>
c10::TypedOperatorHandle<Function> find(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Function>();
}

void check_tensor(const char* name, const at::Tensor& tensor, const at::Tensor& like) {
  TORCH_CHECK_TYPE(tensor.layout() == at::kStrided && !tensor.is_nested(), "sparse_attn: expected ",
                   name, " to be a dense tensor, got layout ", tensor.layout());
  TORCH_CHECK_TYPE(tensor.scalar_type() == like.scalar_type(), "sparse_attn: expected ", name,
                   " of dtype ", like.scalar_type(), ", got ", tensor.scalar_type());
  TORCH_CHECK_VALUE(tensor.device() == like.device(), "sparse_attn: expected ", name, " on device ",
                    like.device(), ", got ", tensor.device());
}

void check_heads_tensor(const char* name, const at::Tensor& tensor, const at::Tensor& like) {
  check_tensor(name, tensor, like);
  TORCH_CHECK_VALUE(tensor.dim() == 4, "sparse_attn: expected ", name,
                    " of shape (batch, heads, length, size), got shape ", tensor.sym_sizes());
}

void check_size(const char* name, const at::Tensor& tensor, std::int64_t dim,
                const c10::SymInt& expected, const char* of) {
  TORCH_CHECK_VALUE(tensor.sym_size(dim) == expected, "sparse_attn: expected ", name, " with ", of,
                    " of ", expected, " in dimension ", dim, ", got shape ", tensor.sym_sizes());
}

at::Tensor products_meta(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                         bool /*reverse*/) {
  check_causal_products(query, key, value);
  return empty_causal_products(query, value);
}

at::Tensor sums_meta(const at::Tensor& key, const at::Tensor& value) {
  check_outer_sums(key, value);
  return empty_outer_sums(key, value);
}

/// Each number is a sum within one row: library products keep its order.
at::Tensor sum_products(const at::Tensor& query, const at::Tensor& sums) {
  return at::matmul(query, sums);
}

FeatureOutputs features_meta(const at::Tensor& input, const at::Tensor& projection,
                             const std::optional<at::Tensor>& padding, std::int64_t reference,
                             double scale, double eps) {
  check_features(input, projection, {padding, static_cast<Reference>(reference), scale, eps});
  auto sizes = input.sym_sizes().vec();
  sizes[3] = projection.sym_size(-2);
  const at::Tensor features = at::empty_symint(sizes, input.options());
  sizes.pop_back();
  const at::Tensor rows = at::empty_symint(sizes, input.options());
  const at::Tensor index = at::empty_symint(sizes, input.options().dtype(at::kLong));
  sizes.pop_back();
  return {features, rows, at::empty_like(rows), at::empty_symint(sizes, input.options()), index};
}

FeatureGradients features_backward_meta(const at::Tensor&, const std::optional<at::Tensor>&,
                                        const std::optional<at::Tensor>&,
                                        const at::Tensor& features, const at::Tensor& index,
                                        const std::optional<at::Tensor>&, std::int64_t, double) {
  return {at::empty_symint(features.sym_sizes(), features.options()),
          at::empty_symint(index.sym_sizes(), features.options())};
}

}  // namespace

c10::TypedOperatorHandle<CausalProducts> causal_products_op() {
  static const auto op = find<CausalProducts>("sparse_attn::causal_products");
  return op;
}

c10::TypedOperatorHandle<OuterSums> outer_sums_op() {
  static const auto op = find<OuterSums>("sparse_attn::outer_sums");
  return op;
}

c10::TypedOperatorHandle<SumProducts> sum_products_op() {
  static const auto op = find<SumProducts>("sparse_attn::sum_products");
  return op;
}

c10::TypedOperatorHandle<FeatureProducts> feature_products_op() {
  static const auto op = find<FeatureProducts>("sparse_attn::feature_products");
  return op;
}

c10::TypedOperatorHandle<FeatureProductsBackward> feature_products_backward_op() {
  static const auto op = find<FeatureProductsBackward>("sparse_attn::feature_products_backward");
  return op;
}

c10::TypedOperatorHandle<PositiveFeatures> positive_features_op() {
  static const auto op = find<PositiveFeatures>("sparse_attn::positive_features");
  return op;
}

c10::TypedOperatorHandle<PositiveFeaturesBackward> positive_features_backward_op() {
  static const auto op = find<PositiveFeaturesBackward>("sparse_attn::positive_features_backward");
  return op;
}

void check_causal_products(const at::Tensor& query, const at::Tensor& key,
                           const at::Tensor& value) {
  const auto type = query.scalar_type();
  TORCH_CHECK_TYPE(
      type == at::kDouble || type == at::kFloat || type == at::kBFloat16 || type == at::kHalf,
      "sparse_attn: expected query of dtype float64, float32, bfloat16 or float16, got ", type);
  check_heads_tensor("query", query, query);
  check_heads_tensor("key", key, query);
  check_heads_tensor("value", value, query);
  for (const auto& [name, tensor] :
       {std::pair<const char*, const at::Tensor&>{"key", key}, {"value", value}}) {
    check_size(name, tensor, 0, query.sym_size(0), "query's batch");
    check_size(name, tensor, 1, query.sym_size(1), "query's heads");
  }
  check_size("key", key, 3, query.sym_size(3), "query's size");
  check_size("value", value, 2, key.sym_size(2), "key's length");
}

void check_outer_sums(const at::Tensor& key, const at::Tensor& value) {
  check_causal_products(key, key, value);
}

at::Tensor empty_outer_sums(const at::Tensor& key, const at::Tensor& value) {
  return at::empty_symint({key.sym_size(0), key.sym_size(1), key.sym_size(3), value.sym_size(3)},
                          key.options());
}

at::Tensor empty_causal_products(const at::Tensor& query, const at::Tensor& value) {
  auto sizes = query.sym_sizes().vec();
  sizes[3] = value.sym_size(3);
  return at::empty_symint(sizes, query.options());
}

void check_features(const at::Tensor& input, const at::Tensor& projection,
                    const FeatureOptions& options) {
  const auto type = input.scalar_type();
  TORCH_CHECK_TYPE(type == at::kDouble || type == at::kFloat,
                   "sparse_attn: expected input of dtype float64 or float32, got ", type);
  check_heads_tensor("input", input, input);
  check_tensor("projection", projection, input);
  const std::int64_t rank = projection.dim();
  TORCH_CHECK_VALUE(rank == 2 || rank == 3,
                    "sparse_attn: expected projection of shape (features, size) or (heads, "
                    "features, size), got ",
                    projection.sym_sizes());
  if (rank == 3) check_size("projection", projection, 0, input.sym_size(1), "input's heads");
  check_size("projection", projection, rank - 1, input.sym_size(3), "input's size");
  TORCH_CHECK_VALUE(projection.sym_size(rank - 2) >= 1,
                    "sparse_attn: expected projection with at least 1 feature, got shape ",
                    projection.sym_sizes());
  const auto reference = static_cast<int>(options.reference);
  TORCH_CHECK_VALUE(reference >= 0 && reference <= 2,
                    "sparse_attn: expected reference of 0 (each row), 1 (the head) or 2 (running), "
                    "got ",
                    reference);
  TORCH_CHECK_VALUE(options.scale >= 0 && std::isfinite(options.scale),
                    "sparse_attn: expected scale to be finite and at least 0, got ", options.scale);
  TORCH_CHECK_VALUE(options.eps >= 0 && std::isfinite(options.eps),
                    "sparse_attn: expected eps to be finite and at least 0, got ", options.eps);
  if (!options.padding) return;
  const at::Tensor& padding = *options.padding;
  TORCH_CHECK_TYPE(padding.scalar_type() == at::kBool,
                   "sparse_attn: expected padding of dtype bool, got ", padding.scalar_type());
  TORCH_CHECK_VALUE(padding.dim() == 2 && padding.sym_size(0) == input.sym_size(0) &&
                        padding.sym_size(1) == input.sym_size(2),
                    "sparse_attn: expected padding of shape (", input.sym_size(0), ", ",
                    input.sym_size(2), "), got ", padding.sym_sizes());
  TORCH_CHECK_VALUE(padding.device() == input.device(), "sparse_attn: expected padding on device ",
                    input.device(), ", got ", padding.device());
}

double feature_factor(const c10::SymInt& count) {
  return 1 / std::sqrt(static_cast<double>(count.guard_int(__FILE__, __LINE__)));
}

double feature_eps(const FeatureOptions& options) {
  return options.reference == Reference::kRunning ? 0.0 : options.eps;
}

at::Tensor feature_products(const at::Tensor& input, const at::Tensor& projection, double scale) {
  return at::matmul(input, (projection * std::sqrt(scale)).mT());
}

TORCH_LIBRARY_IMPL(sparse_attn, CompositeExplicitAutograd, m) {
  m.impl("sum_products", TORCH_FN(sum_products));
}

TORCH_LIBRARY_FRAGMENT(sparse_attn, m) {
  for (const char* const schema :
       {"causal_products(Tensor query, Tensor key, Tensor value, bool reverse=False) -> Tensor",
        "outer_sums(Tensor key, Tensor value) -> Tensor",
        "sum_products(Tensor query, Tensor sums) -> Tensor",
        "feature_products(Tensor input, Tensor projection, Tensor other, Tensor? padding=None, "
        "bool transposed=False, float scale=1.0, float eps=0.0001) -> (Tensor output, Tensor "
        "maximum, Tensor index)",
        "feature_products_backward(Tensor grad, Tensor input, Tensor projection, Tensor other, "
        "Tensor maximum, Tensor index, Tensor? padding, bool transposed, float scale, float eps, "
        "bool[3] wanted) -> (Tensor grad_input, Tensor grad_projection, Tensor grad_other)",
        "positive_features(Tensor input, Tensor projection, Tensor? padding=None, int reference=0, "
        "float scale=1.0, float eps=0.0001) -> (Tensor features, Tensor sums, Tensor maximum, "
        "Tensor constant, Tensor index)",
        "positive_features_backward(Tensor grad_features, Tensor? grad_sums, Tensor? grad_maximum, "
        "Tensor features, Tensor index, Tensor? padding, int reference, float eps) -> (Tensor "
        "grad_products, Tensor grad_norms)"}) {
    m.def(torch::schema(schema), {at::Tag::pt2_compliant_tag});
  }
}

TORCH_LIBRARY_IMPL(sparse_attn, Meta, m) {
  m.impl("causal_products", TORCH_FN(products_meta));
  m.impl("outer_sums", TORCH_FN(sums_meta));
  m.impl("positive_features", TORCH_FN(features_meta));
  m.impl("positive_features_backward", TORCH_FN(features_backward_meta));
}

}  // namespace sparse_attn
