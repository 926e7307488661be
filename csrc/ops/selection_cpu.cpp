// The ops that choose keys on the CPU.
#include <ATen/ATen.h>
#include <torch/library.h>

#include "cpu/kernels.h"
#include "ops/checks.h"
#include "ops/selection.h"
#include "ops/threads.h"
#include "ops/workspace.h"

namespace sparse_attn {
namespace {

void run(cpu::SelectionKernel cpu::SelectionKernels::* which, SelectionParams& params) {
  if (params.batch * params.heads * params.n_q == 0) return;
  const cpu::Kernels& kernels =
      with_value_errors([&]() -> const cpu::Kernels& { return cpu::kernels(params.dtype); });
  const cpu::SelectionKernel& kernel = kernels.selection->*which;
  const Parallel parallel = torch_threads();
  const Workspace workspace(kernel.workspace(params, parallel.threads));
  params.workspace = workspace.data();
  kernel.run(params, parallel);
}

ChosenKeys top_cpu(const SelectionArguments& a, c10::SymInt k) {
  check_top(a, k);
  SelectionCall call(a);
  const at::Tensor indices = zeros_of_lists(a, k), counts = zeros_of_rows(a, at::kInt);
  call.params.width = indices.size(3);
  call.params.indices = indices.mutable_data_ptr<std::int32_t>();
  call.params.counts = counts.mutable_data_ptr<std::int32_t>();
  run(&cpu::SelectionKernels::top, call.params);
  return {indices, counts};
}

/// Counted first, then listed.
ChosenKeys above_cpu(const SelectionArguments& a, const at::Tensor& bounds) {
  check_bounds(a, bounds);
  SelectionCall call(a);
  const at::Tensor given = bounds.contiguous(), counts = zeros_of_rows(a, at::kInt);
  call.params.bounds = given.const_data_ptr();
  call.params.counts = counts.mutable_data_ptr<std::int32_t>();
  run(&cpu::SelectionKernels::above, call.params);
  call.params.width = counts.numel() == 0 ? 0 : counts.max().item<std::int32_t>();
  const at::Tensor indices = zeros_of_lists(a, call.params.width);
  call.params.indices = indices.mutable_data_ptr<std::int32_t>();
  if (call.params.width > 0) run(&cpu::SelectionKernels::above, call.params);
  return {indices, counts};
}

at::Tensor lse_cpu(const SelectionArguments& a) {
  check_selection(a);
  SelectionCall call(a);
  const at::Tensor lse = zeros_of_rows(a, at::kDouble);
  call.params.lse = lse.mutable_data_ptr<double>();
  run(&cpu::SelectionKernels::lse, call.params);
  return lse;
}

}  // namespace

TORCH_LIBRARY_IMPL(sparse_attn, CPU, m) { implement_selection<top_cpu, above_cpu, lse_cpu>(m); }

}  // namespace sparse_attn
