#include "ops/checks.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <cmath>
#include <sstream>
#include <string>

#include "ops/modifiers.h"
#include "patterns/part.h"
#include "patterns/window.h"

namespace sparse_attn {
namespace {

using SymSizes = std::vector<c10::SymInt>;

void check_shape(const char* name, const at::Tensor& tensor, const SymSizes& expected,
                 const char* why) {
  const auto sizes = tensor.sym_sizes();
  bool equal = sizes.size() == expected.size();
  for (std::size_t i = 0; equal && i < expected.size(); ++i) equal = sizes[i] == expected[i];
  TORCH_CHECK_VALUE(equal, "sparse_attn: expected ", name, " of shape ",
                    c10::SymIntArrayRef(expected), why, ", got ", sizes);
}

void check_same_place(const char* name, const at::Tensor& tensor, const at::Tensor& query) {
  TORCH_CHECK_VALUE(tensor.device() == query.device(), "sparse_attn: expected ", name,
                    " on device ", query.device(), ", as query, got ", tensor.device());
}

void check_kind(const char* name, const at::Tensor& tensor) {
  TORCH_CHECK_TYPE(tensor.layout() == at::kStrided && !tensor.is_nested(), "sparse_attn: expected ",
                   name, " to be a dense tensor, got layout ", tensor.layout(),
                   tensor.is_nested() ? " (nested)" : "");
}

void check_like_query(const char* name, const at::Tensor& tensor, const at::Tensor& query) {
  check_kind(name, tensor);
  check_same_place(name, tensor, query);
  TORCH_CHECK_TYPE(tensor.scalar_type() == query.scalar_type(), "sparse_attn: expected ", name,
                   " of dtype ", query.scalar_type(), ", as query, got ", tensor.scalar_type());
}

void check_rank(const char* name, const at::Tensor& tensor) {
  TORCH_CHECK_VALUE(tensor.dim() == 4, "sparse_attn: expected ", name,
                    " of shape (batch, heads, length, size), 4 dimensions, got shape ",
                    tensor.sym_sizes());
}

void check_query(const at::Tensor& query) {
  check_kind("query", query);
  const auto type = query.scalar_type();
  TORCH_CHECK_TYPE(
      type == at::kDouble || type == at::kFloat || type == at::kBFloat16 || type == at::kHalf,
      "sparse_attn: expected query of dtype float64, float32, bfloat16 or float16, got ", type);
  check_rank("query", query);
  TORCH_CHECK_VALUE(query.sym_size(3) > 0,
                    "sparse_attn: expected query with a head size of at least 1, got shape ",
                    query.sym_sizes());
}

void check_heads(const AttentionArguments& a) {
  const c10::SymInt heads = a.query.sym_size(1), heads_kv = a.key.sym_size(1);
  if (!a.enable_gqa) {
    TORCH_CHECK_VALUE(heads == heads_kv, "sparse_attn: expected key with ", heads,
                      " heads, as query (enable_gqa=True allows a divisor), got ", heads_kv);
    return;
  }
  TORCH_CHECK_VALUE(heads == heads_kv || (heads_kv > 0 && heads % heads_kv == 0),
                    "sparse_attn: expected key with a number of heads that divides the query's ",
                    heads, ", got ", heads_kv);
}

void check_tensors(const AttentionArguments& a) {
  check_query(a.query);
  check_like_query("key", a.key, a.query);
  check_like_query("value", a.value, a.query);
  check_rank("key", a.key);
  check_rank("value", a.value);
  check_heads(a);
  const c10::SymInt batch = a.query.sym_size(0), heads_kv = a.key.sym_size(1),
                    n_k = a.key.sym_size(2);
  check_shape("key", a.key, {batch, heads_kv, n_k, a.query.sym_size(3)},
              " (the query's batch and head size)");
  check_shape("value", a.value, {batch, heads_kv, n_k, a.value.sym_size(3)},
              " (the key's batch, heads and length)");
}

void check_mask(const char* name, const OptionalTensor& mask, const AttentionArguments& a,
                const c10::SymInt& n_k) {
  if (!mask) return;
  check_kind(name, *mask);
  TORCH_CHECK_TYPE(mask->scalar_type() == at::kBool, "sparse_attn: expected ", name,
                   " of dtype bool, got ", mask->scalar_type());
  check_same_place(name, *mask, a.query);
  check_shape(name, *mask, {a.query.sym_size(0), n_k}, " (batch, keys)");
}

void check_finite(const char* name, std::optional<double> value) {
  TORCH_CHECK_VALUE(!value || std::isfinite(*value), "sparse_attn: expected ", name,
                    " to be finite, got ", *value);
}

void check_sizes_of(const Expression& pattern, const AttentionArguments& a) {
  const auto patterns = static_cast<std::int64_t>(head_patterns(pattern).size());
  const c10::SymInt heads = a.query.sym_size(1), n_k = a.key.sym_size(2);
  TORCH_CHECK_VALUE(heads % patterns == 0,
                    "sparse_attn: expected pattern to list a number of patterns that divides the ",
                    heads, " heads, got ", patterns);
  const std::int64_t token = most_demanding_token(pattern);
  TORCH_CHECK_VALUE(keys_needed(token) == 1 || n_k == 0 || n_k >= keys_needed(token),
                    "sparse_attn: ", token_error(token, n_k.guard_int(__FILE__, __LINE__)));
}

/// `tensor` is (batch, heads, expected...), where batch and heads may be 1 or left out.
void check_per_head(const char* name, const at::Tensor& tensor, const SymSizes& expected,
                    const PatternSizes& sizes) {
  const auto given = tensor.sym_sizes();
  const std::size_t rank = given.size(), inner = expected.size();
  bool fits = rank >= inner && rank <= inner + 2;
  for (std::size_t i = 0; fits && i < inner; ++i) fits = given[rank - inner + i] == expected[i];
  const auto is_one_or = [&](std::size_t from_end, const c10::SymInt* size) {
    return rank < from_end || !size || given[rank - from_end] == 1 ||
           given[rank - from_end] == *size;
  };
  fits = fits && is_one_or(inner + 1, sizes.heads) && is_one_or(inner + 2, sizes.batch);
  if (fits) return;
  const auto number = [](const c10::SymInt* size, const char* name_of_it) {
    std::ostringstream text;
    if (size) text << *size << " or 1 ";
    text << name_of_it;
    return text.str();
  };
  TORCH_CHECK_VALUE(false, "sparse_attn: expected ", name, " of shape ",
                    c10::SymIntArrayRef(expected), ", or with ", number(sizes.heads, "heads"),
                    ", and ", number(sizes.batch, "examples"), ", before, got ", given);
}

void check_pattern_tensor(const char* name, const at::Tensor& tensor, const PatternSizes& sizes) {
  check_kind(name, tensor);
  if (sizes.query) check_same_place(name, tensor, *sizes.query);
}

/// Of blocks of one, it is a mask.
void check_layout(const at::Tensor& layout, std::int64_t block, const PatternSizes& sizes) {
  const char* name = block == 1 ? "mask" : "layout";
  check_pattern_tensor(name, layout, sizes);
  TORCH_CHECK_TYPE(layout.scalar_type() == at::kBool, "sparse_attn: expected ", name,
                   " of dtype bool, got ", layout.scalar_type());
  // Larger blocks than this hold any sequence, and their sum with a length does not overflow.
  const c10::SymInt size = std::min(block, kUnbounded);
  check_per_head(name, layout, {(sizes.n_q + size - 1) / size, (sizes.n_k + size - 1) / size},
                 sizes);
}

void check_integers(const char* name, const at::Tensor& tensor) {
  TORCH_CHECK_TYPE(tensor.scalar_type() == at::kLong || tensor.scalar_type() == at::kInt,
                   "sparse_attn: expected ", name, " of dtype int64 or int32, got ",
                   tensor.scalar_type());
}

void check_key_lists(const at::Tensor& indices, const at::Tensor* counts,
                     const PatternSizes& sizes) {
  check_pattern_tensor("indices", indices, sizes);
  check_integers("indices", indices);
  TORCH_CHECK_VALUE(indices.dim() >= 2,
                    "sparse_attn: expected indices of shape (batch or 1, heads or 1, queries, "
                    "keys of a query), got ",
                    indices.sym_sizes());
  check_per_head("indices", indices, {sizes.n_q, indices.sym_size(-1)}, sizes);
  if (!counts) return;
  check_pattern_tensor("counts", *counts, sizes);
  check_integers("counts", *counts);
  check_per_head("counts", *counts, {sizes.n_q}, sizes);
}

}  // namespace

void check_pattern_tensors(const Expression& pattern, const OptionalTensors& given,
                           const PatternSizes& sizes) {
  const at::ArrayRef<at::Tensor> tensors = given.value_or(at::ArrayRef<at::Tensor>());
  const auto expected = static_cast<std::size_t>(tensor_count(pattern));
  TORCH_CHECK_VALUE(tensors.size() == expected,
                    "sparse_attn: expected pattern_tensors to hold the ", expected,
                    " tensors that pattern takes, got ", tensors.size());
  for (const Expression* user : tensor_users(pattern)) {
    const auto first = static_cast<std::size_t>(user->tensor);
    if (user->word == Word::kBlockLayout) {
      check_layout(tensors[first], user->values[0], sizes);
    } else {
      check_key_lists(tensors[first], own_tensors(*user) > 1 ? &tensors[first + 1] : nullptr,
                      sizes);
    }
  }
}

void check_dense_like(const char* name, const at::Tensor& tensor, const at::Tensor& query) {
  check_kind(name, tensor);
  check_same_place(name, tensor, query);
  const at::ScalarType wide = lse_type(query);
  TORCH_CHECK_TYPE(tensor.scalar_type() == query.scalar_type() || tensor.scalar_type() == wide,
                   "sparse_attn: expected ", name, " of dtype ", query.scalar_type(),
                   ", as query, or ", wide, ", got ", tensor.scalar_type());
}

void check_no_sink(const CallOptions& a) {
  TORCH_CHECK_NOT_IMPLEMENTED(!a.sink,
                              "sparse_attn: expected no sink: differentiate attention itself, "
                              "whose output is that over the keys times their share");
}

at::ScalarType lse_type(const at::Tensor& query) {
  return query.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

Expression check_pattern(at::IntArrayRef pattern) {
  return with_value_errors(
      [&] { return parse(pattern.data(), static_cast<std::int64_t>(pattern.size())); });
}

SymSizesOf whole_sizes_of(const Expression& pattern, const AttentionArguments& a) {
  const Expression& one = head_patterns(pattern)[0];
  if (one.word != Word::kPart) return {a.query.sym_size(2), a.key.sym_size(2)};
  const Sizes whole = whole_sizes(one, {});
  return {whole.n_q, whole.n_k};
}

void check_inputs(const AttentionArguments& a) {
  check_tensors(a);
  check_mask("key_padding_mask", a.key_padding_mask, a, a.key.sym_size(2));
  check_finite("scale", a.scale);
}

Expression check_attention(const AttentionArguments& a) {
  check_inputs(a);
  Expression pattern = check_pattern(a.pattern);
  const auto [n_q, n_k] = whole_sizes_of(pattern, a);
  check_mask("global_mask", a.global_mask, a, n_k);
  check_sizes_of(pattern, a);
  const c10::SymInt batch = a.query.sym_size(0), heads = a.query.sym_size(1);
  check_pattern_tensors(pattern, a.pattern_tensors, {n_q, n_k, &batch, &heads, &a.query});
  check_modifiers(a, pattern);
  return pattern;
}

namespace {

void check_like_output(const char* name, const at::Tensor& tensor, const AttentionArguments& a) {
  check_like_query(name, tensor, a.query);
  check_shape(name, tensor,
              {a.query.sym_size(0), a.query.sym_size(1), a.query.sym_size(2), a.value.sym_size(3)},
              " (the query's, with the value's size)");
}

void check_like_lse(const char* name, const at::Tensor& lse, const AttentionArguments& a) {
  const at::ScalarType type = lse_type(a.query);
  check_kind(name, lse);
  check_same_place(name, lse, a.query);
  TORCH_CHECK_TYPE(lse.scalar_type() == type, "sparse_attn: expected ", name, " of dtype ", type,
                   ", got ", lse.scalar_type());
  check_shape(name, lse, {a.query.sym_size(0), a.query.sym_size(1), a.query.sym_size(2)},
              " (batch, heads, queries)");
}

void check_tangents(const Tangents& t, const AttentionArguments& a) {
  const auto check_like = [&](const char* name, const OptionalTensor& tangent,
                              const at::Tensor& input) {
    if (!tangent) return;
    check_like_query(name, *tangent, a.query);
    check_shape(name, *tangent, input.sym_sizes().vec(), " (that of what it belongs to)");
  };
  check_like("query_tangent", t.query, a.query);
  check_like("key_tangent", t.key, a.key);
  check_like("value_tangent", t.value, a.value);
  check_like_table("bias_tangent", t.bias, "bias", a.bias);
  check_like_table("gate_tangent", t.gate, "gate", a.gate);
}

}  // namespace

Expression check_backward(const BackwardArguments& a) {
  Expression pattern = check_attention(a);
  check_like_output("grad_output", a.grad_output, a);
  check_like_output("output", a.output, a);
  check_like_lse("logsumexp", a.logsumexp, a);
  if (a.grad_logsumexp) check_like_lse("grad_logsumexp", *a.grad_logsumexp, a);
  return pattern;
}

Expression check_tangent(const TangentArguments& a) {
  Expression pattern = check_attention(a);
  check_like_output("output", a.output, a);
  check_like_lse("logsumexp", a.logsumexp, a);
  check_tangents(a.tangents, a);
  return pattern;
}

Expression check_second(const SecondArguments& a) {
  Expression pattern = check_backward(a);
  check_tangents(a.tangents, a);
  return pattern;
}

double default_scale(const at::Tensor& query) {
  return 1.0 / std::sqrt(static_cast<double>(query.size(3)));
}

at::Tensor empty_rows(const at::Tensor& like, const c10::SymInt& size) {
  const c10::SymInt batch = like.sym_size(0), heads = like.sym_size(1), rows = like.sym_size(2);
  if (like.sym_stride(1) < like.sym_stride(2)) {
    return at::empty_symint({batch, rows, heads, size}, like.options()).transpose(1, 2);
  }
  return at::empty_symint({batch, heads, rows, size}, like.options());
}

}  // namespace sparse_attn
