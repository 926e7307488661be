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
#include <deque>

#include "ops/checks.h"
#include "ops/device_patterns.h"
#include "ops/device_plans.h"
#include "ops/modifiers.h"
#include "ops/sink.h"
#include "ops/tensors.h"
#include "patterns/part.h"

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

const cuda::Kernels& choose_kernels(const at::Tensor& query, const at::Tensor& value,
                                    bool modified) {
  cuda::KernelChoice choice;
  choice.type = data_type(query.scalar_type());
  choice.head_size = std::max(query.size(3), value.size(3));
  choice.tf32 = query.scalar_type() == at::kFloat && allows_tf32();
  choice.modified = modified;
  choice.device = cuda::use_device(query.device().index());
  return cuda::kernels_for(choice);
}

/// Their name: simt, mma or sm90.
std::string cuda_kernels(const at::Tensor& query, const at::Tensor& value, bool modified) {
  return choose_kernels(query, value, modified).path;
}

/// What a call is for. The last are derivatives beyond the first of query, key and value: they have
/// portable kernels alone.
enum class Purpose { kForward, kBackward, kAlong };

/// A call on its way to the kernels, and what keeps the pointers in it alive.
class DeviceCall {
 public:
  DeviceCall(const AttentionArguments& a, const Expression& pattern, Purpose purpose)
      : stream_(current_stream(a.query.device())),
        capturing_(a.query.is_cuda() && cuda::is_capturing(stream_.native_handle())),
        on_device_(a, pattern, capturing_),
        modifiers_(a, pattern),
        along_(cuda::along_kernels_for(data_type(a.query.scalar_type()))),
        kernels_(purpose == Purpose::kAlong
                     ? *along_.portable
                     : choose_kernels(a.query, a.value, modifiers_.get().any())),
        pads_(std::strcmp(kernels_.path, "simt") != 0) {
    const auto patterns = head_patterns(pattern);
    const bool backward = purpose != Purpose::kForward;
    const bool mixed = on_device_.differs_by_head() || mixes_patterns(patterns.size(), a);
    if (backward && mixed) repeats_ = a.query.size(1) / a.key.size(1);
    query = laid_out(positively_scaled(a));
    key = laid_out(repeated(a.key, repeats_));
    value = laid_out(repeated(a.value, repeats_));
    call_.params = params_of(a, query, key, value);
    call_.params.scale = scale_ == 0.0 ? 1.0 : std::fabs(scale_);
    call_.params.modifiers = modifiers_.get();
    if (a.key_padding_mask) {
      padding_ = a.key_padding_mask->contiguous();
      call_.params.key_padding = static_cast<const std::uint8_t*>(padding_.const_data_ptr());
    }
    call_.stream = a.query.is_cuda() ? stream_.native_handle() : nullptr;
    find_plans(patterns, backward, a.query.device());
    on_device_.put_into(call_, *plans_, backward);
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

  void backward_along(bool wide) {
    const at::Tensor workspace = allocate(cuda::backward_along_workspace(along_, call_));
    cuda::backward_along(along_, call_, wide);
  }
  void tangent() {
    const at::Tensor workspace = allocate(cuda::tangent_workspace(along_, call_));
    cuda::tangent(along_, call_);
  }
  void grad_tables() {
    const at::Tensor workspace = allocate(cuda::grad_tables_workspace(along_, call_));
    cuda::grad_tables(along_, call_);
  }

  /// Output, log-sum-exp and their gradients, for whatever follows the forward pass.
  void set_outputs(const at::Tensor& output, const at::Tensor& lse) {
    call_.params.output = const_view(keep(laid_out(output)));
    call_.params.lse = const_cast<void*>(keep(lse.contiguous()).const_data_ptr());
  }
  void set_gradients(const BackwardArguments& a) {
    set_outputs(a.output, a.logsumexp);
    call_.params.grad_output = const_view(keep(laid_out(a.grad_output)));
    if (a.grad_logsumexp)
      call_.params.grad_lse = keep(a.grad_logsumexp->contiguous()).const_data_ptr();
  }
  void set_tangents(const Tangents& t, const AttentionArguments& a) {
    const auto of = [](const OptionalTensor& tangent, const at::Tensor& input) {
      return tangent ? *tangent : at::zeros_like(input);
    };
    const at::Tensor of_query = of(t.query, a.query);
    call_.params.query_tangent =
        const_view(keep(laid_out(scale_ > 0.0 ? of_query : of_query * query_sign())));
    call_.params.key_tangent = const_view(keep(laid_out(repeated(of(t.key, a.key), repeats_))));
    call_.params.value_tangent =
        const_view(keep(laid_out(repeated(of(t.value, a.value), repeats_))));
    call_.params.bias_tangent = modifiers_.table(t.bias, a.bias_kind);
    call_.params.gate_tangent = modifiers_.table(t.gate, a.gate_kind);
  }
  /// Keeps a tensor that the parameters point into.
  const at::Tensor& keep(at::Tensor tensor) {
    kept_.push_back(std::move(tensor));
    return kept_.back();
  }

  AttentionParams& params() { return call_.params; }
  bool adds_to_gradients() const { return cuda::adds_to_gradients(kernels_, call_); }
  /// Of the query that the kernels see, to that of the caller's.
  double query_sign() const { return scale_ < 0.0 ? -1.0 : scale_ == 0.0 ? 0.0 : 1.0; }
  std::int64_t repeats() const { return repeats_; }

  at::Tensor query, key, value;

 private:
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
    number_tokens(patterns[0]);
  }

