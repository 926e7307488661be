// window_attention, dilated_attention and global_attention: the general op with the pattern said in
// plain arguments. They are composites, so that every device, transform and mode that the general
// op knows serves them too.
#include <torch/library.h>

#include <algorithm>
#include <vector>

#include "ops/checks.h"
#include "ops/sparse_attn.h"

namespace sparse_attn {
namespace {

Expression window(std::int64_t left, std::int64_t right, std::int64_t dilation) {
  return {Word::kWindow, {left, right, dilation}, {}};
}

/// Beyond this no tensor has tokens, and below it their arithmetic does not overflow.
constexpr std::int64_t kMostTokens = std::int64_t{1} << 59;

/// Tokens in any order, as the ascending runs of an expression.
std::vector<std::int64_t> runs_of(at::IntArrayRef tokens) {
  std::vector<std::int64_t> sorted(tokens.begin(), tokens.end());
  std::sort(sorted.begin(), sorted.end());
  std::vector<std::int64_t> runs;
  for (const std::int64_t t : sorted) {
    TORCH_CHECK_VALUE(-kMostTokens < t && t < kMostTokens, "sparse_attn: expected tokens in (",
                      -kMostTokens, ", ", kMostTokens, "), got ", t);
    const bool follows = !runs.empty() && t <= runs.back() && (runs.back() != 0 || t < 0);
    if (follows) {
      runs.back() = std::max(runs.back(), t + 1);
    } else {
      runs.insert(runs.end(), {t, t + 1});
    }
  }
  return runs;
}

Expression window_and_tokens(at::IntArrayRef tokens, std::int64_t left, std::int64_t right,
                             std::int64_t dilation) {
  const std::vector<std::int64_t> runs = runs_of(tokens);
  return {Word::kUnion,
          {},
          {window(left, right, dilation),
           {Word::kGlobalKeys, runs, {}},
           {Word::kGlobalQueries, runs, {}}}};
}

Outputs forward(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                at::IntArrayRef pattern, const OptionalTensor& key_padding_mask,
                const OptionalTensor& global_mask, std::optional<double> scale, bool enable_gqa) {
  AttentionArguments arguments{query, key, value, pattern};
  arguments.key_padding_mask = key_padding_mask;
  arguments.global_mask = global_mask;
  arguments.scale = scale;
  arguments.enable_gqa = enable_gqa;
  return call_attention(arguments);
}

Outputs window_front(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                     std::int64_t left, std::optional<std::int64_t> right,
                     const OptionalTensor& key_padding_mask, const OptionalTensor& global_mask,
                     std::optional<double> scale, bool enable_gqa) {
  return forward(query, key, value, encode(window(left, right.value_or(left), 1)), key_padding_mask,
                 global_mask, scale, enable_gqa);
}

Outputs dilated_front(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                      std::int64_t left, std::optional<std::int64_t> right, std::int64_t dilation,
                      const OptionalTensor& key_padding_mask, const OptionalTensor& global_mask,
                      std::optional<double> scale, bool enable_gqa) {
  return forward(query, key, value, encode(window(left, right.value_or(left), dilation)),
                 key_padding_mask, global_mask, scale, enable_gqa);
}

Outputs global_front(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                     at::IntArrayRef tokens, std::int64_t left, std::optional<std::int64_t> right,
                     std::int64_t dilation, const OptionalTensor& key_padding_mask,
                     const OptionalTensor& global_mask, std::optional<double> scale,
                     bool enable_gqa) {
  return forward(query, key, value,
                 encode(window_and_tokens(tokens, left, right.value_or(left), dilation)),
                 key_padding_mask, global_mask, scale, enable_gqa);
}

/// The tensors that a backward front passes on.
struct Saved {
  const at::Tensor& grad_output;
  const OptionalTensor& grad_logsumexp;
  const at::Tensor &query, &key, &value, &output, &logsumexp;
};

Gradients backward(const Saved& s, const Expression& pattern,
                   const OptionalTensor& key_padding_mask, const OptionalTensor& global_mask,
                   std::optional<double> scale, bool enable_gqa) {
  return call_backward({s.grad_output,
                        s.grad_logsumexp,
                        s.query,
                        s.key,
                        s.value,
                        s.output,
                        s.logsumexp,
                        encode(pattern),
                        {},
                        key_padding_mask,
                        global_mask,
                        scale,
                        enable_gqa});
}

Gradients window_backward(const at::Tensor& grad_output, const OptionalTensor& grad_logsumexp,
                          const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                          const at::Tensor& output, const at::Tensor& logsumexp, std::int64_t left,
                          std::optional<std::int64_t> right, const OptionalTensor& key_padding_mask,
                          const OptionalTensor& global_mask, std::optional<double> scale,
                          bool enable_gqa) {
  return backward({grad_output, grad_logsumexp, query, key, value, output, logsumexp},
                  window(left, right.value_or(left), 1), key_padding_mask, global_mask, scale,
                  enable_gqa);
}

Gradients dilated_backward(const at::Tensor& grad_output, const OptionalTensor& grad_logsumexp,
                           const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                           const at::Tensor& output, const at::Tensor& logsumexp, std::int64_t left,
                           std::optional<std::int64_t> right, std::int64_t dilation,
                           const OptionalTensor& key_padding_mask,
                           const OptionalTensor& global_mask, std::optional<double> scale,
                           bool enable_gqa) {
  return backward({grad_output, grad_logsumexp, query, key, value, output, logsumexp},
                  window(left, right.value_or(left), dilation), key_padding_mask, global_mask,
                  scale, enable_gqa);
}

Gradients global_backward(const at::Tensor& grad_output, const OptionalTensor& grad_logsumexp,
                          const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                          const at::Tensor& output, const at::Tensor& logsumexp,
                          at::IntArrayRef tokens, std::int64_t left,
                          std::optional<std::int64_t> right, std::int64_t dilation,
                          const OptionalTensor& key_padding_mask, const OptionalTensor& global_mask,
                          std::optional<double> scale, bool enable_gqa) {
  return backward({grad_output, grad_logsumexp, query, key, value, output, logsumexp},
                  window_and_tokens(tokens, left, right.value_or(left), dilation), key_padding_mask,
                  global_mask, scale, enable_gqa);
}

}  // namespace

TORCH_LIBRARY_IMPL(sparse_attn, CompositeImplicitAutograd, m) {
  m.impl("window_attention", TORCH_FN(window_front));
  m.impl("dilated_attention", TORCH_FN(dilated_front));
  m.impl("global_attention", TORCH_FN(global_front));
  m.impl("window_attention_backward", TORCH_FN(window_backward));
  m.impl("dilated_attention_backward", TORCH_FN(dilated_backward));
  m.impl("global_attention_backward", TORCH_FN(global_backward));
}

OutputAndLogsumexp attention(const at::Tensor& query, const at::Tensor& key,
                             const at::Tensor& value, at::IntArrayRef pattern, const Options& o) {
  return forward(query, key, value, pattern, o.key_padding_mask, o.global_mask, o.scale,
                 o.enable_gqa);
}

OutputAndLogsumexp window_attention(const at::Tensor& query, const at::Tensor& key,
                                    const at::Tensor& value, std::int64_t left, std::int64_t right,
                                    std::int64_t dilation, const Options& o) {
  return attention(query, key, value, encode(window(left, right, dilation)), o);
}

OutputAndLogsumexp global_attention(const at::Tensor& query, const at::Tensor& key,
                                    const at::Tensor& value, at::IntArrayRef tokens,
                                    std::int64_t left, std::int64_t right, std::int64_t dilation,
                                    const Options& o) {
  return attention(query, key, value, encode(window_and_tokens(tokens, left, right, dilation)), o);
}

}  // namespace sparse_attn
