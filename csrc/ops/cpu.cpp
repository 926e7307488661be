// From torch to the CPU kernels: checks, allocation, plans, threads.
#include <ATen/ATen.h>
#include <torch/library.h>

#include <deque>

#include "cpu/kernels.h"
#include "ops/checks.h"
#include "ops/head_patterns.h"
#include "ops/modifiers.h"
#include "ops/sink.h"
#include "ops/tensors.h"
#include "ops/threads.h"
#include "ops/workspace.h"
#include "patterns/part.h"
#include "plan/cache.h"

namespace sparse_attn {
namespace {

/// A call on its way to the kernels: their parameters, and what keeps the pointers in them alive.
class Call {
 public:
  Call(const AttentionArguments& a, const Expression& pattern, Direction direction)
      : query_(with_unit_stride(a.query)),
        key_(with_unit_stride(a.key)),
        value_(with_unit_stride(a.value)),
        modifiers_(a, pattern) {
    params = params_of(a, query_, key_, value_);
    params.modifiers = modifiers_.get();
    number_tokens(head_patterns(pattern)[0]);
    if (a.key_padding_mask) {
      padding_ = a.key_padding_mask->contiguous();
      params.key_padding = static_cast<const std::uint8_t*>(padding_.const_data_ptr());
    }
    choose_plans(a, pattern, direction);
  }

  /// `products`: how many the kernel makes of each tile of pairs.
  void run(const cpu::Kernel& kernel, int products) {
    const Parallel parallel = torch_threads(work(products));
    const Workspace workspace(kernel.workspace(params, parallel.threads));
    params.workspace = workspace.data();
    kernel.run(params, parallel);
  }

  /// Outputs and their gradients, for whatever follows the forward pass.
  void set_outputs(const at::Tensor& output, const at::Tensor& lse) {
    params.output = const_view(keep(with_unit_stride(output)));
    params.lse = const_cast<void*>(keep(lse.contiguous()).const_data_ptr());
  }
  void set_gradients(const BackwardArguments& a) {
    set_outputs(a.output, a.logsumexp);
    params.grad_output = const_view(keep(with_unit_stride(a.grad_output)));
    if (a.grad_logsumexp) params.grad_lse = keep(a.grad_logsumexp->contiguous()).const_data_ptr();
  }
  void set_tangents(const Tangents& t, const CallOptions& a) {
    const auto view_of = [&](const OptionalTensor& tangent, const at::Tensor& input) {
      return const_view(keep(tangent ? with_unit_stride(*tangent) : at::zeros_like(input)));
    };
    params.query_tangent = view_of(t.query, query_);
    params.key_tangent = view_of(t.key, key_);
    params.value_tangent = view_of(t.value, value_);
    params.bias_tangent = modifiers_.table(t.bias, a.bias_kind);
    params.gate_tangent = modifiers_.table(t.gate, a.gate_kind);
  }

  AttentionParams params;

 private:
  /// Tables and dropout of a part go by the tokens of the whole.
  void number_tokens(const Expression& one_head) {
    if (one_head.word != Word::kPart || !params.modifiers.any()) return;
    const Part part = with_value_errors([&] { return Part(one_head); });
    query_tokens_ = tokens_at(part.queries, params.n_q);
    key_tokens_ = tokens_at(part.keys, params.n_k);
    params.whole = {query_tokens_.data(), key_tokens_.data(), part.whole.n_q, part.whole.n_k};
  }

  /// One plan for each example and head.
  void choose_plans(const AttentionArguments& a, const Expression& pattern, Direction direction) {
    const HeadPatterns of_heads(pattern, a.pattern_tensors, a.global_mask, params.batch,
                                params.heads);
    schedules_.resize(of_heads.size());
    const std::size_t patterns = head_patterns(pattern).size();
    const int chunks = turns(patterns, of_heads.tensors(), pattern, direction) ? 1 : 0;
    find_schedules(of_heads, direction, chunks);
    for (const std::size_t number : of_heads.numbers()) {
      plans_.push_back(&schedules_[number]->view());
      pairs_ += schedules_[number]->plan().visited;
    }
    params.plans = plans_.data();
  }

