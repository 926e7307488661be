// From torch to the CPU kernels: checks, allocation, plans, threads.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include "cpu/kernels.h"
#include "ops/checks.h"
#include "plan/cache.h"

namespace sparse_attn {
namespace {

DataType data_type(at::ScalarType type) {
  switch (type) {
    case at::kDouble:
      return DataType::kFloat64;
    case at::kBFloat16:
      return DataType::kBFloat16;
    case at::kHalf:
      return DataType::kFloat16;
    default:
      return DataType::kFloat32;
  }
}

/// Strides are free as long as the last one is 1.
at::Tensor with_unit_stride(const at::Tensor& tensor) {
  return tensor.stride(-1) == 1 || tensor.size(-1) <= 1 ? tensor : tensor.contiguous();
}

TensorView view(const at::Tensor& tensor) {
  return {tensor.mutable_data_ptr(), tensor.stride(0), tensor.stride(1), tensor.stride(2)};
}

/// A constant tensor may be shared copy-on-write: reading it must not copy it.
TensorView const_view(const at::Tensor& tensor) {
  return {const_cast<void*>(tensor.const_data_ptr()), tensor.stride(0), tensor.stride(1),
          tensor.stride(2)};
}

void run_threads(int threads, void (*body)(void*, int), void* context) {
  at::parallel_for(0, threads, 1, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t t = begin; t < end; ++t) body(context, static_cast<int>(t));
  });
}

/// The tokens that each example's row of the mask names.
std::vector<std::vector<std::int64_t>> global_tokens(const at::Tensor& mask) {
  const at::Tensor rows = mask.contiguous();
  const bool* data = rows.const_data_ptr<bool>();
  std::vector<std::vector<std::int64_t>> tokens(static_cast<std::size_t>(rows.size(0)));
  for (std::int64_t b = 0; b < rows.size(0); ++b) {
    for (std::int64_t i = 0; i < rows.size(1); ++i) {
      if (data[b * rows.size(1) + i]) tokens[static_cast<std::size_t>(b)].push_back(i);
    }
  }
  return tokens;
}

/// A call on its way to the kernels: their parameters, and what keeps the pointers in them alive.
class Call {
 public:
  Call(const AttentionArguments& a, const Expression& pattern, Direction direction)
      : query_(with_unit_stride(a.query)),
        key_(with_unit_stride(a.key)),
        value_(with_unit_stride(a.value)) {
    params.dtype = data_type(a.query.scalar_type());
    params.batch = a.query.size(0);
    params.heads = a.query.size(1);
    params.heads_kv = a.key.size(1);
    params.n_q = a.query.size(2);
    params.n_k = a.key.size(2);
    params.head_dim = a.query.size(3);
    params.value_dim = a.value.size(3);
    params.scale = a.scale.value_or(default_scale(a.query));
    params.query = const_view(query_);
    params.key = const_view(key_);
    params.value = const_view(value_);
    if (a.key_padding_mask) {
      padding_ = a.key_padding_mask->contiguous();
      params.key_padding = static_cast<const std::uint8_t*>(padding_.const_data_ptr());
    }
    choose_plans(a, pattern, direction);
  }

  template <class Workspace, class Kernel>
  void run(Workspace workspace_size, Kernel kernel) {
    const Parallel parallel{at::get_num_threads(), run_threads};
    const at::Tensor workspace = at::empty({workspace_size(params, parallel.threads)}, at::kByte);
    params.workspace = workspace.mutable_data_ptr();
    kernel(params, parallel);
  }

  AttentionParams params;