  /// Of a part: what programs, tables and dropout go by.
  void number_tokens(const Expression& one_head) {
    if (one_head.word != Word::kPart) return;
    const auto at = [&](std::int64_t offset) {
      return reinterpret_cast<const std::int64_t*>(call_.base + offset);
    };
    const GridImage& image = *call_.image;
    const Sizes whole = whole_sizes(one_head, {});
    call_.params.whole = {at(image.query_tokens()), at(image.key_tokens()), whole.n_q, whole.n_k};
  }

  at::Tensor allocate(std::int64_t bytes) {
    at::Tensor workspace = at::empty({bytes}, query.options().dtype(at::kByte));
    call_.params.workspace = workspace.mutable_data_ptr();
    return workspace;
  }

  const c10::Stream stream_;
  const bool capturing_;
  DevicePatterns on_device_;
  CallModifiers modifiers_;
  const cuda::AlongKernels& along_;
  const cuda::Kernels& kernels_;
  const bool pads_;
  std::deque<at::Tensor> kept_;
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

/// Rows like the output whose columns are as many as the kernels write, and the caller's of them.
class OutputOf {
 public:
  OutputOf(const AttentionArguments& a, std::int64_t columns)
      : result_(empty_rows(a.query, a.value.size(3))),
        wide_(columns == result_.size(3) ? result_ : empty_rows(a.query, columns)) {}
  const at::Tensor& wide() const { return wide_; }
  at::Tensor finish() const {
    return wide_.is_same(result_) ? result_ : result_.copy_(wide_.narrow(3, 0, result_.size(3)));
  }

