// The ops of listed pairs: schemas, calls, checks, shapes without data.
#include "ops/pairs.h"

#include <ATen/ATen.h>
#include <torch/library.h>

#include <string>
#include <vector>

#include "ops/checks.h"

namespace sparse_attn {
namespace {

using SymSizes = std::vector<c10::SymInt>;
using TwoFactors = at::Tensor(const at::Tensor&, const at::Tensor&, const at::Tensor&,
                              const at::Tensor&);
using TwoFactorsSized = at::Tensor(const at::Tensor&, const at::Tensor&, const at::Tensor&,
                                   const at::Tensor&, c10::SymInt, c10::SymInt);

template <class Function>
c10::TypedOperatorHandle<Function> find(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Function>();
}

/// invoke(op, arguments...) with the op that makes a factor.
template <class Invoke>
at::Tensor with_op(Factor made, const Factors& f, const PairIndices& p, const Invoke& invoke) {
  static const auto products = find<TwoFactors>("sparse_attn::pair_products");
  static const auto sums = find<TwoFactors>("sparse_attn::pair_sums");
  static const auto column_sums = find<TwoFactorsSized>("sparse_attn::pair_column_sums");
  switch (made) {
    case Factor::kValues:
      return invoke(products, f.rows, f.columns, p.crow, p.col);
    case Factor::kRows:
      return invoke(sums, f.values, f.columns, p.crow, p.col);
    default:
      return invoke(column_sums, f.values, f.rows, p.crow, p.col, p.heads_kv, p.n_k);
  }
}

void check_dense(const char* name, const at::Tensor& tensor, const char* shape) {
  TORCH_CHECK_TYPE(tensor.layout() == at::kStrided && !tensor.is_nested(), "sparse_attn: expected ",
                   name, " to be a dense tensor, got layout ", tensor.layout());
  const auto type = tensor.scalar_type();
  TORCH_CHECK_TYPE(
      type == at::kDouble || type == at::kFloat || type == at::kBFloat16 || type == at::kHalf,
      "sparse_attn: expected ", name, " of dtype float64, float32, bfloat16 or float16, got ",
      type);
  TORCH_CHECK_VALUE(tensor.dim() == 4, "sparse_attn: expected ", name, " of shape ", shape,
                    ", 4 dimensions, got shape ", tensor.sym_sizes());
}

void check_heads(const PairIndices& p) {
  const c10::SymInt heads = p.crow.sym_size(1);
  TORCH_CHECK_VALUE(
      p.heads_kv == heads || (p.heads_kv > 0 && heads % p.heads_kv == 0),
      "sparse_attn: expected columns with a number of heads that divides those of crow_indices, ",
      heads, ", got ", p.heads_kv);
  TORCH_CHECK_VALUE(p.n_k >= 0, "sparse_attn: expected at least 0 columns, got ", p.n_k);
}

SymSizes sizes_of(Factor factor, const PairIndices& p, const c10::SymInt& size) {
  const c10::SymInt batch = p.crow.sym_size(0);
  switch (factor) {
    case Factor::kValues:
      return {p.col.sym_size(0)};
    case Factor::kRows:
      return {batch, p.crow.sym_size(1), p.crow.sym_size(2) - 1, size};
    default:
      return {batch, p.heads_kv, p.n_k, size};
  }
}

void check_shape(const char* name, const at::Tensor& tensor, const SymSizes& expected) {
  const auto sizes = tensor.sym_sizes();
  bool equal = sizes.size() == expected.size();
  for (std::size_t i = 0; equal && i < expected.size(); ++i) equal = sizes[i] == expected[i];
  TORCH_CHECK_VALUE(equal, "sparse_attn: expected ", name, " of shape ",
                    c10::SymIntArrayRef(expected), ", as the indices say, got ", sizes);
}

const at::Tensor& dense_factor(const Factors& f) { return f.rows.defined() ? f.rows : f.columns; }

at::Tensor pairs_meta(c10::DispatchKeySet, Factor made, const Factors& given,
                      const PairIndices& pairs) {
  check_pairs(made, given, pairs);
  return empty_factor(made, given, pairs);
}

}  // namespace

at::Tensor call_pairs(Factor made, const Factors& given, const PairIndices& pairs) {
  return with_op(made, given, pairs,
                 [](const auto& op, const auto&... a) { return op.call(a...); });
}

at::Tensor redispatch_pairs(c10::DispatchKeySet keys, Factor made, const Factors& given,
                            const PairIndices& pairs) {
  return with_op(made, given, pairs,
                 [&](const auto& op, const auto&... a) { return op.redispatch(keys, a...); });
}

void check_pair_indices(const at::Tensor& crow, const at::Tensor& col) {
  for (const auto& [name, tensor, rank, shape] :
       {std::tuple<const char*, const at::Tensor&, std::int64_t, const char*>{
            "crow_indices", crow, 3, "(batch, heads, queries + 1)"},
        {"col_indices", col, 1, "(pairs)"}}) {
    TORCH_CHECK_TYPE(tensor.scalar_type() == at::kLong && tensor.layout() == at::kStrided,
                     "sparse_attn: expected ", name, " to be a dense tensor of dtype int64, got ",
                     tensor.scalar_type(), " (", tensor.layout(), ")");
    TORCH_CHECK_VALUE(tensor.dim() == rank && (rank == 1 || tensor.sym_size(2) >= 1),
                      "sparse_attn: expected ", name, " of shape ", shape, ", got ",
                      tensor.sym_sizes());
  }
}

void check_pair_contents(const at::Tensor& crow, const at::Tensor& col, std::int64_t n_k) {
  const auto* offsets = crow.const_data_ptr<std::int64_t>();
  const auto* keys = col.const_data_ptr<std::int64_t>();
  const std::int64_t rows = crow.size(2), pairs = col.size(0);
  std::int64_t last = 0;  // offset before
  bool ascend = true;
  for (std::int64_t i = 0; i < crow.numel(); ++i) {
    ascend = ascend && (i % rows == 0 ? offsets[i] == last : offsets[i] >= last);
    last = offsets[i];
  }
  TORCH_CHECK_VALUE(
      ascend && last == pairs,
      "sparse_attn: expected crow_indices that ascend from 0 to the number of pairs, ", pairs,
      ", through all heads, got others, that end with ", last);
  for (std::int64_t e = 0; e < pairs; ++e) {
    TORCH_CHECK_VALUE(0 <= keys[e] && keys[e] < n_k, "sparse_attn: expected col_indices in [0, ",
                      n_k, "), got ", keys[e]);
  }
}

void check_pairs(Factor made, const Factors& given, const PairIndices& pairs) {
  const at::Tensor& dense = dense_factor(given);
  check_pair_indices(pairs.crow, pairs.col);
  for (const auto& [name, tensor, factor, shape] :
       {std::tuple<const char*, const at::Tensor&, Factor, const char*>{
            "rows", given.rows, Factor::kRows, "(batch, heads, queries, size)"},
        {"columns", given.columns, Factor::kColumns, "(batch, heads, keys, size)"}}) {
    if (factor == made) continue;
    check_dense(name, tensor, shape);
    TORCH_CHECK_TYPE(tensor.scalar_type() == dense.scalar_type(), "sparse_attn: expected ", name,
                     " of dtype ", dense.scalar_type(), ", as rows, got ", tensor.scalar_type());
    for (const at::Tensor* other : {&pairs.crow, &pairs.col, &dense}) {
      TORCH_CHECK_VALUE(tensor.device() == other->device(), "sparse_attn: expected ", name,
                        " on device ", other->device(), ", as the indices, got ", tensor.device());
    }
    check_heads(pairs);
    check_shape(name, tensor, sizes_of(factor, pairs, dense.sym_size(3)));
  }
  if (made == Factor::kValues) return;
  TORCH_CHECK_TYPE(given.values.scalar_type() == lse_type(dense),
                   "sparse_attn: expected values of dtype ", lse_type(dense), " for factors of ",
                   dense.scalar_type(), ", got ", given.values.scalar_type());
  TORCH_CHECK_VALUE(given.values.device() == dense.device(),
                    "sparse_attn: expected values on device ", dense.device(), ", got ",
                    given.values.device());
  check_shape("values", given.values, sizes_of(Factor::kValues, pairs, 0));
}

at::Tensor empty_factor(Factor made, const Factors& given, const PairIndices& pairs) {
  const at::Tensor& dense = dense_factor(given);
  const auto type = made == Factor::kValues ? lse_type(dense) : dense.scalar_type();
  return at::empty_symint(sizes_of(made, pairs, dense.sym_size(3)), dense.options().dtype(type));
}

TORCH_LIBRARY_FRAGMENT(sparse_attn, m) {
  for (const char* const arguments :
       {"products(Tensor rows, Tensor columns, Tensor crow_indices, Tensor col_indices)",
        "sums(Tensor values, Tensor columns, Tensor crow_indices, Tensor col_indices)",
        "column_sums(Tensor values, Tensor rows, Tensor crow_indices, Tensor col_indices, "
        "SymInt heads_kv, SymInt n_k)"}) {
    m.def(torch::schema(("pair_" + std::string(arguments) + " -> Tensor").c_str()),
          {at::Tag::pt2_compliant_tag});
  }
}

TORCH_LIBRARY_IMPL(sparse_attn, Meta, m) { implement_pairs<pairs_meta>(m); }

}  // namespace sparse_attn
