// A whole call: the sweeps of all passes, what follows them, and the memory in between.
#pragma once

#include <cstdint>

#include "cuda/along.h"
#include "cuda/evaluate.h"
#include "cuda/kernels.h"

namespace sparse_attn::cuda {

/// Lists of keys that the device has made: ListsView[batch * heads] each.
struct DeviceLists {
  const ListsView* keys_of_query = nullptr;  // null without
  const ListsView* queries_of_key = nullptr;
  std::int32_t batch = 1;
  std::int32_t heads = 1;
};

/// Global tokens of each example: `keys` ascend, (batch, capacity_keys), and so do the `queries`
/// that stand at one of them. All on the device.
struct GlobalTokens {
  const std::int64_t* keys = nullptr;  // null without
  const std::int64_t* key_counts = nullptr;
  const std::int64_t* queries = nullptr;
  const std::int64_t* query_counts = nullptr;
  std::int64_t capacity_keys = 0;
  std::int64_t capacity_queries = 0;
};

/// A call and its plans. `image` lies at `base` on the device; its plans are those of batch
/// plan_batch times plan_heads groups of consecutive heads.
struct Call {
  AttentionParams params;  // all tensors; of the gradients their final type decides
  const GridImage* image = nullptr;
  const char* base = nullptr;
  std::int32_t plan_batch = 1;
  std::int32_t plan_heads = 1;
  ProgramTensor tensors[kMostTensors];  // of the pattern, for programs
  DeviceLists lists;
  GlobalTokens global;
  void* stream = nullptr;
};

/// Bytes of device memory that the call wants in params.workspace.
std::int64_t forward_workspace(const Kernels& kernels, const Call& call);
std::int64_t backward_workspace(const Kernels& kernels, const Call& call);

/// Whether several kernels add to the gradients: those of 16-bit tensors then have to be float32.
bool adds_to_gradients(const Kernels& kernels, const Call& call);

/// Queue everything. The gradients are zero-filled; `wide` ones are Real.
void forward(const Kernels& kernels, const Call& call);
void backward(const Kernels& kernels, const Call& call, bool wide);

/// Along the tangents of query, key, value, bias and gate. The plans are those for the grouping of
/// kernels.portable.
///
/// tangent() fills output_tangent and lse_tangent from output and lse. backward_along() takes them,
/// too, and fills the gradients with their derivatives, as backward() does and with grad_output and
/// grad_lse held fixed.
std::int64_t tangent_workspace(const AlongKernels& kernels, const Call& call);
std::int64_t backward_along_workspace(const AlongKernels& kernels, const Call& call);
void tangent(const AlongKernels& kernels, const Call& call);
void backward_along(const AlongKernels& kernels, const Call& call, bool wide);

/// Fills grad_bias and grad_gate, as far as they have a kind, with the gradients of the tables;
/// with a query_tangent with their derivatives along the tangents, from output_tangent and
/// lse_tangent. Both are zero-filled.
std::int64_t grad_tables_workspace(const AlongKernels& kernels, const Call& call);
void grad_tables(const AlongKernels& kernels, const Call& call);

}  // namespace sparse_attn::cuda
