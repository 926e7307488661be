// Storage types, and Real, in which sums are kept: double for float64, float for all others.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "cuda/ptx.cuh"

namespace sparse_attn::cuda {

using float32 = float;
using float64 = double;
struct bfloat16 {
  std::uint16_t bits;
};
struct float16 {
  std::uint16_t bits;
};

template <class S>
struct RealOf {
  using Type = float;
};
template <>
struct RealOf<double> {
  using Type = double;
};
template <class S>
using Real = typename RealOf<S>::Type;

constexpr float kInfinity = __builtin_inff();
constexpr float kLog2E = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

__device__ inline float widen(float x) { return x; }
__device__ inline double widen(double x) { return x; }
__device__ inline float widen(bfloat16 x) {
  const std::uint32_t bits = static_cast<std::uint32_t>(x.bits) << 16;
  float wide;
  memcpy(&wide, &bits, sizeof(wide));
  return wide;
}
__device__ inline float widen(float16 x) { return f16_to_float(x.bits); }

/// To nearest, ties to even; NaN stays a quiet NaN.
template <class S>
__device__ inline S narrow(Real<S> x) {
  return x;
}
template <>
__device__ inline bfloat16 narrow<bfloat16>(float x) {
  std::uint32_t bits;
  memcpy(&bits, &x, sizeof(bits));
  const bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
  const std::uint32_t rounded = bits + 0x7fffu + (bits >> 16 & 1u);
  return {static_cast<std::uint16_t>(is_nan ? bits >> 16 | 0x40u : rounded >> 16)};
}
template <>
__device__ inline float16 narrow<float16>(float x) {
  return {float_to_f16(x)};
}

/// Stores two neighbours; those of 16 bits at once, which wants them aligned to 4 bytes.
__device__ inline void store_pair(float* to, float x, float next) {
  to[0] = x;
  to[1] = next;
}
__device__ inline void store_pair(double* to, double x, double next) {
  to[0] = x;
  to[1] = next;
}
__device__ inline void store_pair(bfloat16* to, float x, float next) {
  *reinterpret_cast<std::uint32_t*>(to) = pack_bf16(x, next);
}
__device__ inline void store_pair(float16* to, float x, float next) {
  *reinterpret_cast<std::uint32_t*>(to) = pack_f16(x, next);
}

__device__ inline float exponential(float x) { return expf(x); }
__device__ inline double exponential(double x) { return exp(x); }
__device__ inline float logarithm(float x) { return logf(x); }
__device__ inline double logarithm(double x) { return log(x); }

/// The larger, or the other where one is NaN.
__device__ inline float larger(float a, float b) { return fmaxf(a, b); }
__device__ inline double larger(double a, double b) { return fmax(a, b); }

/// Raises the maximum of a row that has seen no key, -inf, to 0: exp(-inf - m) is then 0, not NaN.
template <class T>
__device__ inline T finite_maximum(T m) {
  return m == static_cast<T>(-kInfinity) ? T{0} : m;
}

/// P of a pair. Rounding may leave the logit above the log-sum-exp; P is at most 1 all the same.
template <class T>
__device__ inline T probability(T logit, T lse) {
  const T x = logit - lse;
  return exponential(x > T{0} ? T{0} : x);
}

}  // namespace sparse_attn::cuda
