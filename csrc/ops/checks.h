// All checks of arguments, called from every kernel that does not only pass them on. An error says
// what was expected and what came.
#pragma once

#include <stdexcept>

#include "ops/arguments.h"
#include "patterns/expression.h"

namespace sparse_attn {

/// Checks the call and returns its pattern. Works on symbolic sizes: a comparison becomes a guard,
/// not a recompilation.
Expression check_attention(const AttentionArguments& arguments);
void check_inputs(const AttentionArguments& arguments);  // without the pattern and modifiers
Expression check_backward(const BackwardArguments& arguments);
Expression check_tangent(const TangentArguments& arguments);
Expression check_second(const SecondArguments& arguments);

/// The lengths that tokens, tensors of the pattern and global masks refer to: those of the call, or
/// of the sequence that it is a part of.
struct SymSizesOf {
  c10::SymInt n_q, n_k;
};
SymSizesOf whole_sizes_of(const Expression& pattern, const AttentionArguments& arguments);

/// Checks a dense tensor on the query's device, of its dtype or of that of the log-sum-exp.
void check_dense_like(const char* name, const at::Tensor& tensor, const at::Tensor& query);

/// The dtype of the log-sum-exp.
at::ScalarType lse_type(const at::Tensor& query);

/// For ops whose callers take the sink apart.
void check_no_sink(const CallOptions& arguments);

/// Parses a pattern; ValueError if it is none.
Expression check_pattern(at::IntArrayRef pattern);

/// What a pattern's tensors must fit to. `batch` and `heads` are null where any will do.
struct PatternSizes {
  c10::SymInt n_q;
  c10::SymInt n_k;
  const c10::SymInt* batch = nullptr;
  const c10::SymInt* heads = nullptr;
  const at::Tensor* query = nullptr;  // for its device
};

/// Checks number, types and shapes of the tensors that a pattern takes.
void check_pattern_tensors(const Expression& pattern, const OptionalTensors& tensors,
                           const PatternSizes& sizes);

/// The patterns of PerHead, or the one pattern of all heads.
inline at::ArrayRef<Expression> head_patterns(const Expression& expression) {
  return expression.word == Word::kPerHead ? at::ArrayRef<Expression>(expression.parts)
                                           : at::ArrayRef<Expression>(expression);
}

/// The scale that is used when none is given: 1 / sqrt(head size).
double default_scale(const at::Tensor& query);

/// The plan knows nothing of torch: what it throws becomes a ValueError here.
template <class Function>
decltype(auto) with_value_errors(const Function& function) {
  try {
    return function();
  } catch (const std::invalid_argument& error) {
    TORCH_CHECK_VALUE(false, "sparse_attn: ", error.what());
  }
}

/// An uninitialised (batch, heads, rows, size) tensor like `like`, laid out as (batch, rows, heads,
/// size) in memory if that one is: the result of a layer that splits its heads by a view can then
/// be joined by a view.
at::Tensor empty_rows(const at::Tensor& like, const c10::SymInt& size);

}  // namespace sparse_attn
