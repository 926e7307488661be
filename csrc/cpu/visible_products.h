// Products over the visible part of a tile of pairs.
#pragma once

#include "gemm.h"
#include "visible_blocks.h"

namespace {

/// Rows of C for a few vectors of columns, by register blocks of the same height whatever their
/// width: parts have room for one or two of them.
template <int kVectors, class T, class Finish>
SPARSE_ATTN_INLINE void multiply_rows(const VisibleRows& part, int n, int k_size,
                                      Operand<T, true> a, const T* b, const Finish& finish) {
  if constexpr (kVectors > 0) {
    if (part.vectors.end - n >= kVectors) {
      gemm_columns<kVectors, kBlockRows<kBlockVectors>>(part.keys, n, k_size, a, b, kMaxTile,
                                                        finish);
    } else {
      multiply_rows<kVectors - 1>(part, n, k_size, a, b, finish);
    }
  }
}

/// C[key][query] = A · B: scores, and gradients of weights.
template <class T, class Finish>
SPARSE_ATTN_INLINE void multiply_visible(const VisibleBlocks<T>& visible, int k_size,
                                         Operand<T, true> a, const T* b, const Finish& finish) {
  if (visible.whole())
    return gemm(visible.keys(), visible.vectors(), k_size, a, b, kMaxTile, finish);
  for (const VisibleRows& part : visible.rows()) {
    for (int n = part.vectors.begin; n < part.vectors.end; n += kBlockVectors)
      multiply_rows<kBlockVectors>(part, n, k_size, a, b, finish);
  }
}

/// Sums of a register block over parts of k, each with vectors of its own.
template <int kRows, class T>
struct RaggedSums {
  Vec<T> sum[kRows][kBlockVectors] = {};

  template <int kBegin, int kEnd>
  SPARSE_ATTN_INLINE void add(Range keys, Operand<T, false> a, const T* b) {
    b += int64_t{keys.begin} * kMaxTile;
    for (int k = keys.begin; k < keys.end; ++k) {
      Vec<T> row[kBlockVectors];
#pragma GCC unroll 8
      for (int n = kBegin; n < kEnd; ++n) row[n] = load(b + n * kLanes<T>);
#pragma GCC unroll 16
      for (int m = 0; m < kRows; ++m) {
        const Vec<T> x = broadcast(a.at(m, k));
#pragma GCC unroll 8
        for (int n = kBegin; n < kEnd; ++n) sum[m][n] += x * row[n];
      }
      b += kMaxTile;
    }
  }

  /// Finds the instance of add() for a range of vectors.
  template <int kBegin = 0, int kEnd = 1>
  SPARSE_ATTN_INLINE void add_part(Range vectors, Range keys, Operand<T, false> a, const T* b) {
    if (vectors.begin == kBegin && vectors.end == kEnd) {
      add<kBegin, kEnd>(keys, a, b);
    } else if constexpr (kEnd < kBlockVectors) {
      add_part<kBegin, kEnd + 1>(vectors, keys, a, b);
    } else if constexpr (kBegin + 1 < kBlockVectors) {
      add_part<kBegin + 1, kBegin + 2>(vectors, keys, a, b);
    }
  }
};

template <int kRows, class T, class Finish>
SPARSE_ATTN_INLINE void ragged_block(const Array<VisibleRows>& parts, int m0, int n0,
                                     Operand<T, false> a, const T* b, const Finish& finish) {
  a = a.from_row(m0);
  b += n0 * kLanes<T>;
  RaggedSums<kRows, T> sums;
  for (const VisibleRows& part : parts)
    sums.add_part(part.vectors.within(n0, kBlockVectors), part.keys, a, b);
#pragma GCC unroll 16
  for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 8
    for (int n = 0; n < kBlockVectors; ++n) finish(m0 + m, n0 + n, sums.sum[m][n]);
  }
}

template <int kRows, class T, class Finish>
SPARSE_ATTN_INLINE void last_ragged_rows(const Array<VisibleRows>& parts, int m_size, int m0,
                                         int n0, Operand<T, false> a, const T* b,
                                         const Finish& finish) {
  if constexpr (kRows > 0) {
    if (m_size - m0 == kRows) {
      ragged_block<kRows>(parts, m0, n0, a, b, finish);
    } else {
      last_ragged_rows<kRows - 1>(parts, m_size, m0, n0, a, b, finish);
    }
  }
}

/// All rows for the whole block of columns at vector n0: it goes through the keys once, each part
/// of them with the vectors that see it. The triangle at the edge of a window takes 63 to 72 % of
/// the time of a whole tile.
template <class T, class Finish>
__attribute__((noinline)) void ragged_columns(const Array<VisibleRows>& parts, int m_size, int n0,
                                              Operand<T, false> a, const T* b, Finish finish) {
  constexpr int kRows = kBlockRows<kBlockVectors>;
  int m = 0;
  for (; m + kRows <= m_size; m += kRows) ragged_block<kRows>(parts, m, n0, a, b, finish);
  last_ragged_rows<kRows - 1>(parts, m_size, m, n0, a, b, finish);
}

/// C[size][query] = A · B over the keys: outputs, and gradients of the queries. Where a vector sees
/// no key, its sums are 0.
template <class T, class Finish>
SPARSE_ATTN_INLINE void sum_over_visible_keys(const VisibleBlocks<T>& visible, int m_size,
                                              Operand<T, false> a, const T* b,
                                              const Finish& finish) {
  if (visible.whole())
    return gemm(Range{0, m_size}, visible.vectors(), visible.keys().end, a, b, kMaxTile, finish);
  int n = 0;
  for (; n + kBlockVectors <= visible.vectors(); n += kBlockVectors)
    ragged_columns(visible.rows(), m_size, n, a, b, finish);
  for (const VisibleColumns& part : visible.columns()) {
    for (int v = part.vectors.begin; v < part.vectors.end; ++v) {
      if (v < n) continue;
      gemm_columns<1>(Range{0, m_size}, v, part.keys.size(), a.from_column(part.keys.begin),
                      b + int64_t{part.keys.begin} * kMaxTile, kMaxTile, finish);
    }
  }
}

/// C[key][size] = A · B over the queries, `queries` at most: gradients of keys and values.
template <class T, class Finish>
SPARSE_ATTN_INLINE void sum_over_visible_queries(const VisibleBlocks<T>& visible, int queries,
                                                 int vectors, Operand<T, true> a, const T* b,
                                                 int64_t ldb, const Finish& finish) {
  for (const VisibleRows& part : visible.rows()) {
    const int begin = part.vectors.begin * kLanes<T>, end = part.vectors.end * kLanes<T>;
    gemm(part.keys, vectors, (end < queries ? end : queries) - begin, a.from_column(begin),
         b + begin * ldb, ldb, finish);
  }
}

}  // namespace
