// The ops that choose keys on a GPU.
#include <ATen/ATen.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <torch/library.h>

#include "cuda/kernels.h"
#include "cuda/selection.h"
#include "ops/checks.h"
#include "ops/selection.h"

namespace sparse_attn {
namespace {

void run(cuda::SelectionLaunch cuda::SelectionKernels::* which, const at::Tensor& query,
         const cuda::SelectionArguments& arguments) {
  const SelectionParams& call = arguments.call;
  const std::int64_t blocks = call.batch * call.heads * ((call.n_q + kMaxTile - 1) / kMaxTile);
  if (blocks == 0) return;
  TORCH_CHECK_NOT_IMPLEMENTED(
      *cuda::built_for() != '\0', "sparse_attn: expected a build with CUDA kernels for tensors on ",
      query.device(), ", got one without; build it again for a CUDA build of torch, where nvcc is");
  cuda::use_device(query.device().index());
  void* const stream = query.is_cuda() ? c10::impl::VirtualGuardImpl(query.device().type())
                                             .getStream(query.device())
                                             .native_handle()
                                       : nullptr;
  (cuda::selection_kernels_for(call.dtype).*which)(blocks, stream, arguments);
}

/// Logits of the type's size as integers, and keys.
std::int64_t candidate_bytes(const at::Tensor& query) {
  return static_cast<std::int64_t>(c10::elementSize(lse_type(query)) + sizeof(std::int32_t));
}

ChosenKeys top_cuda(const SelectionArguments& a, c10::SymInt k) {
  check_top(a, k);
  const c10::DeviceGuard guard(a.query.device());
  SelectionCall call(a);
  const at::Tensor indices = zeros_of_lists(a, k), counts = zeros_of_rows(a, at::kInt);
  call.params.width = indices.size(3);
  call.params.indices = indices.mutable_data_ptr<std::int32_t>();
  call.params.counts = counts.mutable_data_ptr<std::int32_t>();
  const std::int64_t room = cuda::candidate_room(std::min(call.params.width, call.params.n_k));
  const at::Tensor workspace = at::empty({counts.numel() * room * candidate_bytes(a.query)},
                                         a.query.options().dtype(at::kByte));
  call.params.workspace = workspace.mutable_data_ptr();
  run(&cuda::SelectionKernels::top, a.query, {call.params, room});
  return {indices, counts};
}

/// Counted first; then the host waits for the longest list, and they are written.
ChosenKeys above_cuda(const SelectionArguments& a, const at::Tensor& bounds) {
  check_bounds(a, bounds);
  const c10::DeviceGuard guard(a.query.device());
  SelectionCall call(a);
  const at::Tensor given = bounds.contiguous(), counts = zeros_of_rows(a, at::kInt);
  call.params.bounds = given.const_data_ptr();
  call.params.counts = counts.mutable_data_ptr<std::int32_t>();
  run(&cuda::SelectionKernels::above, a.query, {call.params, 0});
  call.params.width = counts.numel() == 0 ? 0 : counts.max().item<std::int32_t>();
  const at::Tensor indices = zeros_of_lists(a, call.params.width);
  call.params.indices = indices.mutable_data_ptr<std::int32_t>();
  if (call.params.width > 0) run(&cuda::SelectionKernels::above, a.query, {call.params, 0});
  return {indices, counts};
}

at::Tensor lse_cuda(const SelectionArguments& a) {
  check_selection(a);
  const c10::DeviceGuard guard(a.query.device());
  SelectionCall call(a);
  const at::Tensor lse = zeros_of_rows(a, at::kDouble);
  call.params.lse = lse.mutable_data_ptr<double>();
  run(&cuda::SelectionKernels::lse, a.query, {call.params, 0});
  return lse;
}

}  // namespace

// The emulator of tests/native serves another device.
#ifndef SPARSE_ATTN_CUDA_KERNELS_FOR
#define SPARSE_ATTN_CUDA_KERNELS_FOR CUDA
#endif

TORCH_LIBRARY_IMPL(sparse_attn, SPARSE_ATTN_CUDA_KERNELS_FOR, m) {
  implement_selection<top_cuda, above_cuda, lse_cuda>(m);
}

}  // namespace sparse_attn
