// Products and sums over listed (query, key) pairs: three ops, each the derivative of the others.
//
// They are the derivatives of one form, Σ_e values[e] · (rows[i] · columns[j]) over the pairs e =
// (i, j), by one of its three factors; so derivatives of any order are made of the three again.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>

namespace sparse_attn {

/// The pairs of all heads in CSR form, and which of the columns they index.
struct PairIndices {
  at::Tensor crow;       // (batch, heads, n_q + 1) int64, offsets into col
  at::Tensor col;        // (pairs) int64
  c10::SymInt heads_kv;  // divides heads
  c10::SymInt n_k;
};

enum class Factor { kValues, kRows, kColumns };

/// All but one of the factors, which an op makes from the others.
struct Factors {
  at::Tensor values;   // (pairs); float32 for half types
  at::Tensor rows;     // (batch, heads, n_q, size)
  at::Tensor columns;  // (batch, heads_kv, n_k, size)

  at::Tensor& operator[](Factor factor) {
    return factor == Factor::kValues ? values : factor == Factor::kRows ? rows : columns;
  }
};

/// Shapes, types and devices of what makes a factor, on symbolic sizes.
void check_pairs(Factor made, const Factors& given, const PairIndices& pairs);

/// Types and shapes of indices, and what they hold where they are on the CPU and contiguous:
/// offsets that ascend through all heads, keys below n_k.
void check_pair_indices(const at::Tensor& crow, const at::Tensor& col);
void check_pair_contents(const at::Tensor& crow, const at::Tensor& col, std::int64_t n_k);

/// The factor that an op makes, uninitialised.
at::Tensor empty_factor(Factor made, const Factors& given, const PairIndices& pairs);

/// Calls the op that makes a factor through the dispatcher, from the top or with the keys left.
at::Tensor call_pairs(Factor made, const Factors& given, const PairIndices& pairs);
at::Tensor redispatch_pairs(c10::DispatchKeySet keys, Factor made, const Factors& given,
                            const PairIndices& pairs);

using PairsKernel = at::Tensor (*)(c10::DispatchKeySet, Factor, const Factors&, const PairIndices&);

/// Make the functions that the dispatcher wants out of one kernel for all three.
template <PairsKernel kKernel>
at::Tensor pair_products_kernel(c10::DispatchKeySet keys, const at::Tensor& rows,
                                const at::Tensor& columns, const at::Tensor& crow,
                                const at::Tensor& col) {
  const bool sized = columns.dim() == 4;  // else the checks say so
  return kKernel(keys, Factor::kValues, {{}, rows, columns},
                 {crow, col, sized ? columns.sym_size(1) : 0, sized ? columns.sym_size(2) : 0});
}

template <PairsKernel kKernel>
at::Tensor pair_sums_kernel(c10::DispatchKeySet keys, const at::Tensor& values,
                            const at::Tensor& columns, const at::Tensor& crow,
                            const at::Tensor& col) {
  const bool sized = columns.dim() == 4;
  return kKernel(keys, Factor::kRows, {values, {}, columns},
                 {crow, col, sized ? columns.sym_size(1) : 0, sized ? columns.sym_size(2) : 0});
}

template <PairsKernel kKernel>
at::Tensor pair_column_sums_kernel(c10::DispatchKeySet keys, const at::Tensor& values,
                                   const at::Tensor& rows, const at::Tensor& crow,
                                   const at::Tensor& col, c10::SymInt heads_kv, c10::SymInt n_k) {
  return kKernel(keys, Factor::kColumns, {values, rows, {}}, {crow, col, heads_kv, n_k});
}

template <PairsKernel kKernel, class Library>
void implement_pairs(Library& m) {
  m.impl("pair_products", TORCH_FN(pair_products_kernel<kKernel>));
  m.impl("pair_sums", TORCH_FN(pair_sums_kernel<kKernel>));
  m.impl("pair_column_sums", TORCH_FN(pair_column_sums_kernel<kKernel>));
}

}  // namespace sparse_attn
