// What is known of a pattern on its device only, as kernels read it: layouts, lists of keys, global
// tokens of each example. Made of torch's own ops, without waiting for the device; lists are sorted
// and checked, which waits once unless a graph is being captured.
#pragma once

#include <ATen/ATen.h>

#include <array>
#include <vector>

#include "cuda/run.h"
#include "ops/arguments.h"
#include "ops/device_plans.h"
#include "ops/pattern_tensors.h"

namespace sparse_attn {

class DevicePatterns {
 public:
  /// `capturing`: no one may wait.
  DevicePatterns(const AttentionArguments& arguments, const Expression& pattern, bool capturing);

  /// Of the tensors that programs read, the one that says which tokens are global; -1 if none does.
  std::int32_t global_tensor() const { return global_tensor_; }
  /// Whether heads differ by tensors of their own.
  bool differs_by_head() const { return heads_ > 1; }

  /// Fills in the call, whose sizes, plans and stream are set. With `backward` also what queries
  /// see each key.
  void put_into(cuda::Call& call, const DevicePlans& plans, bool backward);

 private:
  void add_tensors(const Expression& pattern, const OptionalTensors& given, std::int64_t n_k,
                   bool capturing);
  void add_globals(const at::Tensor& mask);
  void make_globals(cuda::Call& call, const DevicePlans& plans);
  void make_lists(cuda::Call& call, const DevicePlans& plans, bool backward);

  std::vector<at::Tensor> kept_;  // what the pointers below look into
  std::array<ProgramTensor, kMostTensors> tensors_{};
  std::int32_t next_tensor_ = 0, global_tensor_ = -1;
  std::int64_t widest_list_ = 0;
  std::int64_t batch_ = 1, heads_ = 1;  // how many slices differ, of all tensors
  at::Tensor global_mask_;
};

}  // namespace sparse_attn
