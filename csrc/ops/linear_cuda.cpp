// The ops of linear attention on a GPU: causal products are kernels; features are compositions of
// ATen's, in whose sums no order is left to chance.
#include <ATen/ATen.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <torch/library.h>

#include <limits>

#include "cuda/kernels.h"
#include "cuda/linear.h"
#include "ops/linear.h"
#include "ops/tensors.h"

namespace sparse_attn {
namespace {

void* stream_of(const at::Tensor& tensor) {
  if (!tensor.is_cuda()) return nullptr;
  const c10::impl::VirtualGuardImpl device(tensor.device().type());
  return device.getStream(tensor.device()).native_handle();
}

at::Tensor products_cuda(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                         bool reverse) {
  check_causal_products(query, key, value);
  const c10::DeviceGuard guard(query.device());
  const at::Tensor output = empty_causal_products(query, value);
  if (output.numel() == 0) return output;
  if (key.numel() == 0) return output.zero_();
  const at::Tensor rows = with_unit_stride(query), columns = with_unit_stride(key),
                   values = with_unit_stride(value);
  ProductParams params;
  params.dtype = data_type(query.scalar_type());
  params.reverse = reverse;
  params.batch = query.size(0);
  params.heads = query.size(1);
  params.n_q = query.size(2);
  params.n_k = key.size(2);
  params.size = query.size(3);
  params.value_dim = value.size(3);
  params.query = const_view(rows);
  params.key = const_view(columns);
  params.value = const_view(values);
  params.output = view(output);
  const cuda::LinearKernels& kernels = cuda::linear_kernels_for(params.dtype);
  cuda::LinearCall call = cuda::linear_call(params, kernels);
  const at::Tensor workspace = at::empty(
      {call.heads() * call.segments * params.size * params.value_dim * kernels.real_bytes},
      query.options().dtype(at::kByte));
  call.params.workspace = workspace.mutable_data_ptr();
  void* const stream = stream_of(query);
  kernels.sums(call, stream);
  kernels.prefix(call, stream);
  kernels.products(call, stream);
  return output;
}

/// The library's product: the same bits in each run.
at::Tensor sums_cuda(const at::Tensor& key, const at::Tensor& value) {
  check_outer_sums(key, value);
  return at::matmul(key.mT(), value);
}

/// Of rows (batch, heads, n): what padded ones are left out of.
at::Tensor rows_of(const at::Tensor& padding) { return padding.unsqueeze(1); }

FeatureOutputs features_cuda(const at::Tensor& input, const at::Tensor& projection,
                             const std::optional<at::Tensor>& padding, std::int64_t reference,
                             double scale, double eps) {
  const FeatureOptions options{padding, static_cast<Reference>(reference), scale, eps};
  check_features(input, projection, options);
  const c10::DeviceGuard guard(input.device());
  at::Tensor features = feature_products(input, projection, scale);
  at::Tensor constant = at::zeros({features.size(0), features.size(1), 1}, features.options());
  if (features.numel() == 0) {
    const at::Tensor none = features.new_zeros(features.sizes().slice(0, 3));
    return {features, none, none.clone(), constant.squeeze(-1), none.to(at::kLong)};
  }
  const at::Tensor norms = input.square().sum(-1) * (scale / 2);
  auto [maximum, index] = features.max(-1);
  index = index + at::arange(features.size(2), index.options()) * features.size(3);
  at::Tensor shift = norms;
  const double least = -std::numeric_limits<double>::infinity();
  if (options.reference == Reference::kRow) {
    shift = norms + maximum;
  } else {
    at::Tensor powers = maximum - norms;
    if (padding) {
      maximum = maximum.masked_fill(rows_of(*padding), least);
      powers = powers.masked_fill(rows_of(*padding), least);
    }
    at::Tensor places;
    if (options.reference == Reference::kHead) {
      std::tie(maximum, places) = maximum.max(-1, true);
      maximum = maximum.expand(index.sizes());
      places = places.expand(index.sizes());
    } else {
      std::tie(maximum, places) = maximum.cummax(-1);
    }
    const at::Tensor nothing = maximum == least;
    index = index.gather(-1, places).masked_fill(nothing, -1);
    maximum = maximum.masked_fill(nothing, 0);
    if (options.reference == Reference::kHead) {
      shift = norms + maximum;
    } else {
      const double largest = input.scalar_type() == at::kDouble ? 600 : 60;
      const at::Tensor power = powers.amax(-1, true);
      constant = at::where(power.isfinite(), power - power.clamp(-largest, largest), 0);
      maximum = (maximum - constant).masked_fill(nothing, 0);
      shift = norms + constant;
    }
  }
  features.sub_(shift.unsqueeze(-1)).exp_().add_(feature_eps(options));
  features.mul_(feature_factor(features.size(3)));
  if (padding) features.masked_fill_(rows_of(*padding).unsqueeze(-1), 0);
  return {features, features.sum(-1), maximum.contiguous(), constant.squeeze(-1), index};
}

FeatureGradients features_backward_cuda(const at::Tensor& grad_features,
                                        const std::optional<at::Tensor>& grad_sums,
                                        const std::optional<at::Tensor>& grad_maximum,
                                        const at::Tensor& features, const at::Tensor& index,
                                        const std::optional<at::Tensor>& padding,
                                        std::int64_t reference, double eps) {
  const FeatureOptions options{padding, static_cast<Reference>(reference), 1.0, eps};
  const c10::DeviceGuard guard(features.device());
  if (features.numel() == 0)
    return {at::zeros_like(features), at::zeros_like(index, features.options())};
  at::Tensor products =
      features.contiguous() - feature_eps(options) * feature_factor(features.size(3));
  products.mul_(grad_sums ? grad_features + grad_sums->unsqueeze(-1) : grad_features);
  if (padding) products.masked_fill_(rows_of(*padding).unsqueeze(-1), 0);
  const at::Tensor norms = products.sum(-1);
  at::Tensor of_references = grad_maximum ? *grad_maximum : at::zeros_like(norms);
  if (options.reference != Reference::kRunning) of_references = of_references - norms;
  // index_put_ sorts the places: those that rows share are added up in order.
  const at::Tensor heads = at::arange(index.size(0) * index.size(1), index.options()) *
                           (features.size(2) * features.size(3));
  const at::Tensor places = index.clamp_min(0).flatten(0, 1) + heads.unsqueeze(-1);
  products.view(-1).index_put_({places.flatten()},
                               of_references.masked_fill(index < 0, 0).flatten(),
                               /*accumulate=*/true);
  return {products, norms};
}

}  // namespace

// The emulator of tests/native serves another device.
#ifndef SPARSE_ATTN_CUDA_KERNELS_FOR
#define SPARSE_ATTN_CUDA_KERNELS_FOR CUDA
#endif

TORCH_LIBRARY_IMPL(sparse_attn, SPARSE_ATTN_CUDA_KERNELS_FOR, m) {
  m.impl("causal_products", TORCH_FN(products_cuda));
  m.impl("outer_sums", TORCH_FN(sums_cuda));
  m.impl("positive_features", TORCH_FN(features_cuda));
  m.impl("positive_features_backward", TORCH_FN(features_backward_cuda));
}

}  // namespace sparse_attn