  /// Those that are not at hand are made side by side.
  void find_schedules(const HeadPatterns& of_heads, Direction direction, int chunks) {
    const Sizes sizes{params.n_q, params.n_k};
    const std::int64_t heads =
        params.batch * (direction == Direction::kBackward ? params.heads_kv : params.heads);
    std::vector<std::size_t> missing;
    for (std::size_t number = 0; number < of_heads.size(); ++number) {
      of_heads.for_one(number, [&](std::size_t i, const Expression& one, const auto&) {
        schedules_[i] = kept_schedule(one, sizes, direction, heads, chunks);
        if (!schedules_[i]) missing.push_back(i);
      });
    }
    of_heads.for_each_of(missing, [&](std::size_t i, const Expression& one, const auto& tensors) {
      schedules_[i] = with_value_errors(
          [&] { return schedule_of(one, sizes, tensors.data(), direction, heads, chunks); });
    });
  }

  /// Every key and value is taken for read, though a pattern may leave some out.
  Work work(int products) const {
    const std::int64_t sizes = params.head_dim + params.value_dim,
                       rows = params.heads * params.n_q + params.heads_kv * params.n_k,
                       numbers = params.batch * rows * sizes;
    return {static_cast<double>(products * pairs_ * sizes),
            static_cast<double>(numbers) * query_.element_size()};
  }

  /// Query heads that share a key head add to the same gradients: with different plans they must
  /// take turns.
  bool turns(std::size_t patterns, const PatternTensors& tensors, const Expression& pattern,
             Direction direction) const {
    if (direction == Direction::kForward || params.heads == params.heads_kv) return false;
    const auto group = params.heads / static_cast<std::int64_t>(patterns);
    return group % (params.heads / params.heads_kv) != 0 || tensors.heads(pattern) > 1;
  }

  /// Keeps a tensor that the parameters point into.
  const at::Tensor& keep(at::Tensor tensor) {
    kept_.push_back(std::move(tensor));
    return kept_.back();
  }

