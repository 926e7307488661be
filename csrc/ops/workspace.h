// The memory that kernels of one call work in.
#pragma once

#include <ATen/ATen.h>

#include <utility>

namespace sparse_attn {

/// A block that its thread keeps for its next call: given back to the system and taken again, it
/// cost small backward passes up to 8 page faults each, as the heap happened to lie. Large blocks
/// are not kept: calls that need them are long.
class Workspace {
 public:
  explicit Workspace(std::int64_t bytes) : memory_(std::exchange(kept(), {})) {
    if (!memory_.defined() || memory_.numel() < bytes) memory_ = at::empty({bytes}, at::kByte);
  }
  ~Workspace() {
    if (memory_.numel() <= kMostKept) kept() = std::move(memory_);
  }
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;

  void* data() const { return memory_.mutable_data_ptr(); }

 private:
  static constexpr std::int64_t kMostKept = std::int64_t{4} << 20;
  static at::Tensor& kept() {
    static thread_local at::Tensor memory;
    return memory;
  }

  at::Tensor memory_;
};

}  // namespace sparse_attn
