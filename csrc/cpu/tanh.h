// tanh of SIMD vectors, for the soft cap.
#pragma once

#include "softmax.h"

namespace {

/// tanh(x) = x + x³ p(x²) up to kSmall, with the polynomial whose greatest relative distance is
/// least; beyond, 1 - 2 / (e^2x + 1) has lost nothing to cancellation.
template <class T>
struct TanhConstants;

template <>
struct TanhConstants<float> {
  static constexpr float kSmall = 0.625f;
  static constexpr int kTerms = 5;  // distance 4.4e-9
  static constexpr float kPolynomial[kTerms] = {-0.33333281942012773015f, 0.13331442198175807626f,
                                                -0.05373971508582495906f, 0.020639087244729173482f,
                                                -0.0057049869934552028785f};
};

template <>
struct TanhConstants<double> {
  static constexpr double kSmall = 0.625;
  static constexpr int kTerms = 11;  // distance 1.0e-17
  static constexpr double kPolynomial[kTerms] = {
      -0.33333333333332855214,   0.13333333333262086666,     -0.053968253931266108806,
      0.021869487576066181354,   -0.0088632210023287462577,  0.003591989171782367381,
      -0.0014549588690781954444, 0.00058631651499355071594,  -0.00022856416598422301106,
      0.00007714432092794537592, -0.000016072549574299152119};
};

/// Within 2 units in the last place; NaN for NaN.
template <class T>
SPARSE_ATTN_INLINE Vec<T> tanh(Vec<T> x) {
  using C = TanhConstants<T>;
  const Vec<T> size = x < T{0} ? -x : x;
  const Vec<T> large =
      T{1} - T{2} / (exp<T>((size < T{40} ? size : broadcast(T{40})) * T{2}) + T{1});
  const Vec<T> square = x * x;
  Vec<T> sum = broadcast(C::kPolynomial[C::kTerms - 1]);
#pragma GCC unroll 16
  for (int i = C::kTerms - 2; i >= 0; --i) sum = sum * square + C::kPolynomial[i];
  const Vec<T> small = x + x * square * sum;
  const Vec<T> beyond = x < T{0} ? -large : large;
  return size < C::kSmall || x != x ? small : beyond;
}

}  // namespace