 private:
  at::Tensor result_, wide_;
};

Outputs attention_cuda(c10::DispatchKeySet keys, const AttentionArguments& a) {
  const Expression pattern = check_attention(a);
  check_available(a);
  if (a.sink) return with_sink(attention_cuda(keys, without_sink(a)), *a.sink);
  const c10::DeviceGuard guard(a.query.device());
  const at::Tensor lse = empty_lse(a.query);
  if (has_no_pairs(a)) return without_keys(empty_rows(a.query, a.value.size(3)), lse);
  DeviceCall call(a, pattern, Purpose::kForward);
  const OutputOf output(a, call.params().value_dim);
  call.params().output = view(output.wide());
  call.params().lse = lse.mutable_data_ptr();
  call.forward();
  return {output.finish(), lse};
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

/// Uninitialised, like query, key and value.
Gradients empty_gradients(const AttentionArguments& a) {
  return {empty_rows(a.query, a.query.size(3)), at::empty(a.key.sizes(), a.key.options()),
          at::empty(a.value.sizes(), a.value.options())};
}

Gradients zero_gradients(const AttentionArguments& a) {
  auto [query, key, value] = empty_gradients(a);
  return {query.zero_(), key.zero_(), value.zero_()};
}

/// Runs a backward pass, whichever, into new gradients.
template <class Run>
Gradients run_backward(DeviceCall& call, const AttentionArguments& a, const Run& run) {
  const auto [for_query, for_key, for_value] = empty_gradients(a);
  const bool wide = call.adds_to_gradients() || call.repeats() > 1;
  const GradientOf query(for_query, call.query, wide), key(for_key, call.key, wide),
      value(for_value, call.value, wide);
  call.params().grad_query = query.sums();
  call.params().grad_key = key.sums();
  call.params().grad_value = value.sums();
  run(wide);
  return {query.finish(call.query_sign()), key.finish(), value.finish()};
}

Gradients backward_cuda(c10::DispatchKeySet keys, const BackwardArguments& a) {
  const Expression pattern = check_backward(a);
  check_available(a);
  if (a.sink) return backward_cuda(keys, over_keys(a));
  const c10::DeviceGuard guard(a.query.device());
  if (has_no_pairs(a)) return zero_gradients(a);
  DeviceCall call(a, pattern, Purpose::kBackward);
  call.set_gradients(a);
  return run_backward(call, a, [&](bool wide) { call.backward(wide); });
}

TableGradients run_tables(DeviceCall& call, const AttentionArguments& a,
                          const Expression& pattern) {
  const std::int64_t first = first_query(a, pattern);
  const GradientOfTable bias(a.bias, a.bias_kind, a.query, first),
      gate(a.gate, a.gate_kind, a.query, first);
  call.params().grad_bias = bias.sums();
  call.params().grad_gate = gate.sums();
  if (a.bias || a.gate) call.grad_tables();
  return {bias.finish(), gate.finish()};
}

TableGradients zero_tables(const AttentionArguments& a) {
  return {empty_like_table(a.bias, a.query).zero_(), empty_like_table(a.gate, a.query).zero_()};
}

TableGradients table_backward_cuda(c10::DispatchKeySet keys, const BackwardArguments& a) {
  const Expression pattern = check_backward(a);
  check_available(a);
  if (a.sink) return table_backward_cuda(keys, over_keys(a));
  const c10::DeviceGuard guard(a.query.device());
  if (has_no_pairs(a)) return zero_tables(a);
  DeviceCall call(a, pattern, Purpose::kAlong);
  call.set_gradients(a);
  return run_tables(call, a, pattern);
}

/// Runs the tangent of output and log-sum-exp, which `call` then has.
Outputs run_tangent(DeviceCall& call, const AttentionArguments& a) {
  const OutputOf output(a, call.params().value_dim);
  const at::Tensor lse = empty_lse(a.query);
  call.params().output_tangent = view(call.keep(output.wide()));
  call.params().lse_tangent = call.keep(lse).mutable_data_ptr();
  call.tangent();
  return {output.finish(), lse};
}

Outputs zero_outputs(const AttentionArguments& a) {
  return {empty_rows(a.query, a.value.size(3)).zero_(), empty_lse(a.query).zero_()};
}

Outputs tangent_cuda(c10::DispatchKeySet, const TangentArguments& a) {
  const Expression pattern = check_tangent(a);
  check_no_sink(a);
  check_available(a);
  const c10::DeviceGuard guard(a.query.device());
  if (has_no_pairs(a)) return zero_outputs(a);
  DeviceCall call(a, pattern, Purpose::kAlong);
  call.set_outputs(a.output, a.logsumexp);
  call.set_tangents(a.tangents, a);
  return run_tangent(call, a);
}

SecondGradients second_cuda(c10::DispatchKeySet, const SecondArguments& a) {
  const Expression pattern = check_second(a);
  check_no_sink(a);
  check_available(a);
  const c10::DeviceGuard guard(a.query.device());
  if (has_no_pairs(a)) return std::tuple_cat(zero_outputs(a), zero_gradients(a), zero_tables(a));
  DeviceCall call(a, pattern, Purpose::kAlong);
  call.set_gradients(a);
  call.set_tangents(a.tangents, a);
  const Outputs outputs = run_tangent(call, a);
  const TableGradients tables = run_tables(call, a, pattern);
  const Gradients gradients = run_backward(call, a, [&](bool wide) { call.backward_along(wide); });
  return std::tuple_cat(outputs, gradients, tables);
}

}  // namespace

// The emulator of tests/native serves another device.
#ifndef SPARSE_ATTN_CUDA_KERNELS_FOR
#define SPARSE_ATTN_CUDA_KERNELS_FOR CUDA
#endif

TORCH_LIBRARY_IMPL(sparse_attn, SPARSE_ATTN_CUDA_KERNELS_FOR, m) {
  m.impl("attention", TORCH_FN(AttentionOp::kernel<attention_cuda>));
  m.impl("attention_backward", TORCH_FN(BackwardOp::kernel<backward_cuda>));
  m.impl("attention_table_backward", TORCH_FN(TableBackwardOp::kernel<table_backward_cuda>));
  m.impl("attention_tangent", TORCH_FN(TangentOp::kernel<tangent_cuda>));
  m.impl("attention_backward_backward", TORCH_FN(SecondOp::kernel<second_cuda>));
  m.impl("_cuda_kernels", TORCH_FN(cuda_kernels));
}

}  // namespace sparse_attn