  at::Tensor query_, key_, value_, padding_;
  std::deque<at::Tensor> kept_;
  CallModifiers modifiers_;
  std::vector<std::int64_t> query_tokens_, key_tokens_;
  std::vector<std::shared_ptr<const Schedule>> schedules_;
  std::vector<const PlanView*> plans_;
  std::int64_t pairs_ = 0;  // in the tiles and lists of all heads
};

// Products of a tile of pairs: S and the output; S, dP, dQ, dK and dV. Other derivatives take about
// as many as gradients, or more.
constexpr int kForwardProducts = 2, kGradientProducts = 5;

const cpu::Kernels& kernels_for(const at::Tensor& query) {
  return with_value_errors(
      [&]() -> const cpu::Kernels& { return cpu::kernels(data_type(query.scalar_type())); });
}

Outputs attention_cpu(c10::DispatchKeySet keys, const AttentionArguments& a) {
  const Expression pattern = check_attention(a);
  if (a.sink) return with_sink(attention_cpu(keys, without_sink(a)), *a.sink);
  const at::Tensor output = empty_rows(a.query, a.value.size(3));
  const at::Tensor lse = empty_lse(a.query);
  if (is_empty(a)) return {output, lse};
  if (a.key.size(2) == 0) return without_keys(output, lse);
  Call call(a, pattern, Direction::kForward);
  call.params.output = view(output);
  call.params.lse = lse.mutable_data_ptr();
  call.run(kernels_for(a.query).forward, kForwardProducts);
  return {output, lse};
}

/// Like query, key and value; those of key and value zero-filled, as the kernels add to them.
Gradients empty_gradients(const AttentionArguments& a) {
  const at::Tensor query = empty_rows(a.query, a.query.size(3));
  if (has_no_pairs(a)) query.zero_();
  return {query, at::zeros(a.key.sizes(), a.key.options()),
          at::zeros(a.value.sizes(), a.value.options())};
}

void set_results(AttentionParams& params, const Gradients& gradients) {
  params.grad_query = view(std::get<0>(gradients));
  params.grad_key = view(std::get<1>(gradients));
  params.grad_value = view(std::get<2>(gradients));
}

Gradients backward_cpu(c10::DispatchKeySet keys, const BackwardArguments& a) {
  const Expression pattern = check_backward(a);
  if (a.sink) return backward_cpu(keys, over_keys(a));
  const Gradients gradients = empty_gradients(a);
  if (has_no_pairs(a)) return gradients;
  Call call(a, pattern, Direction::kBackward);
  call.set_gradients(a);
  set_results(call.params, gradients);
  call.run(kernels_for(a.query).backward, kGradientProducts);
  return gradients;
}

TableGradients run_tables(Call& call, const AttentionArguments& a, const Expression& pattern,
                          const cpu::Kernel& kernel) {
  const std::int64_t first = first_query(a, pattern);
  const GradientOfTable bias(a.bias, a.bias_kind, a.query, first),
      gate(a.gate, a.gate_kind, a.query, first);
  call.params.grad_bias = bias.sums();
  call.params.grad_gate = gate.sums();
  if ((a.bias || a.gate) && !has_no_pairs(a)) call.run(kernel, kGradientProducts);
  return {bias.finish(), gate.finish()};
}

TableGradients table_backward_cpu(c10::DispatchKeySet keys, const BackwardArguments& a) {
  const Expression pattern = check_backward(a);
  if (a.sink) return table_backward_cpu(keys, over_keys(a));
  Call call(a, pattern, Direction::kForward);
  call.set_gradients(a);
  return run_tables(call, a, pattern, kernels_for(a.query).table_gradients);
}

/// Runs the tangent of output and log-sum-exp, which `call` then has.
Outputs run_tangent(Call& call, const AttentionArguments& a) {
  const at::Tensor output = empty_rows(a.query, a.value.size(3)).zero_();
  const at::Tensor lse = empty_lse(a.query).zero_();
  call.params.output_tangent = view(output);
  call.params.lse_tangent = lse.mutable_data_ptr();
  if (!has_no_pairs(a)) call.run(kernels_for(a.query).tangent, kGradientProducts);
  return {output, lse};
}

Outputs tangent_cpu(c10::DispatchKeySet, const TangentArguments& a) {
  const Expression pattern = check_tangent(a);
  check_no_sink(a);
  Call call(a, pattern, Direction::kForward);
  call.set_outputs(a.output, a.logsumexp);
  call.set_tangents(a.tangents, a);
  return run_tangent(call, a);
}

SecondGradients second_cpu(c10::DispatchKeySet, const SecondArguments& a) {
  const Expression pattern = check_second(a);
  check_no_sink(a);
  const cpu::Kernels& kernels = kernels_for(a.query);
  Call by_rows(a, pattern, Direction::kForward);
  by_rows.set_gradients(a);
  by_rows.set_tangents(a.tangents, a);
  const auto [output, lse] = run_tangent(by_rows, a);
  const auto [bias, gate] = run_tables(by_rows, a, pattern, kernels.table_gradients_along);
  const Gradients gradients = empty_gradients(a);
  const auto& [query, key, value] = gradients;
  if (!has_no_pairs(a)) {
    Call call(a, pattern, Direction::kBackward);
    call.set_gradients(a);
    call.set_tangents(a.tangents, a);
    call.params.output_tangent = view(output);
    call.params.lse_tangent = lse.mutable_data_ptr();
    set_results(call.params, gradients);
    call.run(kernels.backward_along, kGradientProducts);
  }
  return {output, lse, query, key, value, bias, gate};
}

}  // namespace

TORCH_LIBRARY_IMPL(sparse_attn, CPU, m) {
  m.impl("attention", TORCH_FN(AttentionOp::kernel<attention_cpu>));
  m.impl("attention_backward", TORCH_FN(BackwardOp::kernel<backward_cpu>));
  m.impl("attention_table_backward", TORCH_FN(TableBackwardOp::kernel<table_backward_cpu>));
  m.impl("attention_tangent", TORCH_FN(TangentOp::kernel<tangent_cpu>));
  m.impl("attention_backward_backward", TORCH_FN(SecondOp::kernel<second_cpu>));
}

}  // namespace sparse_attn
