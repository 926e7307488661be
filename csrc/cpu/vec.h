// A small SIMD vector on GCC/Clang vector extensions: one text for SSE4, AVX2, AVX-512 and NEON.
//
// This header and everything else that kernels.cpp includes is compiled once per instruction set.
// All of it lives in an unnamed namespace and uses no inline function of the standard library: a
// shared inline symbol would let the linker keep, say, its AVX-512 copy for the baseline path as
// well.
#pragma once

#include <cstdint>

namespace {

using std::int16_t;
using std::int32_t;
using std::int64_t;
using std::uint16_t;
using std::uint32_t;
using std::uint64_t;
using std::uint8_t;

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

#define SPARSE_ATTN_INLINE inline __attribute__((always_inline))

template <class T>
struct VecTypes;
template <>
struct VecTypes<float> {
  typedef float Vec __attribute__((vector_size(kVectorBytes)));
  typedef float Unaligned __attribute__((vector_size(kVectorBytes), aligned(4), may_alias));
  typedef int32_t Int __attribute__((vector_size(kVectorBytes)));
  using IntLane = int32_t;
};
template <>
struct VecTypes<double> {
  typedef double Vec __attribute__((vector_size(kVectorBytes)));
  typedef double Unaligned __attribute__((vector_size(kVectorBytes), aligned(8), may_alias));
  typedef int64_t Int __attribute__((vector_size(kVectorBytes)));
  using IntLane = int64_t;
};

template <class T>
using Vec = typename VecTypes<T>::Vec;
template <class T>
using IntVec = typename VecTypes<T>::Int;
template <class T>
constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(T));

template <class T>
SPARSE_ATTN_INLINE Vec<T> load(const T* p) {
  return *reinterpret_cast<const typename VecTypes<T>::Unaligned*>(p);
}

template <class T>
SPARSE_ATTN_INLINE void store(T* p, Vec<T> v) {
  *reinterpret_cast<typename VecTypes<T>::Unaligned*>(p) = v;
}

template <class T>
SPARSE_ATTN_INLINE Vec<T> broadcast(T x) {
  return x - Vec<T>{};
}

template <class T>
SPARSE_ATTN_INLINE Vec<T> max(Vec<T> a, Vec<T> b) {
  return a > b ? a : b;
}

/// A bit for each lane of a comparison's result.
template <class T>
SPARSE_ATTN_INLINE unsigned lane_bits(IntVec<T> mask) {
  [[maybe_unused]] constexpr bool kWide = sizeof(T) == 8;
#if defined(__AVX512DQ__)
  if constexpr (kWide)
    return __builtin_ia32_cvtq2mask512(
        reinterpret_cast<long long __attribute__((vector_size(64)))>(mask));
  else
    return __builtin_ia32_cvtd2mask512(
        reinterpret_cast<int __attribute__((vector_size(64)))>(mask));
#elif defined(__AVX__)
  if constexpr (kWide)
    return __builtin_ia32_movmskpd256(reinterpret_cast<Vec<T> >(mask));
  else
    return __builtin_ia32_movmskps256(reinterpret_cast<Vec<T> >(mask));
#elif defined(__SSE2__)
  if constexpr (kWide)
    return __builtin_ia32_movmskpd(reinterpret_cast<Vec<T> >(mask));
  else
    return __builtin_ia32_movmskps(reinterpret_cast<Vec<T> >(mask));
#else
  unsigned bits = 0;
  for (int i = 0; i < kLanes<T>; ++i) bits |= (mask[i] != 0 ? 1u : 0u) << i;
  return bits;
#endif
}

constexpr int round_up(int n, int multiple) { return (n + multiple - 1) / multiple * multiple; }

}  // namespace
