// exp and the running softmax of a tile of logits whose SIMD lanes are queries.
#pragma once

#include "plan/schedule.h"
#include "vec.h"

namespace {

using sparse_attn::kMaxTile;

constexpr double kLog2E = 1.4426950408889634074;

template <class T>
constexpr T kInfinity = static_cast<T>(__builtin_inf());

/// Constants of e^x = 2^n 2^f: the polynomial in f whose greatest relative distance from 2^f on
/// [-1/2, 1/2] is least. A Taylor polynomial needs one or two terms more.
template <class T>
struct ExpConstants;

template <>
struct ExpConstants<float> {
  static constexpr float kLeast = -87.33654f;  // e^x is flushed to zero below the normal numbers
  static constexpr float kRound =
      0x1.8p23f + 127.0f;  // adding it rounds, and leaves the biased exponent in the low bits
  static constexpr int kMantissa = 23;
  static constexpr int kTerms = 7;  // distance 3.9e-9
  static constexpr float kPolynomial[kTerms] = {1.0f,
                                                0.69314722539501108653f,
                                                0.24022651084117293574f,
                                                0.055502973141993247575f,
                                                0.0096180307825051537978f,
                                                0.0013410000966100157069f,
                                                0.00015469731977475548114f};
};

template <>
struct ExpConstants<double> {
  static constexpr double kLeast = -708.3964185322641;
  static constexpr double kRound = 0x1.8p52 + 1023.0;
  static constexpr int kMantissa = 52;
  static constexpr int kTerms = 12;  // distance 1.8e-17
  static constexpr double kPolynomial[kTerms] = {1.0,
                                                 0.69314718055994569675,
                                                 0.24022650695910098007,
                                                 0.055504108664790394552,
                                                 0.0096181291076070023796,
                                                 0.0013333558153439964747,
                                                 0.0001540353044157213033,
                                                 0.000015252727385193868197,
                                                 1.3215442675329822143e-6,
                                                 1.0180647659234138888e-7,
                                                 7.0725704128144235096e-9,
                                                 4.078071929588336665e-10};
};

/// e^x for x <= 88; 0 for x = -inf; NaN for NaN. Relative error: 1.5 units in the last place, and
/// half a unit more for each unit of |x|, from rounding x / ln 2. (x itself, a difference of
/// logits, has that.)
template <class T>
SPARSE_ATTN_INLINE Vec<T> exp(Vec<T> x) {
  using C = ExpConstants<T>;
  constexpr T kLog2 = static_cast<T>(kLog2E);
  const Vec<T> clamped = x < C::kLeast ? broadcast(C::kLeast) : x;
  const Vec<T> shifted = clamped * kLog2 + C::kRound;
  const Vec<T> fraction = clamped * kLog2 - (shifted - C::kRound);
  Vec<T> sum = broadcast(C::kPolynomial[C::kTerms - 1]);
#pragma GCC unroll 16
  for (int i = C::kTerms - 2; i >= 0; --i) sum = sum * fraction + C::kPolynomial[i];
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

/// The softmax state of a row tile, one lane for each query: running maximum (base-2 logits) and
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
SPARSE_ATTN_INLINE void softmax_columns(T* logits, int keys, T* maximum, T* sum, T* rescale) {
  Vec<T> top[kVectors], total[kVectors] = {};
#pragma GCC unroll 4
  for (int v = 0; v < kVectors; ++v) top[v] = load(maximum + v * kLanes<T>);
  for (int k = 0; k < keys; ++k) {
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
  for (int k = 0; k < keys; ++k) {
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
__attribute__((noinline)) void softmax_update(T* logits, int keys, int vectors,
                                              SoftmaxState<T>& state, T* rescale) {
  int v = 0;
  for (; v + 2 <= vectors; v += 2) {
    const int at = v * kLanes<T>;
    softmax_columns<2>(logits + at, keys, state.maximum + at, state.sum + at, rescale + at);
  }
  if (v < vectors) {
    const int at = v * kLanes<T>;
    softmax_columns<1>(logits + at, keys, state.maximum + at, state.sum + at, rescale + at);
  }
}

}  // namespace
