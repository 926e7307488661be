// Register-blocked products of small tiles: C[m][n] (+)= sum over k of A(m, k) · B[k][n].
//
// B and C are row-major with the SIMD lanes along n; n is a whole number of vectors. Elements of A
// are broadcast, so A may lie in memory either way round and at any stride: a strided view of the
// caller's key or value tensor (a residue class of a dilated window) is multiplied in place.
#pragma once

#include "range.h"
#include "vec.h"

namespace {

/// A broadcast operand. kRowMajor: A(m, k) = data[m * stride + k]; otherwise A(m, k) = data[k *
/// stride + m].
template <class T, bool kRowMajor>
struct Operand {
  const T* data;
  int64_t stride;

  SPARSE_ATTN_INLINE T at(int64_t m, int64_t k) const {
    return kRowMajor ? data[m * stride + k] : data[k * stride + m];
  }
  SPARSE_ATTN_INLINE Operand from_row(int64_t m) const {
    return {data + (kRowMajor ? m * stride : m), stride};
  }
  SPARSE_ATTN_INLINE Operand from_column(int64_t k) const {
    return {data + (kRowMajor ? k : k * stride), stride};
  }
};

/// Rows by vectors of one register block: as many sums as leave registers for a row of B and a
/// broadcast. Narrow blocks get more rows, so that enough sums are under way to hide the latency of
/// a multiply-add. Measured on 64 x 64 x 64: 205 GFLOP/s with 6 x 4 (AVX-512), 110 with 6 x 2
/// (AVX2), 32 (SSE4).
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr bool kManyRegisters = true;  // 32
#else
constexpr bool kManyRegisters = false;  // 16
#endif
constexpr int kBlockVectors = kManyRegisters ? 4 : 2;

template <int kVectors>
constexpr int kBlockRows = kManyRegisters ? (kVectors <= 2   ? 12
                                             : kVectors == 3 ? 8
                                                             : 6)
                                          : (kVectors == 1 ? 8 : 6);

/// One register block at row `m0` and vector `n0` of the result; `finish(m, n, sum)` says what
/// becomes of each vector.
template <int kRows, int kVectors, class T, bool kRowMajor, class Finish>
SPARSE_ATTN_INLINE void gemm_block(int m0, int n0, int k_size, Operand<T, kRowMajor> a, const T* b,
                                   int64_t ldb, const Finish& finish) {
  a = a.from_row(m0);
  b += n0 * kLanes<T>;
  Vec<T> sum[kRows][kVectors] = {};
  for (int k = 0; k < k_size; ++k) {
    Vec<T> row[kVectors];
#pragma GCC unroll 8
    for (int n = 0; n < kVectors; ++n) row[n] = load(b + n * kLanes<T>);
#pragma GCC unroll 16
    for (int m = 0; m < kRows; ++m) {
      const Vec<T> x = broadcast(a.at(m, k));
#pragma GCC unroll 8
      for (int n = 0; n < kVectors; ++n) sum[m][n] += x * row[n];
    }
    b += ldb;
  }
#pragma GCC unroll 16
  for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 8
    for (int n = 0; n < kVectors; ++n) finish(m0 + m, n0 + n, sum[m][n]);
  }
}

/// The rows that are left when the whole blocks are done.
template <int kRows, int kVectors, class T, bool kRowMajor, class Finish>
SPARSE_ATTN_INLINE void gemm_last_rows(int m_size, int m0, int n0, int k_size,
                                       Operand<T, kRowMajor> a, const T* b, int64_t ldb,
                                       const Finish& finish) {
  if constexpr (kRows > 0) {
    if (m_size - m0 == kRows) {
      gemm_block<kRows, kVectors>(m0, n0, k_size, a, b, ldb, finish);
    } else {
      gemm_last_rows<kRows - 1, kVectors>(m_size, m0, n0, k_size, a, b, ldb, finish);
    }
  }
}

/// The rows of a block of columns that starts at vector n0, kRows at a time.
template <int kVectors, int kRows = kBlockRows<kVectors>, class T, bool kRowMajor, class Finish>
__attribute__((noinline)) void gemm_columns(Range rows, int n0, int k_size, Operand<T, kRowMajor> a,
                                            const T* b, int64_t ldb, Finish finish) {
  int m = rows.begin;
  for (; m + kRows <= rows.end; m += kRows)
    gemm_block<kRows, kVectors>(m, n0, k_size, a, b, ldb, finish);
  gemm_last_rows<kRows - 1, kVectors>(rows.end, m, n0, k_size, a, b, ldb, finish);
}

/// The last vectors of columns, fewer than a whole block.
template <int kVectors, class T, bool kRowMajor, class Finish>
SPARSE_ATTN_INLINE void gemm_last_columns(Range rows, int n_end, int n0, int k_size,
                                          Operand<T, kRowMajor> a, const T* b, int64_t ldb,
                                          const Finish& finish) {
  if constexpr (kVectors > 0) {
    if (n_end - n0 == kVectors) {
      gemm_columns<kVectors>(rows, n0, k_size, a, b, ldb, finish);
    } else {
      gemm_last_columns<kVectors - 1>(rows, n_end, n0, k_size, a, b, ldb, finish);
    }
  }
}

/// The part of C that is `rows` times the first vectors of columns.
template <class T, bool kRowMajor, class Finish>
SPARSE_ATTN_INLINE void gemm(Range rows, int vectors, int k_size, Operand<T, kRowMajor> a,
                             const T* b, int64_t ldb, const Finish& finish) {
  int n = 0;
  for (; n + kBlockVectors <= vectors; n += kBlockVectors) {
    gemm_columns<kBlockVectors>(rows, n, k_size, a, b, ldb, finish);
  }
  gemm_last_columns<kBlockVectors - 1>(rows, vectors, n, k_size, a, b, ldb, finish);
}

/// C, `vectors` vectors of columns wide.
template <class T, bool kRowMajor, class Finish>
SPARSE_ATTN_INLINE void gemm(int m_size, int vectors, int k_size, Operand<T, kRowMajor> a,
                             const T* b, int64_t ldb, const Finish& finish) {
  gemm(Range{0, m_size}, vectors, k_size, a, b, ldb, finish);
}

/// C = sum.
template <class T>
struct SetTo {
  T* c;
  int64_t stride;
  SPARSE_ATTN_INLINE void operator()(int m, int n, Vec<T> sum) const {
    store(c + m * stride + n * kLanes<T>, sum);
  }
};

/// C += sum.
template <class T>
struct AddTo {
  T* c;
  int64_t stride;
  SPARSE_ATTN_INLINE void operator()(int m, int n, Vec<T> sum) const {
    T* at = c + m * stride + n * kLanes<T>;
    store(at, load(at) + sum);
  }
};

}  // namespace
