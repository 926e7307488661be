#include "ops/head_patterns.h"

#include "ops/checks.h"

namespace sparse_attn {
namespace {

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

}  // namespace

HeadPatterns::HeadPatterns(const Expression& pattern, const OptionalTensors& tensors,
                           const OptionalTensor& global_mask, std::int64_t batch,
                           std::int64_t heads)
    : tensors_(pattern, tensors) {
  if (global_mask) global_tokens_ = global_tokens(*global_mask);
  const auto patterns = head_patterns(pattern);
  const auto group = heads / static_cast<std::int64_t>(patterns.size());
  for (std::int64_t b = 0; b < batch; ++b) {
    for (std::int64_t h = 0; h < heads; ++h) {
      const Expression& one = patterns[static_cast<std::size_t>(h / group)];
      const bool as_before = h % group != 0 && tensors_.heads(one) == 1;
      const bool as_first = b > 0 && !global_mask && tensors_.batch(one) == 1;
      if (as_first) {
        numbers_.push_back(numbers_[static_cast<std::size_t>(h)]);
      } else {
        if (!as_before) jobs_.push_back({&one, b, h});
        numbers_.push_back(jobs_.size() - 1);
      }
    }
  }
}

}  // namespace sparse_attn