 private:
  /// One plan for each example and head; most calls have the same one throughout, and the cache
  /// makes it once.
  void choose_plans(const AttentionArguments& a, const Expression& pattern, Direction direction) {
    const Sizes sizes{params.n_q, params.n_k};
    const auto patterns = head_patterns(pattern);
    const auto group = params.heads / static_cast<std::int64_t>(patterns.size());
    const bool backward = direction == Direction::kBackward;
    const std::int64_t heads = params.batch * (backward ? params.heads_kv : params.heads);
    // Query heads that share a key head add to the same gradients: with different plans they must
    // take turns.
    const int chunks = backward && group % (params.heads / params.heads_kv) != 0 ? 1 : 0;
    const auto tokens =
        a.global_mask
            ? global_tokens(*a.global_mask)
            : std::vector<std::vector<std::int64_t>>(static_cast<std::size_t>(params.batch));
    for (std::int64_t b = 0; b < params.batch; ++b) {
      for (const Expression& one : patterns) {
        schedules_.push_back(with_value_errors([&] {
          const auto& extra = tokens[static_cast<std::size_t>(b)];
          if (extra.empty()) return cached_schedule(one, sizes, direction, heads, chunks);
          return cached_schedule(with_global_tokens(one, extra), sizes, direction, heads, chunks);
        }));
        plans_.insert(plans_.end(), static_cast<std::size_t>(group), &schedules_.back()->view());
      }
    }
    params.plans = plans_.data();
  }

  at::Tensor query_, key_, value_, padding_;
  std::vector<std::shared_ptr<const Schedule>> schedules_;
  std::vector<const PlanView*> plans_;
};

bool is_empty(const AttentionArguments& a) {
  return a.query.size(0) == 0 || a.query.size(1) == 0 || a.query.size(2) == 0;
}

const cpu::Kernels& kernels_for(const at::Tensor& query) {
  return with_value_errors(
      [&]() -> const cpu::Kernels& { return cpu::kernels(data_type(query.scalar_type())); });
}

Outputs attention_cpu(c10::DispatchKeySet, const AttentionArguments& a) {
  const Expression pattern = check_attention(a);
  const at::Tensor output = empty_rows(a.query, a.value.size(3));
  const at::Tensor lse = at::empty({a.query.size(0), a.query.size(1), a.query.size(2)},
                                   a.query.options().dtype(lse_type(a.query)));
  if (is_empty(a)) return {output, lse};
  if (a.key.size(2) == 0)
    return {output.zero_(), lse.fill_(-std::numeric_limits<double>::infinity())};
  Call call(a, pattern, Direction::kForward);
  call.params.output = view(output);
  call.params.lse = lse.mutable_data_ptr();
  const cpu::Kernels& kernels = kernels_for(a.query);
  call.run(kernels.forward_workspace, kernels.forward);
  return {output, lse};
}

Gradients backward_cpu(c10::DispatchKeySet, const BackwardArguments& a) {
  const Expression pattern = check_backward(a);
  const AttentionArguments forward = a.forward();
  const at::Tensor grad_query = empty_rows(a.query, a.query.size(3));
  const at::Tensor grad_key = at::zeros(a.key.sizes(), a.key.options());
  const at::Tensor grad_value = at::zeros(a.value.sizes(), a.value.options());
  if (is_empty(forward) || a.key.size(2) == 0) return {grad_query.zero_(), grad_key, grad_value};
  Call call(forward, pattern, Direction::kBackward);
  const at::Tensor grad_output = with_unit_stride(a.grad_output),
                   output = with_unit_stride(a.output);
  const at::Tensor lse = a.logsumexp.contiguous();
  const at::Tensor grad_lse = a.grad_logsumexp ? a.grad_logsumexp->contiguous() : at::Tensor();
  call.params.grad_output = const_view(grad_output);
  call.params.output = const_view(output);
  call.params.lse = const_cast<void*>(lse.const_data_ptr());
  call.params.grad_lse = grad_lse.defined() ? grad_lse.const_data_ptr() : nullptr;
  call.params.grad_query = view(grad_query);
  call.params.grad_key = view(grad_key);
  call.params.grad_value = view(grad_value);
  const cpu::Kernels& kernels = kernels_for(a.query);
  call.run(kernels.backward_workspace, kernels.backward);
  return {grad_query, grad_key, grad_value};
}

}  // namespace

TORCH_LIBRARY_IMPL(sparse_attn, CPU, m) {
  m.impl("attention", TORCH_FN(attention_kernel<attention_cpu>));
  m.impl("attention_backward", TORCH_FN(backward_kernel<backward_cpu>));
}

}  // namespace sparse_attn
