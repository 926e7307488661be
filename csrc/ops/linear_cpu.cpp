// The ops of linear attention on the CPU.
#include <ATen/ATen.h>
#include <torch/library.h>

#include <vector>

#include "cpu/kernels.h"
#include "ops/linear.h"
#include "ops/tensors.h"
#include "ops/threads.h"
#include "ops/workspace.h"

namespace sparse_attn {
namespace {

const cpu::LinearKernels& kernels_of(DataType type) {
  return *with_value_errors([&]() -> const cpu::Kernels& { return cpu::kernels(type); }).linear;
}

ProductParams params_of(const at::Tensor& key, const at::Tensor& value, const at::Tensor& output) {
  ProductParams params;
  params.dtype = data_type(key.scalar_type());
  params.batch = key.size(0);
  params.heads = key.size(1);
  params.n_k = key.size(2);
  params.size = key.size(3);
  params.value_dim = value.size(3);
  params.key = const_view(key);
  params.value = const_view(value);
  params.output = view(output);
  return params;
}

/// Runs a kernel in the workspace that it asks for.
template <class Params>
void run(Params& params, std::int64_t (*size)(const Params&, int),
         void (*kernel)(const Params&, const Parallel&)) {
  const Parallel parallel = torch_threads();
  const Workspace workspace(size(params, parallel.threads));
  params.workspace = workspace.data();
  kernel(params, parallel);
}

at::Tensor products_cpu(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                        bool reverse) {
  check_causal_products(query, key, value);
  const at::Tensor output = empty_causal_products(query, value);
  if (output.numel() == 0) return output;
  if (key.numel() == 0) return output.zero_();
  const at::Tensor rows = with_unit_stride(query), columns = with_unit_stride(key),
                   values = with_unit_stride(value);
  ProductParams params = params_of(columns, values, output);
  params.reverse = reverse;
  params.n_q = query.size(2);
  params.query = const_view(rows);
  const cpu::LinearKernels& kernels = kernels_of(params.dtype);
  run(params, kernels.products_workspace, kernels.products);
  return output;
}

at::Tensor sums_cpu(const at::Tensor& key, const at::Tensor& value) {
  check_outer_sums(key, value);
  const at::Tensor output = empty_outer_sums(key, value);
  if (output.numel() == 0) return output;
  if (key.size(2) == 0) return output.zero_();
  const at::Tensor columns = with_unit_stride(key), values = with_unit_stride(value);
  ProductParams params = params_of(columns, values, output);
  const cpu::LinearKernels& kernels = kernels_of(params.dtype);
  run(params, kernels.sums_workspace, kernels.sums);
  return output;
}

/// What both directions share; the tensors are contiguous.
FeatureParams params_of(const at::Tensor& features, const at::Tensor& padding,
                        const at::Tensor& index, const FeatureOptions& options) {
  FeatureParams params;
  params.dtype = data_type(features.scalar_type());
  params.reference = options.reference;
  params.batch = features.size(0);
  params.heads = features.size(1);
  params.n = features.size(2);
  params.count = features.size(3);
  params.scale = options.scale;
  params.factor = feature_factor(features.size(3));
  params.eps = feature_eps(options);
  if (padding.defined()) {
    params.padding = static_cast<const std::uint8_t*>(padding.const_data_ptr());
  }
  params.features = features.mutable_data_ptr();
  params.index = index.mutable_data_ptr<std::int64_t>();
  return params;
}

at::Tensor contiguous(const std::optional<at::Tensor>& tensor) {
  return tensor ? tensor->contiguous() : at::Tensor();
}

FeatureOutputs features_cpu(const at::Tensor& input, const at::Tensor& projection,
                            const std::optional<at::Tensor>& padding, std::int64_t reference,
                            double scale, double eps) {
  const FeatureOptions options{padding, static_cast<Reference>(reference), scale, eps};
  check_features(input, projection, options);
  const at::Tensor rows = input.contiguous(), ignored = contiguous(padding);
  const at::Tensor features = feature_products(rows, projection, scale).contiguous();
  const at::Tensor sums = at::empty(features.sizes().slice(0, 3), features.options());
  const at::Tensor maximum = at::empty_like(sums),
                   index = at::empty_like(sums, sums.options().dtype(at::kLong)),
                   constant = at::zeros(features.sizes().slice(0, 2), features.options());
  if (features.numel() > 0) {
    FeatureParams params = params_of(features, ignored, index, options);
    params.head_dim = input.size(3);
    params.input = rows.const_data_ptr();
    params.sums = sums.mutable_data_ptr();
    params.maximum = maximum.mutable_data_ptr();
    params.constant = constant.mutable_data_ptr();
    kernels_of(params.dtype).features(params, torch_threads());
  }
  return {features, sums, maximum, constant, index};
}

FeatureGradients features_backward_cpu(const at::Tensor& grad_features,
                                       const std::optional<at::Tensor>& grad_sums,
                                       const std::optional<at::Tensor>& grad_maximum,
                                       const at::Tensor& features, const at::Tensor& index,
                                       const std::optional<at::Tensor>& padding,
                                       std::int64_t reference, double eps) {
  const FeatureOptions options{padding, static_cast<Reference>(reference), 1.0, eps};
  const at::Tensor grad = grad_features.contiguous(), made = features.contiguous(),
                   places = index.contiguous(), ignored = contiguous(padding),
                   of_sums = contiguous(grad_sums), of_maximum = contiguous(grad_maximum);
  const at::Tensor products = at::empty_like(made),
                   norms = at::empty(index.sizes(), made.options());
  if (made.numel() > 0) {
    FeatureParams params = params_of(made, ignored, places, options);
    params.grad_features = grad.const_data_ptr();
    if (of_sums.defined()) params.grad_sums = of_sums.const_data_ptr();
    if (of_maximum.defined()) params.grad_maximum = of_maximum.const_data_ptr();
    params.grad_products = products.mutable_data_ptr();
    params.grad_norms = norms.mutable_data_ptr();
    kernels_of(params.dtype).features_backward(params, torch_threads());
  }
  return {products, norms};
}

/// What both directions share: `call` has tensors with a unit stride, the projection is contiguous.
FeatureProductParams params_of(const FeatureProduct& call, const at::Tensor& padding,
                               const at::Tensor& maximum, const at::Tensor& index) {
  FeatureProductParams params;
  params.dtype = data_type(call.input.scalar_type());
  params.transposed = call.transposed;
  params.batch = call.input.size(0);
  params.heads = call.input.size(1);
  params.n = call.input.size(2);
  params.count = call.projection.size(-2);
  params.head_dim = call.input.size(3);
  params.value_dim = call.other.size(3);
  params.scale = call.scale;
  params.factor = feature_factor(params.count);
  params.eps = call.eps;
  params.input = const_view(call.input);
  params.projection = call.projection.const_data_ptr();
  if (call.projection.dim() == 3) params.projection_stride = params.count * params.head_dim;
  if (padding.defined()) {
    params.padding = static_cast<const std::uint8_t*>(padding.const_data_ptr());
  }
  params.maximum = maximum.mutable_data_ptr();
  params.index = index.mutable_data_ptr<std::int64_t>();
  return params;
}

void run(FeatureProductParams& params) {
  const cpu::LinearKernels& kernels = kernels_of(params.dtype);
  run(params, kernels.feature_products_workspace, kernels.feature_products);
}

ProductOutputs feature_products_cpu(const at::Tensor& input, const at::Tensor& projection,
                                    const at::Tensor& other,
                                    const std::optional<at::Tensor>& padding, bool transposed,
                                    double scale, double eps) {
  FeatureProduct call{input, projection, other, padding, transposed, scale, eps};
  check_feature_product(call);
  const at::Tensor output = empty_feature_product(call), ignored = contiguous(padding),
                   maximum = at::empty(input.sizes().slice(0, 3), input.options()),
                   index = at::empty_like(maximum, maximum.options().dtype(at::kLong));
  if (maximum.numel() == 0) return {output.zero_(), maximum, index};
  call.input = with_unit_stride(input);
  call.projection = projection.contiguous();
  call.other = transposed ? with_unit_stride(other) : other.contiguous();
  FeatureProductParams params = params_of(call, ignored, maximum, index);
  if (transposed) {
    params.values = const_view(call.other);
    params.to_sums = output.mutable_data_ptr();
  } else {
    params.sums = call.other.const_data_ptr();
    params.to_values = output.mutable_data_ptr();
  }
  run(params);
  return {output, maximum, index};
}

ThreeGradients feature_products_backward_cpu(const at::Tensor& grad, const at::Tensor& input,
                                             const at::Tensor& projection, const at::Tensor& other,
                                             const at::Tensor& maximum, const at::Tensor& index,
                                             const std::optional<at::Tensor>& padding,
                                             bool transposed, double scale, double eps,
                                             std::array<bool, 3> wanted) {
  FeatureProduct call{input, projection, other, padding, transposed, scale, eps};
  check_feature_product(call);
  const auto sizes_if = [&](bool is_wanted, at::IntArrayRef sizes) {
    return at::empty(is_wanted ? sizes : at::IntArrayRef{0}, input.options());
  };
  const std::vector<std::int64_t> by_head{input.size(0), input.size(1), projection.size(-2),
                                          input.size(3)};
  const at::Tensor grad_input = sizes_if(wanted[0], input.sizes()),
                   of_projection = sizes_if(wanted[1], by_head),
                   grad_other = sizes_if(wanted[2], other.sizes()), ignored = contiguous(padding),
                   maxima = maximum.contiguous(), places = index.contiguous();
  if (maximum.numel() == 0) {
    of_projection.zero_();
    grad_other.zero_();
  } else {
    call.input = with_unit_stride(input);
    call.projection = projection.contiguous();
    const at::Tensor values = with_unit_stride(transposed ? other : grad),
                     sums = (transposed ? grad : other).contiguous();
    FeatureProductParams params = params_of(call, ignored, maxima, places);
    params.backward = true;
    params.values = const_view(values);
    params.sums = sums.const_data_ptr();
    if (wanted[0]) params.grad_input = grad_input.mutable_data_ptr();
    if (wanted[1]) params.grad_projection = of_projection.mutable_data_ptr();
    if (wanted[2]) (transposed ? params.to_values : params.to_sums) = grad_other.mutable_data_ptr();
    run(params);
  }
  if (!wanted[1]) return {grad_input, of_projection, grad_other};
  const at::Tensor grad_projection = of_projection.sum(0);
  return {grad_input, projection.dim() == 2 ? grad_projection.sum(0) : grad_projection, grad_other};
}

}  // namespace

TORCH_LIBRARY_IMPL(sparse_attn, CPU, m) {
  m.impl("causal_products", TORCH_FN(products_cpu));
  m.impl("outer_sums", TORCH_FN(sums_cpu));
  m.impl("positive_features", TORCH_FN(features_cpu));
  m.impl("positive_features_backward", TORCH_FN(features_backward_cpu));
  m.impl("feature_products", TORCH_FN(feature_products_cpu));
  m.impl("feature_products_backward", TORCH_FN(feature_products_backward_cpu));
}

}  // namespace sparse_attn
