// The patterns of all examples and heads of a call, with the tokens of a global mask in them.
#pragma once

#include <ATen/Parallel.h>

#include <vector>

#include "ops/pattern_tensors.h"

namespace sparse_attn {

/// Most calls have one pattern throughout: those that are alike come once.
class HeadPatterns {
 public:
  /// `pattern` outlives this; `global_mask` is (batch, n_k), on the CPU.
  HeadPatterns(const Expression& pattern, const OptionalTensors& tensors,
               const OptionalTensor& global_mask, std::int64_t batch, std::int64_t heads);

  std::size_t size() const { return jobs_.size(); }
  /// For each of batch x heads the number of its pattern.
  const std::vector<std::size_t>& numbers() const { return numbers_; }
  const PatternTensors& tensors() const { return tensors_; }

  /// Calls visit(number, expression, tensors) for each pattern, side by side.
  template <class Visit>
  void for_each(const Visit& visit) const {
    at::parallel_for(0, static_cast<std::int64_t>(size()), 1, [&](auto begin, auto end) {
      for (auto i = static_cast<std::size_t>(begin); i < static_cast<std::size_t>(end); ++i)
        visit(i, expression(jobs_[i]), tensors_.slices(jobs_[i].example, jobs_[i].head));
    });
  }

 private:
  /// One of the patterns listed, for one example and head.
  struct Job {
    const Expression* pattern;
    std::int64_t example;
    std::int64_t head;
  };

  Expression expression(const Job& job) const;

  PatternTensors tensors_;
  std::vector<std::vector<std::int64_t>> global_tokens_;  // of each example; empty without a mask
  std::vector<Job> jobs_;
  std::vector<std::size_t> numbers_;
};

}  // namespace sparse_attn
