// Storage types and their widening to the type that sums are kept in: half types to float, the
// others to themselves.
#pragma once

#include "vec.h"

namespace {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

template <class S>
struct RealOf {
  using Type = S;
};
template <>
struct RealOf<BFloat16> {
  using Type = float;
};
template <>
struct RealOf<Float16> {
  using Type = float;
};
template <class S>
using Real = typename RealOf<S>::Type;

typedef uint16_t HalfLanes __attribute__((vector_size(kVectorBytes / 2)));
typedef uint16_t HalfLanesUnaligned
    __attribute__((vector_size(kVectorBytes / 2), aligned(2), may_alias));
typedef uint32_t WordLanes __attribute__((vector_size(kVectorBytes)));

SPARSE_ATTN_INLINE WordLanes load_half_lanes(const void* p) {
  return __builtin_convertvector(HalfLanes(*static_cast<const HalfLanesUnaligned*>(p)), WordLanes);
}

SPARSE_ATTN_INLINE void store_half_lanes(void* p, WordLanes words) {
  *static_cast<HalfLanesUnaligned*>(p) = __builtin_convertvector(words, HalfLanes);
}

SPARSE_ATTN_INLINE WordLanes as_words(Vec<float> x) { return reinterpret_cast<WordLanes>(x); }
SPARSE_ATTN_INLINE Vec<float> as_floats(WordLanes x) { return reinterpret_cast<Vec<float>>(x); }

SPARSE_ATTN_INLINE Vec<float> load_real(const float* p) { return load(p); }
SPARSE_ATTN_INLINE Vec<double> load_real(const double* p) { return load(p); }
SPARSE_ATTN_INLINE Vec<float> load_real(const BFloat16* p) {
  return as_floats(load_half_lanes(p) << 16);
}

/// float16 to float32 with integer operations that every instruction set has: the exponent is
/// rebased by a multiplication, which also normalises subnormals; infinities and NaNs get their
/// full exponent back.
SPARSE_ATTN_INLINE Vec<float> load_real(const Float16* p) {
  const WordLanes half = load_half_lanes(p);
  const WordLanes sign = (half & 0x8000u) << 16;
  const WordLanes magnitude = (half & 0x7fffu) << 13;
  const WordLanes scaled = as_words(as_floats(magnitude) * 0x1p112f);
  const WordLanes special = magnitude | 0x7f800000u;
  return as_floats(((half & 0x7c00u) == 0x7c00u ? special : scaled) | sign);
}

SPARSE_ATTN_INLINE void store_real(float* p, Vec<float> x) { store(p, x); }
SPARSE_ATTN_INLINE void store_real(double* p, Vec<double> x) { store(p, x); }

/// Round to nearest, ties to even; NaN stays a quiet NaN.
SPARSE_ATTN_INLINE void store_real(BFloat16* p, Vec<float> x) {
  const WordLanes words = as_words(x);
  const WordLanes rounded = (words + 0x7fffu + ((words >> 16) & 1u)) >> 16;
  const WordLanes nan = (words >> 16) | 0x40u;
  store_half_lanes(p, (words & 0x7fffffffu) > 0x7f800000u ? nan : rounded);
}

/// Round to nearest, ties to even. Adding a suitable power of two lets the floating-point adder
/// round subnormal results.
SPARSE_ATTN_INLINE void store_real(Float16* p, Vec<float> x) {
  const WordLanes words = as_words(x);
  const WordLanes magnitude = words & 0x7fffffffu;
  const WordLanes sign = (words >> 16) & 0x8000u;
  const WordLanes normal = (magnitude + 0xc8000fffu + ((magnitude >> 13) & 1u)) >> 13;
  const WordLanes subnormal = as_words(as_floats(magnitude) + 0.5f) - 0x3f000000u;
  const WordLanes infinite = WordLanes{} + 0x7c00u;
  WordLanes half = magnitude < 0x38800000u ? subnormal : normal;
  half = magnitude >= 0x47800000u ? infinite : half;
  half = magnitude > 0x7f800000u ? infinite | 0x200u : half;
  store_half_lanes(p, half | sign);
}

/// The same for the last few elements of a row, through a padded vector.
template <class S>
SPARSE_ATTN_INLINE Vec<Real<S>> load_real_part(const S* p, int count) {
  S padded[kLanes<Real<S>>] = {};
  for (int i = 0; i < count; ++i) padded[i] = p[i];
  return load_real(padded);
}

template <class S>
SPARSE_ATTN_INLINE void store_real_part(S* p, Vec<Real<S>> x, int count) {
  S padded[kLanes<Real<S>>];
  store_real(padded, x);
  for (int i = 0; i < count; ++i) p[i] = padded[i];
}

}  // namespace
