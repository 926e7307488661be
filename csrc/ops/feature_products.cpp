// Products with positive features that are not kept: some heads at a time their features are made,
// used and thrown away, in the backward pass again. Writing all of them to fresh memory took longer
// than to compute them twice.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/ThreadLocalState.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "ops/checks.h"
#include "ops/linear.h"

namespace sparse_attn {
namespace {

/// Features that are there at a time, unless a head has more: 4 MiB of float32 on a CPU.
constexpr std::int64_t kOnCpu = std::int64_t{1} << 20;
constexpr std::int64_t kElsewhere = std::int64_t{1} << 26;

FeatureOptions options_of(const std::optional<at::Tensor>& padding, std::int64_t reference,
                          double scale, double eps) {
  return {padding, static_cast<Reference>(reference), scale, eps};
}

void check(const FeatureProduct& call) {
  check_features(call.input, call.projection, call.options);
  TORCH_CHECK_VALUE(call.options.reference != Reference::kRunning,
                    "sparse_attn: expected reference of 0 (each row) or 1 (the head), got 2");
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

at::Tensor empty_result(const FeatureProduct& call) {
  auto sizes = call.other.sym_sizes().vec();
  sizes[2] = call.transposed ? call.projection.sym_size(-2) : call.input.sym_size(2);
  return at::empty_symint(sizes, call.input.options());
}

/// Some examples and heads.
struct Slice {
  std::int64_t batch, batches, head, heads;

  at::Tensor of(const at::Tensor& tensor) const {
    return tensor.narrow(0, batch, batches).narrow(1, head, heads);
  }
  FeatureProduct of(const FeatureProduct& call) const {
    FeatureProduct part{of(call.input), call.projection, of(call.other), call.options,
                        call.transposed};
    if (call.projection.dim() == 3) part.projection = call.projection.narrow(0, head, heads);
    if (call.options.padding)
      part.options.padding = call.options.padding->narrow(0, batch, batches);
    return part;
  }
};

std::vector<Slice> slices_of(const FeatureProduct& call) {
  const std::int64_t batch = call.input.size(0), heads = call.input.size(1),
                     numbers = call.input.size(2) * call.projection.size(-2);
  const auto at_least_1 = [](std::int64_t n) { return std::max<std::int64_t>(1, n); };
  const std::int64_t most = (call.input.is_cpu() ? kOnCpu : kElsewhere) / at_least_1(numbers);
  const std::int64_t heads_step = std::clamp<std::int64_t>(most, 1, at_least_1(heads)),
                     batch_step = at_least_1(most / at_least_1(heads));
  std::vector<Slice> slices;
  for (std::int64_t b = 0; b < batch; b += batch_step) {
    for (std::int64_t h = 0; h < heads; h += heads_step)
      slices.push_back({b, std::min(batch_step, batch - b), h, std::min(heads_step, heads - h)});
  }
  return slices;
}

/// body(slice, its number). On a CPU threads take whole slices, which never wait for each other;
/// what is in a slice comes out the same.
template <class Body>
void for_each_slice(const FeatureProduct& call, const std::vector<Slice>& slices,
                    const Body& body) {
  const auto count = static_cast<std::int64_t>(slices.size());
  if (!call.input.is_cpu() || count < at::get_num_threads()) {
    for (std::int64_t i = 0; i < count; ++i) body(slices[i], i);
    return;
  }
  const at::ThreadLocalState state;
  at::parallel_for(0, count, 1, [&](std::int64_t begin, std::int64_t end) {
    const at::ThreadLocalStateGuard same_as_caller(state);
    for (std::int64_t i = begin; i < end; ++i) body(slices[i], i);
  });
}

at::Tensor products(const at::Tensor& input, const at::Tensor& projection, const at::Tensor& other,
                    const std::optional<at::Tensor>& padding, std::int64_t reference,
                    bool transposed, double scale, double eps) {
  const FeatureProduct call{input, projection, other, options_of(padding, reference, scale, eps),
                            transposed};
  check(call);
  const at::Tensor result = empty_result(call);
  for_each_slice(call, slices_of(call), [&](const Slice& slice, std::int64_t) {
    const FeatureProduct part = slice.of(call);
    const at::Tensor features = std::get<0>(features_of(part));
    slice.of(result).copy_(transposed ? outer_sums_op().call(features, part.other)
                                      : at::matmul(features, part.other));
  });
  return result;
}

ThreeGradients backward(const at::Tensor& grad, const at::Tensor& input,
                        const at::Tensor& projection, const at::Tensor& other,
                        const std::optional<at::Tensor>& padding, std::int64_t reference,
                        bool transposed, double scale, double eps, std::array<bool, 3> wanted) {
  const FeatureProduct call{input, projection, other, options_of(padding, reference, scale, eps),
                            transposed};
  check(call);
  const auto like = [&](int i, const at::Tensor& x) {
    return wanted[i] ? at::zeros_like(x, at::MemoryFormat::Contiguous)
                     : at::empty({0}, x.options());
  };
  const at::Tensor grad_input = like(0, input), grad_projection = like(1, projection),
                   grad_other = like(2, other);
  const at::Tensor scaled = projection * std::sqrt(scale);
  const std::vector<Slice> slices = slices_of(call);
  std::vector<at::Tensor> of_projection(slices.size());
  for_each_slice(call, slices, [&](const Slice& slice, std::int64_t number) {
    const FeatureProduct part = slice.of(call);
    const at::Tensor given = slice.of(grad);
    const auto [features, sums, maximum, constant, index] = features_of(part);
    if (wanted[2]) {
      slice.of(grad_other)
          .copy_(transposed ? at::matmul(features, given) : outer_sums_op().call(features, given));
    }
    if (!wanted[0] && !wanted[1]) return;
    const at::Tensor of_features =
        transposed ? at::matmul(part.other, given.mT()) : at::matmul(given, part.other.mT());
    const auto [of_products, norms] =
        positive_features_backward_op().call(of_features, std::nullopt, std::nullopt, features,
                                             index, part.options.padding, reference, eps);
    const bool by_head = projection.dim() == 3;
    if (wanted[0]) {
      const at::Tensor weights = by_head ? scaled.narrow(0, slice.head, slice.heads) : scaled;
      slice.of(grad_input)
          .copy_(at::matmul(of_products, weights) - part.input * (norms * scale).unsqueeze(-1));
    }
    if (wanted[1]) of_projection[number] = outer_sums_op().call(of_products, part.input).sum(0);
  });
  for (std::size_t i = 0; wanted[1] && i < slices.size(); ++i) {
    const at::Tensor sum = of_projection[i] * std::sqrt(scale);
    if (projection.dim() == 3) {
      grad_projection.narrow(0, slices[i].head, slices[i].heads).add_(sum);
    } else {
      grad_projection.add_(sum.sum(0));
    }
  }
  return {grad_input, grad_projection, grad_other};
}

at::Tensor products_meta(const at::Tensor& input, const at::Tensor& projection,
                         const at::Tensor& other, const std::optional<at::Tensor>& padding,
                         std::int64_t reference, bool transposed, double scale, double eps) {
  const FeatureProduct call{input, projection, other, options_of(padding, reference, scale, eps),
                            transposed};
  check(call);
  return empty_result(call);
}

ThreeGradients backward_meta(const at::Tensor&, const at::Tensor& input,
                             const at::Tensor& projection, const at::Tensor& other,
                             const std::optional<at::Tensor>&, std::int64_t, bool, double, double,
                             std::array<bool, 3> wanted) {
  const auto like = [&](int i, const at::Tensor& x) {
    return wanted[i] ? at::empty_symint(x.sym_sizes(), x.options()) : at::empty({0}, x.options());
  };
  return {like(0, input), like(1, projection), like(2, other)};
}

}  // namespace

FeatureOutputs features_of(const FeatureProduct& call) {
  return positive_features_op().call(call.input, call.projection, call.options.padding,
                                     static_cast<std::int64_t>(call.options.reference),
                                     call.options.scale, call.options.eps);
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
