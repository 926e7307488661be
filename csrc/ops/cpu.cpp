// From torch to the CPU kernels: checks, allocation, plans, threads.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include "cpu/kernels.h"
#include "ops/checks.h"
#include "ops/pattern_tensors.h"
#include "ops/tensors.h"
#include "plan/cache.h"

namespace sparse_attn {
namespace {

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
    params = params_of(a, query_, key_, value_);
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
  /// What a plan is made from: one of the patterns listed, for one example and head.
  struct Job {
    const Expression* pattern;
    std::int64_t example;
    std::int64_t head;
  };

  /// One plan for each example and head. Most calls have the same one throughout, and the cache
  /// makes it once; those that differ are made side by side.
  void choose_plans(const AttentionArguments& a, const Expression& pattern, Direction direction) {
    const auto patterns = head_patterns(pattern);
    const auto group = params.heads / static_cast<std::int64_t>(patterns.size());
    const PatternTensors tensors(pattern, a.pattern_tensors);
    const auto tokens =
        a.global_mask ? global_tokens(*a.global_mask) : std::vector<std::vector<std::int64_t>>();
    std::vector<Job> jobs;
    std::vector<std::size_t> job_of;
    for (std::int64_t b = 0; b < params.batch; ++b) {
      for (std::int64_t h = 0; h < params.heads; ++h) {
        const Expression& one = patterns[static_cast<std::size_t>(h / group)];
        const bool as_before = h % group != 0 && tensors.heads(one) == 1;
        const bool as_first = b > 0 && !a.global_mask && tensors.batch(one) == 1;
        if (as_first) {
          job_of.push_back(job_of[static_cast<std::size_t>(h)]);
        } else {
          if (!as_before) jobs.push_back({&one, b, h});
          job_of.push_back(jobs.size() - 1);
        }
      }
    }
    schedules_.resize(jobs.size());
    const int chunks = turns(patterns.size(), tensors, pattern, direction) ? 1 : 0;
    at::parallel_for(0, static_cast<std::int64_t>(jobs.size()), 1, [&](auto begin, auto end) {
      for (auto i = static_cast<std::size_t>(begin); i < static_cast<std::size_t>(end); ++i) {
        const Job& job = jobs[i];
        const Expression* one = job.pattern;
        Expression with_tokens;
        if (a.global_mask) {
          with_tokens = with_global_tokens(*one, tokens[static_cast<std::size_t>(job.example)]);
          one = &with_tokens;
        }
        schedules_[i] =
            make_schedule(*one, tensors.slices(job.example, job.head), direction, chunks);
      }
    });
    for (const std::size_t job : job_of) plans_.push_back(&schedules_[job]->view());
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
