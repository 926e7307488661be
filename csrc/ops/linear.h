// Linear attention: causal products, which are linear in each of three factors and so their own
// derivatives, and the positive features of the softmax kernel.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>

#include <array>
#include <optional>
#include <tuple>

#include "linear_params.h"

namespace sparse_attn {

/// Shapes, types and devices, on symbolic sizes.
void check_causal_products(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value);

/// The result, uninitialised.
at::Tensor empty_causal_products(const at::Tensor& query, const at::Tensor& value);

using CausalProducts = at::Tensor(const at::Tensor& query, const at::Tensor& key,
                                  const at::Tensor& value, bool reverse);
c10::TypedOperatorHandle<CausalProducts> causal_products_op();

/// keyᵀ value, (batch, heads, size, value_dim).
using OuterSums = at::Tensor(const at::Tensor& key, const at::Tensor& value);
c10::TypedOperatorHandle<OuterSums> outer_sums_op();
/// query · sums, which has outer_sums for a gradient.
using SumProducts = at::Tensor(const at::Tensor& query, const at::Tensor& sums);
c10::TypedOperatorHandle<SumProducts> sum_products_op();
void check_outer_sums(const at::Tensor& key, const at::Tensor& value);
at::Tensor empty_outer_sums(const at::Tensor& key, const at::Tensor& value);

/// Besides the input and the projection.
struct FeatureOptions {
  std::optional<at::Tensor> padding;  // (batch, n) bool
  Reference reference;
  double scale;
  double eps;
};

/// features, sums, maximum, constant, index, which linear_params.h explains.
using FeatureOutputs = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

void check_features(const at::Tensor& input, const at::Tensor& projection,
                    const FeatureOptions& options);

/// What multiplies each feature.
double feature_factor(const c10::SymInt& count);

/// Features of rows one by one are relative to what they say; those of a running maximum have no
/// eps.
double feature_eps(const FeatureOptions& options);

/// input · projectionᵀ √scale, of (batch, heads, n, head_dim) and ((heads,) count, head_dim).
at::Tensor feature_products(const at::Tensor& input, const at::Tensor& projection, double scale);

using PositiveFeatures = FeatureOutputs(const at::Tensor& input, const at::Tensor& projection,
                                        const std::optional<at::Tensor>& padding,
                                        std::int64_t reference, double scale, double eps);
c10::TypedOperatorHandle<PositiveFeatures> positive_features_op();

/// Gradients of the products and of -scale |input|^2 / 2.
using FeatureGradients = std::tuple<at::Tensor, at::Tensor>;
using PositiveFeaturesBackward = FeatureGradients(const at::Tensor& grad_features,
                                                  const std::optional<at::Tensor>& grad_sums,
                                                  const std::optional<at::Tensor>& grad_maximum,
                                                  const at::Tensor& features,
                                                  const at::Tensor& index,
                                                  const std::optional<at::Tensor>& padding,
                                                  std::int64_t reference, double eps);
c10::TypedOperatorHandle<PositiveFeaturesBackward> positive_features_backward_op();

/// features · other, relative to each row's maximum, or featuresᵀ · other, relative to the head's,
/// without keeping the features.
struct FeatureProduct {
  at::Tensor input, projection, other;
  std::optional<at::Tensor> padding;
  bool transposed;
  double scale, eps;

  FeatureOptions options() const {
    return {padding, transposed ? Reference::kHead : Reference::kRow, scale, eps};
  }
};
void check_feature_product(const FeatureProduct& call);
at::Tensor empty_feature_product(const FeatureProduct& call);
/// Calls positive_features.
FeatureOutputs features_of(const FeatureProduct& call);

/// The product; maximum and index, as of FeatureOutputs.
using ProductOutputs = std::tuple<at::Tensor, at::Tensor, at::Tensor>;
using FeatureProducts = ProductOutputs(const at::Tensor& input, const at::Tensor& projection,
                                       const at::Tensor& other,
                                       const std::optional<at::Tensor>& padding, bool transposed,
                                       double scale, double eps);
c10::TypedOperatorHandle<FeatureProducts> feature_products_op();

/// Gradients of input, projection and other; those that `wanted` does not name are empty.
using ThreeGradients = std::tuple<at::Tensor, at::Tensor, at::Tensor>;
using FeatureProductsBackward = ThreeGradients(const at::Tensor& grad, const at::Tensor& input,
                                               const at::Tensor& projection,
                                               const at::Tensor& other, const at::Tensor& maximum,
                                               const at::Tensor& index,
                                               const std::optional<at::Tensor>& padding,
                                               bool transposed, double scale, double eps,
                                               std::array<bool, 3> wanted);
c10::TypedOperatorHandle<FeatureProductsBackward> feature_products_backward_op();

}  // namespace sparse_attn
