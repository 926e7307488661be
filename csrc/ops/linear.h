// Linear attention: causal products, which are linear in each of three factors and so their own
// derivatives, and the positive features of the softmax kernel.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>

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

}  // namespace sparse_attn
