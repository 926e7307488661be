// The tensors of a pattern (layouts, indices), as the plan reads them: one head's slice at a time.
#pragma once

#include <ATen/ATen.h>

#include <vector>

#include "ops/arguments.h"
#include "patterns/expand.h"

namespace sparse_attn {

class PatternTensors {
 public:
  PatternTensors() = default;
  PatternTensors(const Expression& pattern, const OptionalTensors& given);

  /// All of them, with batch and heads (1 where they are alike).
  std::vector<at::Tensor> tensors() const;

  /// Of each tensor the slice for one example and head, in the order of the pattern.
  std::vector<PatternTensor> slices(std::int64_t example, std::int64_t head) const;

  /// How many slices differ, at most, among those of an expression within the pattern: 1 where a
  /// dimension is missing or 1.
  std::int64_t batch(const Expression& part) const { return largest(part, 0); }
  std::int64_t heads(const Expression& part) const { return largest(part, 1); }

 private:
  std::int64_t largest(const Expression& part, int dim) const;

  struct OneTensor {
    at::Tensor data;  // (batch or 1, heads or 1, ...), contiguous; bool, int32 or int64
    std::int64_t columns;
  };
  std::vector<OneTensor> tensors_;
};

}  // namespace sparse_attn
