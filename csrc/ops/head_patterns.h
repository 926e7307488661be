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

  /// Calls visit(number, expression, tensors) for one pattern, for all, or for some, several of
  /// them side by side.
  template <class Visit>
  void for_one(std::size_t number, const Visit& visit) const {
    const Job& job = jobs_[number];
    const std::vector<PatternTensor> tensors = tensors_.slices(job.example, job.head);
    if (global_tokens_.empty()) {
      visit(number, *job.pattern, tensors);
    } else {
      const auto example = static_cast<std::size_t>(job.example);
      visit(number, with_global_tokens(*job.pattern, global_tokens_[example]), tensors);
    }
  }
  template <class Visit>
  void for_each(const Visit& visit) const {
    side_by_side(size(), [&](std::size_t i) { for_one(i, visit); });
  }
  template <class Visit>
  void for_each_of(const std::vector<std::size_t>& numbers, const Visit& visit) const {
    side_by_side(numbers.size(), [&](std::size_t i) { for_one(numbers[i], visit); });
  }

 private:
  template <class Body>
  static void side_by_side(std::size_t count, const Body& body) {
    at::parallel_for(0, static_cast<std::int64_t>(count), 1, [&](auto begin, auto end) {
      for (auto i = begin; i < end; ++i) body(static_cast<std::size_t>(i));
    });
  }

  /// One of the patterns listed, for one example and head.
  struct Job {
    const Expression* pattern;
    std::int64_t example;
    std::int64_t head;
  };

  PatternTensors tensors_;
  std::vector<std::vector<std::int64_t>> global_tokens_;  // of each example; empty without a mask
  std::vector<Job> jobs_;
  std::vector<std::size_t> numbers_;
};

}  // namespace sparse_attn
