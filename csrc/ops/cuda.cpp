// From torch to the CUDA kernels: checks, allocation, plans, streams. Nothing of CUDA is in here:
// it compiles against any torch.
#include "cuda/run.h"

#include <ATen/ATen.h>
#include <ATen/Context.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <torch/library.h>

#include <cmath>
#include <cstring>

#include "ops/checks.h"
#include "ops/device_patterns.h"
#include "ops/device_plans.h"
#include "ops/tensors.h"

namespace sparse_attn {
namespace {

/// Heads are padded to whole chunks of 16 bytes, which is what the tensor-core kernels copy.
constexpr std::int64_t kChunkBytes = 16;

std::int64_t whole_chunks(std::int64_t size, const at::Tensor& tensor) {
  const auto chunk = kChunkBytes / static_cast<std::int64_t>(tensor.element_size());
  return (size + chunk - 1) / chunk * chunk;
}

/// The tensor with every row at a multiple of 16 bytes and of whole chunks; a copy if it has to be.
at::Tensor in_chunks(const at::Tensor& tensor) {
  const std::int64_t size = tensor.size(3), padded = whole_chunks(size, tensor);
  if (padded != size) return at::constant_pad_nd(tensor, {0, padded - size}).contiguous();
  const auto bytes = static_cast<std::int64_t>(tensor.element_size());
  bool aligned = reinterpret_cast<std::uintptr_t>(tensor.const_data_ptr()) % kChunkBytes == 0 &&
                 tensor.stride(3) == 1;
  for (const int dim : {0, 1, 2})
    aligned = aligned && (tensor.size(dim) == 1 || tensor.stride(dim) * bytes % kChunkBytes == 0);
  return aligned ? tensor : tensor.clone(at::MemoryFormat::Contiguous);
}

/// Each head of keys as often as heads of queries share it.
at::Tensor repeated(const at::Tensor& tensor, std::int64_t times) {
  return times == 1 ? tensor : tensor.repeat_interleave(times, 1);
}

/// Whether query heads that share a key head may differ in their patterns.
bool mixes_patterns(std::size_t patterns, const AttentionArguments& a) {
  const std::int64_t heads = a.query.size(1), group = heads / a.key.size(1);
  return heads / static_cast<std::int64_t>(patterns) % group != 0;
}

/// Whether torch's settings let float32 products go through TF32.
bool allows_tf32() {
  return at::globalContext().float32Precision(at::Float32Backend::CUDA, at::Float32Op::MATMUL) ==
         at::Float32Precision::TF32;
}

c10::Stream current_stream(at::Device device) {
  return c10::impl::VirtualGuardImpl(device.type()).getStream(device);
}

/// A call on its way to the kernels, and what keeps the pointers in it alive.
class DeviceCall {
 public:
  DeviceCall(const AttentionArguments& a, const Expression& pattern, bool backward)
      : stream_(current_stream(a.query.device())),
        kernels_(choose_kernels(a)),
        pads_(std::strcmp(kernels_.path, "simt") != 0),
        capturing_(a.query.is_cuda() && cuda::is_capturing(stream_.native_handle())),
        on_device_(a, pattern, capturing_) {
    const auto patterns = head_patterns(pattern);
    const bool mixed = on_device_.differs_by_head() || mixes_patterns(patterns.size(), a);
    if (backward && mixed) repeats_ = a.query.size(1) / a.key.size(1);
    query = laid_out(positively_scaled(a));
    key = laid_out(repeated(a.key, repeats_));
    value = laid_out(repeated(a.value, repeats_));
    call_.params = params_of(a, query, key, value);
    call_.params.scale = scale_ == 0.0 ? 1.0 : std::fabs(scale_);
    if (a.key_padding_mask) {
      padding_ = a.key_padding_mask->contiguous();
      call_.params.key_padding = static_cast<const std::uint8_t*>(padding_.const_data_ptr());
    }
    call_.stream = a.query.is_cuda() ? stream_.native_handle() : nullptr;
    find_plans(patterns, backward, a.query.device());
    on_device_.put_into(call_, backward);
  }

