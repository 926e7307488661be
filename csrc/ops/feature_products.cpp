// Products with positive features that are not kept. On a GPU they are compositions: some heads at
// a time features are made, used and thrown away, in the backward pass again.
#include <ATen/ATen.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "ops/checks.h"
#include "ops/linear.h"

namespace sparse_attn {
namespace {

/// Features that are there at a time, unless a head has more.
constexpr std::int64_t kFeatures = std::int64_t{1} << 26;

/// Some examples and heads.
struct Slice {
  std::int64_t batch, batches, head, heads;

  at::Tensor of(const at::Tensor& tensor) const {
    return tensor.narrow(0, batch, batches).narrow(1, head, heads);
  }
  FeatureProduct of(const FeatureProduct& call) const {
    FeatureProduct part = call;
    part.input = of(call.input);
    part.other = of(call.other);
    if (call.projection.dim() == 3) part.projection = call.projection.narrow(0, head, heads);
    if (call.padding) part.padding = call.padding->narrow(0, batch, batches);
    return part;
  }
};

std::vector<Slice> slices_of(const FeatureProduct& call) {
  const std::int64_t batch = call.input.size(0), heads = call.input.size(1),
                     numbers = call.input.size(2) * call.projection.size(-2);
  const auto at_least_1 = [](std::int64_t n) { return std::max<std::int64_t>(1, n); };
  const std::int64_t most = kFeatures / at_least_1(numbers);
  const std::int64_t heads_step = std::clamp<std::int64_t>(most, 1, at_least_1(heads)),
                     batch_step = at_least_1(most / at_least_1(heads));
  std::vector<Slice> slices;
  for (std::int64_t b = 0; b < batch; b += batch_step) {
    for (std::int64_t h = 0; h < heads; h += heads_step)
      slices.push_back({b, std::min(batch_step, batch - b), h, std::min(heads_step, heads - h)});
  }
  return slices;
}

ProductOutputs empty_outputs(const FeatureProduct& call) {
  const auto sizes = call.input.sym_sizes().slice(0, 3);
  return {empty_feature_product(call), at::empty_symint(sizes, call.input.options()),
          at::empty_symint(sizes, call.input.options().dtype(at::kLong))};
}

ProductOutputs products(const at::Tensor& input, const at::Tensor& projection,
                        const at::Tensor& other, const std::optional<at::Tensor>& padding,
                        bool transposed, double scale, double eps) {
  const FeatureProduct call{input, projection, other, padding, transposed, scale, eps};
  check_feature_product(call);
  const auto [output, maximum, index] = empty_outputs(call);
  for (const Slice& slice : slices_of(call)) {
    const FeatureProduct part = slice.of(call);
    const FeatureOutputs made = features_of(part);
    const at::Tensor& features = std::get<0>(made);
    slice.of(output).copy_(transposed ? outer_sums_op().call(features, part.other)
                                      : at::matmul(features, part.other));
    slice.of(maximum).copy_(std::get<2>(made));
    slice.of(index).copy_(std::get<4>(made));
  }
  return {output, maximum, index};
}

ThreeGradients backward(const at::Tensor& grad, const at::Tensor& input,
                        const at::Tensor& projection, const at::Tensor& other, const at::Tensor&,
                        const at::Tensor&, const std::optional<at::Tensor>& padding,
                        bool transposed, double scale, double eps, std::array<bool, 3> wanted) {
  const FeatureProduct call{input, projection, other, padding, transposed, scale, eps};
  check_feature_product(call);
  const auto like = [&](int i, const at::Tensor& x) {
    return wanted[i] ? at::zeros_like(x, at::MemoryFormat::Contiguous)
                     : at::empty({0}, x.options());
  };
  const at::Tensor grad_input = like(0, input), grad_projection = like(1, projection),
                   grad_other = like(2, other);
  const at::Tensor scaled = projection * std::sqrt(scale);
  const bool by_head = projection.dim() == 3;
  for (const Slice& slice : slices_of(call)) {
    const FeatureProduct part = slice.of(call);
    const at::Tensor given = slice.of(grad);
    const auto [features, sums, maximum, constant, index] = features_of(part);
    if (wanted[2]) {
      slice.of(grad_other)
          .copy_(transposed ? at::matmul(features, given) : outer_sums_op().call(features, given));
    }
    if (!wanted[0] && !wanted[1]) continue;
    const at::Tensor of_features =
        transposed ? at::matmul(part.other, given.mT()) : at::matmul(given, part.other.mT());
    const auto [of_products, norms] = positive_features_backward_op().call(
        of_features, std::nullopt, std::nullopt, features, index, part.padding,
        static_cast<std::int64_t>(part.options().reference), eps);
    const auto of_heads = [&](const at::Tensor& x) {
      return by_head ? x.narrow(0, slice.head, slice.heads) : x;
    };
    if (wanted[0]) {
      slice.of(grad_input)
          .copy_(at::matmul(of_products, of_heads(scaled)) -
                 part.input * (norms * scale).unsqueeze(-1));
    }
    if (wanted[1]) {
      const at::Tensor sum =
          outer_sums_op().call(of_products, part.input).sum(0) * std::sqrt(scale);
      of_heads(grad_projection).add_(by_head ? sum : sum.sum(0));
    }
  }
  return {grad_input, grad_projection, grad_other};
}

ProductOutputs products_meta(const at::Tensor& input, const at::Tensor& projection,
                             const at::Tensor& other, const std::optional<at::Tensor>& padding,
                             bool transposed, double scale, double eps) {
  const FeatureProduct call{input, projection, other, padding, transposed, scale, eps};
  check_feature_product(call);
  return empty_outputs(call);
}

ThreeGradients backward_meta(const at::Tensor&, const at::Tensor& input,
                             const at::Tensor& projection, const at::Tensor& other,
                             const at::Tensor&, const at::Tensor&, const std::optional<at::Tensor>&,
                             bool, double, double, std::array<bool, 3> wanted) {
  const auto like = [&](int i, const at::Tensor& x) {
    return wanted[i] ? at::empty_symint(x.sym_sizes(), x.options()) : at::empty({0}, x.options());
  };
  return {like(0, input), like(1, projection), like(2, other)};
}

}  // namespace

void check_feature_product(const FeatureProduct& call) {
  check_features(call.input, call.projection, call.options());
  const at::Tensor &input = call.input, &other = call.other;
  const c10::SymInt rows = call.transposed ? input.sym_size(2) : call.projection.sym_size(-2);
  TORCH_CHECK_TYPE(other.scalar_type() == input.scalar_type(),
                   "sparse_attn: expected other of dtype ", input.scalar_type(), ", got ",
                   other.scalar_type());
  TORCH_CHECK_VALUE(other.dim() == 4 && other.sym_size(0) == input.sym_size(0) &&
                        other.sym_size(1) == input.sym_size(1) && other.sym_size(2) == rows,
                    "sparse_attn: expected other of shape (", input.sym_size(0), ", ",
                    input.sym_size(1), ", ", rows, ", size), got ", other.sym_sizes());
  TORCH_CHECK_VALUE(other.device() == input.device(), "sparse_attn: expected other on device ",
                    input.device(), ", got ", other.device());
}

at::Tensor empty_feature_product(const FeatureProduct& call) {
  auto sizes = call.other.sym_sizes().vec();
  sizes[2] = call.transposed ? call.projection.sym_size(-2) : call.input.sym_size(2);
  return at::empty_symint(sizes, call.input.options());
}

FeatureOutputs features_of(const FeatureProduct& call) {
  const FeatureOptions options = call.options();
  return positive_features_op().call(call.input, call.projection, options.padding,
                                     static_cast<std::int64_t>(options.reference), options.scale,
                                     options.eps);
}

TORCH_LIBRARY_IMPL(sparse_attn, CompositeExplicitAutograd, m) {
  m.impl("feature_products", TORCH_FN(products));
  m.impl("feature_products_backward", TORCH_FN(backward));
}

TORCH_LIBRARY_IMPL(sparse_attn, Meta, m) {
  m.impl("feature_products", TORCH_FN(products_meta));
  m.impl("feature_products_backward", TORCH_FN(backward_meta));
}

}  // namespace sparse_attn
