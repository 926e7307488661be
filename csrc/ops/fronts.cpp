// window_attention, dilated_attention, global_attention and index_attention: the general op with
// the pattern said in plain arguments. They are composites, so that every device, transform and
// mode that the general op knows serves them too.
#include <torch/library.h>

#include <algorithm>
#include <vector>

#include "ops/checks.h"
#include "ops/sparse_attn.h"

namespace sparse_attn {
namespace {

/// A pattern with the tensors that it takes.
struct FrontPattern {
  Expression expression;
  std::vector<at::Tensor> tensors = {};
};

Expression window(std::int64_t left, std::int64_t right, std::int64_t dilation) {
  return {Word::kWindow, {left, right, dilation}, {}, 0};
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

FrontPattern window_pattern(std::int64_t left, std::optional<std::int64_t> right) {
  return {window(left, right.value_or(left), 1)};
}

FrontPattern dilated_pattern(std::int64_t left, std::optional<std::int64_t> right,
                             std::int64_t dilation) {
  return {window(left, right.value_or(left), dilation)};
}

FrontPattern global_pattern(at::IntArrayRef tokens, std::int64_t left,
                            std::optional<std::int64_t> right, std::int64_t dilation) {
  const std::vector<std::int64_t> runs = runs_of(tokens);
  return {{Word::kUnion,
           {},
           {window(left, right.value_or(left), dilation),
            {Word::kGlobalKeys, runs, {}, 0},
            {Word::kGlobalQueries, runs, {}, 0}},
           0}};
}

FrontPattern index_pattern(const at::Tensor& indices, const OptionalTensor& counts) {
  FrontPattern pattern{{Word::kKeyLists, {counts.has_value()}, {}, 0}, {indices}};
  if (counts) pattern.tensors.push_back(*counts);
  return pattern;
}

/// The ops of fronts that take these options, in the order of CallOptions after the pattern.
template <class... Option>
struct WithOptions {
  /// Those of a front whose pattern is made of these arguments.
  template <class... Argument>
  struct Front {
    template <FrontPattern (*kPattern)(Argument...)>
    static Outputs forward(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                           Argument... arguments, Option... options) {
      const FrontPattern pattern = kPattern(arguments...);
      const Words words = encode(pattern.expression);
      const at::ArrayRef<at::Tensor> tensors(pattern.tensors);
      return attention_op().call({{words, tensors, options...}, query, key, value});
    }

    template <FrontPattern (*kPattern)(Argument...)>
    static Gradients backward(const at::Tensor& grad_output, const OptionalTensor& grad_logsumexp,
                              const at::Tensor& query, const at::Tensor& key,
                              const at::Tensor& value, const at::Tensor& output,
                              const at::Tensor& logsumexp, Argument... arguments,
                              Option... options) {
      const FrontPattern pattern = kPattern(arguments...);
      const Words words = encode(pattern.expression);
      const at::ArrayRef<at::Tensor> tensors(pattern.tensors);
      return backward_op().call({{{words, tensors, options...}, query, key, value},
                                 grad_output,
                                 grad_logsumexp,
                                 output,
                                 logsumexp});
    }
  };
};

template <class... Argument>
using Front =
    WithOptions<OptionalArgument, OptionalArgument, OptionalArgument, std::int64_t,
                OptionalArgument, std::int64_t, double, OptionalArgument, std::optional<double>,
                std::optional<double>, OptionalArgument, bool>::Front<Argument...>;

using Right = std::optional<std::int64_t>;
using WindowFront = Front<std::int64_t, Right>;
using DilatedFront = Front<std::int64_t, Right, std::int64_t>;
using GlobalFront = Front<at::IntArrayRef, std::int64_t, Right, std::int64_t>;
using IndexFront = Front<const at::Tensor&, const OptionalTensor&>;

}  // namespace

TORCH_LIBRARY_IMPL(sparse_attn, CompositeImplicitAutograd, m) {
  m.impl("window_attention", TORCH_FN(WindowFront::forward<window_pattern>));
  m.impl("window_attention_backward", TORCH_FN(WindowFront::backward<window_pattern>));
  m.impl("dilated_attention", TORCH_FN(DilatedFront::forward<dilated_pattern>));
  m.impl("dilated_attention_backward", TORCH_FN(DilatedFront::backward<dilated_pattern>));
  m.impl("global_attention", TORCH_FN(GlobalFront::forward<global_pattern>));
  m.impl("global_attention_backward", TORCH_FN(GlobalFront::backward<global_pattern>));
  m.impl("index_attention", TORCH_FN(IndexFront::forward<index_pattern>));
  m.impl("index_attention_backward", TORCH_FN(IndexFront::backward<index_pattern>));
}

namespace {

OutputAndLogsumexp call(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                        at::IntArrayRef words, at::ArrayRef<at::Tensor> tensors, const Options& o) {
  const CallOptions options{
      words,  tensors,     o.key_padding_mask, o.global_mask,  o.bias,  o.bias_kind,
      o.gate, o.gate_kind, o.dropout_p,        o.dropout_seed, o.scale, o.softcap,
      o.sink, o.enable_gqa};
  return attention_op().call({options, query, key, value});
}

OutputAndLogsumexp call(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                        const FrontPattern& pattern, const Options& o) {
  return call(query, key, value, encode(pattern.expression), pattern.tensors, o);
}

}  // namespace

OutputAndLogsumexp attention(const at::Tensor& query, const at::Tensor& key,
                             const at::Tensor& value, at::IntArrayRef pattern, const Options& o) {
  return call(query, key, value, pattern, o.pattern_tensors, o);
}

OutputAndLogsumexp window_attention(const at::Tensor& query, const at::Tensor& key,
                                    const at::Tensor& value, std::int64_t left, std::int64_t right,
                                    std::int64_t dilation, const Options& o) {
  return call(query, key, value, dilated_pattern(left, right, dilation), o);
}

OutputAndLogsumexp global_attention(const at::Tensor& query, const at::Tensor& key,
                                    const at::Tensor& value, at::IntArrayRef tokens,
                                    std::int64_t left, std::int64_t right, std::int64_t dilation,
                                    const Options& o) {
  return call(query, key, value, global_pattern(tokens, left, right, dilation), o);
}

OutputAndLogsumexp index_attention(const at::Tensor& query, const at::Tensor& key,
                                   const at::Tensor& value, const at::Tensor& indices,
                                   const std::optional<at::Tensor>& counts, const Options& o) {
  return call(query, key, value, index_pattern(indices, counts), o);
}

}  // namespace sparse_attn