  /// As the kernels want it: rows of whole chunks for tensor cores, unit strides at least.
  at::Tensor laid_out(const at::Tensor& tensor) const {
    const at::Tensor some = tensor.size(3) > 0 ? tensor : at::constant_pad_nd(tensor, {0, 1});
    return pads_ ? in_chunks(some) : with_unit_stride(some);
  }

  void forward() {
    const at::Tensor workspace = allocate(cuda::forward_workspace(kernels_, call_));
    cuda::forward(kernels_, call_);
  }
  void backward(bool wide) {
    const at::Tensor workspace = allocate(cuda::backward_workspace(kernels_, call_));
    cuda::backward(kernels_, call_, wide);
  }

  AttentionParams& params() { return call_.params; }
  bool adds_to_gradients() const { return cuda::adds_to_gradients(kernels_, call_); }
  /// Of the query that the kernels see, to that of the caller's.
  double query_sign() const { return scale_ < 0.0 ? -1.0 : scale_ == 0.0 ? 0.0 : 1.0; }
  std::int64_t repeats() const { return repeats_; }

  at::Tensor query, key, value;

 private:
  const cuda::Kernels& choose_kernels(const AttentionArguments& a) {
    const bool tf32 = a.query.scalar_type() == at::kFloat && allows_tf32();
    const std::int64_t size = std::max(a.query.size(3), a.value.size(3));
    return cuda::kernels_for(data_type(a.query.scalar_type()), size, tf32,
                             cuda::use_device(a.query.device().index()));
  }

  /// The kernels take maxima of unscaled logits: the scale is made positive, and the query bears
  /// its sign.
  at::Tensor positively_scaled(const AttentionArguments& a) {
    scale_ = a.scale.value_or(default_scale(a.query));
    const bool is_double = a.query.scalar_type() == at::kDouble;
    if (!is_double && static_cast<float>(scale_) == 0.0f) scale_ = 0.0;  // what the kernels see
    if (scale_ > 0.0) return a.query;
    return scale_ < 0.0 ? a.query.neg() : at::zeros_like(a.query);
  }

  void find_plans(at::ArrayRef<Expression> patterns, bool backward, at::Device device) {
    const AttentionParams& p = call_.params;
    const GridKey key_of_plans{{p.n_q, p.n_k},
                               backward ? kernels_.in_backward : kernels_.in_forward,
                               p.batch * p.heads,
                               backward,
                               on_device_.global_tensor()};
    plans_ = device_plans(patterns, key_of_plans, device, capturing_);
    if (!capturing_) plans_->used_on(stream_);
    call_.image = &plans_->image();
    call_.base = plans_->base();
    call_.plan_heads = static_cast<std::int32_t>(patterns.size());
  }

  at::Tensor allocate(std::int64_t bytes) {
    at::Tensor workspace = at::empty({bytes}, query.options().dtype(at::kByte));
    call_.params.workspace = workspace.mutable_data_ptr();
    return workspace;
  }

