// exp and the running softmax of a tile of logits whose SIMD lanes are queries.
#pragma once

#include "plan/schedule.h"
#include "range.h"
#include "vec.h"

namespace {

using sparse_attn::kMaxTile;

constexpr double kLog2E = 1.4426950408889634074;

template <class T>
constexpr T kInfinity = static_cast<T>(__builtin_inf());

/// Constants of e^x = 2^n e^r with |r| <= (ln 2) / 2: the polynomial in r whose greatest relative
/// distance from e^r is least (a Taylor polynomial needs one or two terms more), and ln 2 in two
/// parts, of which n times the first is exact.
template <class T>
struct ExpConstants;

template <>
struct ExpConstants<float> {
  static constexpr float kLeast = -87.33654f;  // e^x is flushed to zero below the normal numbers
  static constexpr float kRound =
      0x1.8p23f + 127.0f;  // adding it rounds, and leaves the biased exponent in the low bits
  static constexpr int kMantissa = 23;
  static constexpr float kLn2High = 0x1.63p-1f;
  static constexpr float kLn2Low = -0.000212194440054690583f;
  static constexpr int kTerms = 7;  // distance 3.9e-9
  static constexpr float kPolynomial[kTerms] = {1.0f,
                                                1.0000000646833270546f,
                                                0.50000000808002470782f,
                                                0.16666325694062521396f,
                                                0.041666240712711107458f,
                                                0.0083811092900786012807f,
                                                0.0013948580818093910978f};
};

template <>
struct ExpConstants<double> {
  static constexpr double kLeast = -708.3964185322641;
  static constexpr double kRound = 0x1.8p52 + 1023.0;
  static constexpr int kMantissa = 52;
  static constexpr double kLn2High = 0x1.62e4p-1;
  static constexpr double kLn2Low = 1.4286068203094172321e-6;
  static constexpr int kTerms = 12;  // distance 1.8e-17
  static constexpr double kPolynomial[kTerms] = {1.0,
                                                 1.0000000000000005588,
                                                 0.50000000000000055725,
                                                 0.16666666666657302374,
                                                 0.04166666666657363583,
                                                 0.0083333333377154602736,
                                                 0.0013888888932340796724,
                                                 0.00019841261491392798694,
                                                 0.000024801504511037080072,
                                                 2.7564254929439037522e-6,
                                                 2.7626296554217169468e-7,
                                                 2.298131153883436429e-8};
};

/// e^x for x <= 88, within 2 units in the last place; 0 for x = -inf; NaN for NaN.
template <class T>
SPARSE_ATTN_INLINE Vec<T> exp(Vec<T> x) {
  using C = ExpConstants<T>;
  const Vec<T> shifted = x * static_cast<T>(kLog2E) + C::kRound;
  const Vec<T> n = shifted - C::kRound;
  const Vec<T> rest = x - n * C::kLn2High - n * C::kLn2Low;
  Vec<T> sum = broadcast(C::kPolynomial[C::kTerms - 1]);
#pragma GCC unroll 16
  for (int i = C::kTerms - 2; i >= 0; --i) sum = sum * rest + C::kPolynomial[i];
  const Vec<T> power =
      reinterpret_cast<Vec<T>>(reinterpret_cast<IntVec<T>>(shifted) << C::kMantissa);
  return x < C::kLeast ? Vec<T>{} : sum * power;  // a product, so that NaN stays NaN
}

/// Lanes of `x` whose bit is clear in the word become `other`.
template <class T>
SPARSE_ATTN_INLINE Vec<T> keep_lanes(Vec<T> x, uint64_t word, int vector, T other) {
  using Lane = typename VecTypes<T>::IntLane;
  IntVec<T> bit;
#pragma GCC unroll 16
  for (int i = 0; i < kLanes<T>; ++i) bit[i] = Lane{1} << i;
  const auto word_of_vector =
      static_cast<Lane>((word >> (vector * kLanes<T>)) & ((uint64_t{1} << kLanes<T>)-1));
  return ((word_of_vector - IntVec<T>{}) & bit) != 0 ? x : broadcast(other);
}

/// P = exp(logit - lse). Rounding may leave the logit above lse; P is at most 1 all the same.
template <class T>
SPARSE_ATTN_INLINE Vec<T> probability(Vec<T> logit, Vec<T> lse) {
  const Vec<T> x = logit - lse;
  return exp<T>(x > T{0} ? Vec<T>{} : x);
}

/// The softmax state of a row tile, one lane for each query: running maximum and
/// sum.
template <class T>
struct SoftmaxState {
  alignas(64) T maximum[kMaxTile];
  alignas(64) T sum[kMaxTile];

  void init() {
    for (int i = 0; i < kMaxTile; i += kLanes<T>) {
      store(maximum + i, broadcast(-kInfinity<T>));
      store(sum + i, Vec<T>{});
    }
  }
};

/// Raises maxima of -inf, those of rows that have seen no key, to 0, so that exp(-inf - m) is 0
/// and not NaN.
template <class T>
SPARSE_ATTN_INLINE Vec<T> finite_maximum(Vec<T> m) {
  return m == -kInfinity<T> ? Vec<T>{} : m;
}

/// logits[key][query] -> exp(logits - maximum), for kVectors vectors of queries; `rescale` gets
/// the factor that the sums so far shrink by.
template <int kVectors, class T>
SPARSE_ATTN_INLINE void softmax_columns(T* logits, Range keys, T* maximum, T* sum, T* rescale) {
  Vec<T> top[kVectors], total[kVectors] = {};
#pragma GCC unroll 4
  for (int v = 0; v < kVectors; ++v) top[v] = load(maximum + v * kLanes<T>);
  for (int k = keys.begin; k < keys.end; ++k) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v)
      top[v] = max<T>(load(logits + k * kMaxTile + v * kLanes<T>), top[v]);
  }
#pragma GCC unroll 4
  for (int v = 0; v < kVectors; ++v) {
    const Vec<T> finite = finite_maximum<T>(top[v]);
    store(rescale + v * kLanes<T>, exp<T>(load(maximum + v * kLanes<T>) - finite));
    store(maximum + v * kLanes<T>, top[v]);
    top[v] = finite;
  }
  for (int k = keys.begin; k < keys.end; ++k) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      T* at = logits + k * kMaxTile + v * kLanes<T>;
      const Vec<T> p = exp<T>(load(at) - top[v]);
      store(at, p);
      total[v] += p;
    }
  }
#pragma GCC unroll 4
  for (int v = 0; v < kVectors; ++v) {
    T* at = sum + v * kLanes<T>;
    store(at, load(at) * load(rescale + v * kLanes<T>) + total[v]);
  }
}

template <class T>
__attribute__((noinline)) void softmax_update(T* logits, Range keys, Range vectors,
                                              SoftmaxState<T>& state, T* rescale) {
  int v = vectors.begin;
  for (; v + 2 <= vectors.end; v += 2) {
    const int at = v * kLanes<T>;
    softmax_columns<2>(logits + at, keys, state.maximum + at, state.sum + at, rescale + at);
  }
  if (v < vectors.end) {
    const int at = v * kLanes<T>;
    softmax_columns<1>(logits + at, keys, state.maximum + at, state.sum + at, rescale + at);
  }
}

}  // namespace
