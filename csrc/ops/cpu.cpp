// From torch to the CPU kernels: checks, allocation, plans, threads.
#include <ATen/ATen.h>
#include <torch/library.h>

#include "cpu/kernels.h"
#include "ops/checks.h"
#include "ops/head_patterns.h"
#include "ops/tensors.h"
#include "ops/threads.h"
#include "plan/cache.h"

namespace sparse_attn {
namespace {

/// A call on its way to the kernels: their parameters, and what keeps the pointers in them alive.
class Call {
 public:
  Call(const AttentionArguments& a, const Expression& pattern, Direction direction)
      : query_(with_unit_stride(a.query)),
        key_(with_unit_stride(a.key)),
        value_(with_unit_stride(a.value)) {
    params = params_of(a, query_, key_, value_);
    if (a.key_padding_mask) {
      padding_ = a.key_padding_mask->contiguous();
      params.key_padding = static_cast<const std::uint8_t*>(padding_.const_data_ptr());
    }
    choose_plans(a, pattern, direction);
  }

  template <class Workspace, class Kernel>
  void run(Workspace workspace_size, Kernel kernel) {
    const Parallel parallel = torch_threads();
    const at::Tensor workspace = at::empty({workspace_size(params, parallel.threads)}, at::kByte);
    params.workspace = workspace.mutable_data_ptr();
    kernel(params, parallel);
  }

  AttentionParams params;

 private:
  /// One plan for each example and head; those that differ are made side by side.
  void choose_plans(const AttentionArguments& a, const Expression& pattern, Direction direction) {
    const HeadPatterns of_heads(pattern, a.pattern_tensors, a.global_mask, params.batch,
                                params.heads);
    schedules_.resize(of_heads.size());
    const std::size_t patterns = head_patterns(pattern).size();
    const int chunks = turns(patterns, of_heads.tensors(), pattern, direction) ? 1 : 0;
    of_heads.for_each([&](std::size_t i, const Expression& one, const auto& tensors) {
      schedules_[i] = make_schedule(one, tensors, direction, chunks);
    });
    for (const std::size_t number : of_heads.numbers())
      plans_.push_back(&schedules_[number]->view());
    params.plans = plans_.data();
  }

  std::shared_ptr<const Schedule> make_schedule(const Expression& pattern,
                                                const std::vector<PatternTensor>& tensors,
                                                Direction direction, int chunks) const {
    const std::int64_t heads =
        params.batch * (direction == Direction::kBackward ? params.heads_kv : params.heads);
    return with_value_errors([&] {
      return schedule_of(pattern, {params.n_q, params.n_k}, tensors.data(), direction, heads,
                         chunks);
    });
  }

  /// Query heads that share a key head add to the same gradients: with different plans they must
  /// take turns.
  bool turns(std::size_t patterns, const PatternTensors& tensors, const Expression& pattern,
             Direction direction) const {
    if (direction == Direction::kForward || params.heads == params.heads_kv) return false;
    const auto group = params.heads / static_cast<std::int64_t>(patterns);
    return group % (params.heads / params.heads_kv) != 0 || tensors.heads(pattern) > 1;
  }

  at::Tensor query_, key_, value_, padding_;
  std::vector<std::shared_ptr<const Schedule>> schedules_;
  std::vector<const PlanView*> plans_;
};

const cpu::Kernels& kernels_for(const at::Tensor& query) {
  return with_value_errors(
      [&]() -> const cpu::Kernels& { return cpu::kernels(data_type(query.scalar_type())); });
}

Outputs attention_cpu(c10::DispatchKeySet, const AttentionArguments& a) {
  const Expression pattern = check_attention(a);
  const at::Tensor output = empty_rows(a.query, a.value.size(3));
  const at::Tensor lse = empty_lse(a.query);
  if (is_empty(a)) return {output, lse};
  if (a.key.size(2) == 0) return without_keys(output, lse);
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