  const c10::Stream stream_;
  const cuda::Kernels& kernels_;
  const bool pads_, capturing_;
  DevicePatterns on_device_;
  std::int64_t repeats_ = 1;
  double scale_ = 1.0;
  at::Tensor padding_;
  std::shared_ptr<const DevicePlans> plans_;
  cuda::Call call_;
};

void check_available(const AttentionArguments& a) {
  TORCH_CHECK_NOT_IMPLEMENTED(
      *cuda::built_for() != '\0', "sparse_attn: expected a build with CUDA kernels for tensors on ",
      a.query.device(),
      ", got one without; build it again for a CUDA build of torch, where nvcc is");
  const std::int64_t size = std::max(a.query.size(3), a.value.size(3));
  TORCH_CHECK_NOT_IMPLEMENTED(size <= cuda::kLargestHead, "sparse_attn: expected heads of at most ",
                              cuda::kLargestHead, " with CUDA kernels, got ", size);
}

Outputs attention_cuda(c10::DispatchKeySet, const AttentionArguments& a) {
  const Expression pattern = check_attention(a);
  check_available(a);
  const c10::DeviceGuard guard(a.query.device());
  const std::int64_t value_dim = a.value.size(3);
  const at::Tensor lse = empty_lse(a.query);
  at::Tensor output = empty_rows(a.query, value_dim);
  if (is_empty(a)) return {output, lse};
  if (a.key.size(2) == 0) return without_keys(output, lse);
  DeviceCall call(a, pattern, false);
  const bool pads = call.params().value_dim != value_dim;
  const at::Tensor wide = pads ? empty_rows(a.query, call.params().value_dim) : output;
  call.params().output = view(wide);
  call.params().lse = lse.mutable_data_ptr();
  call.forward();
  if (pads) output.copy_(wide.narrow(3, 0, value_dim));
  return {output, lse};
}

/// What the kernels add up in, and the gradient that it becomes.
class GradientOf {
 public:
  /// `grad` is the gradient of `tensor`, to be filled; `seen` is the tensor as the kernels see it,
  /// with padded and repeated heads.
  GradientOf(at::Tensor grad, const at::Tensor& seen, bool wide) : grad_(std::move(grad)) {
    const auto type = wide ? lse_type(grad_) : grad_.scalar_type();
    const bool in_place = type == grad_.scalar_type() && seen.sizes() == grad_.sizes();
    sums_ = in_place ? grad_ : at::empty(seen.sizes(), grad_.options().dtype(type));
    sums_.zero_();
  }
  TensorView sums() const { return view(sums_); }
  at::Tensor finish(double factor = 1.0) const {
    if (sums_.is_same(grad_)) return factor == 1.0 ? grad_ : grad_.mul_(factor);
    at::Tensor sums = sums_.narrow(3, 0, grad_.size(3));
    const std::int64_t heads = grad_.size(1), times = sums.size(1) / heads;
    if (times > 1) sums = sums.unflatten(1, {heads, times}).sum(2);
    return grad_.copy_(factor == 1.0 ? sums : sums * factor);
  }

 private:
  at::Tensor grad_, sums_;
};

Gradients backward_cuda(c10::DispatchKeySet, const BackwardArguments& a) {
  const Expression pattern = check_backward(a);
  check_available(a);
  const c10::DeviceGuard guard(a.query.device());
  const at::Tensor for_query = empty_rows(a.query, a.query.size(3));
  const at::Tensor for_key = at::empty(a.key.sizes(), a.key.options());
  const at::Tensor for_value = at::empty(a.value.sizes(), a.value.options());
  if (has_no_pairs(a)) return {for_query.zero_(), for_key.zero_(), for_value.zero_()};
  DeviceCall call(a, pattern, true);
  const at::Tensor grad_output = call.laid_out(a.grad_output), output = call.laid_out(a.output);
  const at::Tensor lse = a.logsumexp.contiguous();
  const at::Tensor grad_lse = a.grad_logsumexp ? a.grad_logsumexp->contiguous() : at::Tensor();
  const bool wide = call.adds_to_gradients() || call.repeats() > 1;
  const GradientOf grad_query(for_query, call.query, wide), grad_key(for_key, call.key, wide),
      grad_value(for_value, call.value, wide);
  call.params().grad_output = const_view(grad_output);
  call.params().output = const_view(output);
  call.params().lse = const_cast<void*>(lse.const_data_ptr());
  call.params().grad_lse = grad_lse.defined() ? grad_lse.const_data_ptr() : nullptr;
  call.params().grad_query = grad_query.sums();
  call.params().grad_key = grad_key.sums();
  call.params().grad_value = grad_value.sums();
  call.backward(wide);
  return {grad_query.finish(call.query_sign()), grad_key.finish(), grad_value.finish()};
}

}  // namespace

// The emulator of tests/native serves another device.
#ifndef SPARSE_ATTN_CUDA_KERNELS_FOR
#define SPARSE_ATTN_CUDA_KERNELS_FOR CUDA
#endif

TORCH_LIBRARY_IMPL(sparse_attn, SPARSE_ATTN_CUDA_KERNELS_FOR, m) {
  m.impl("attention", TORCH_FN(AttentionOp::kernel<attention_cuda>));
  m.impl("attention_backward", TORCH_FN(BackwardOp::kernel<backward_cuda>));
}

}  // namespace sparse_attn
