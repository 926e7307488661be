// Conversions between float and the narrow types, bit for bit as the device rounds.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace sparse_attn::cuda::emulator {

inline std::uint32_t bits_of(float x) {
  std::uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return bits;
}
inline float float_of(std::uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof(x));
  return x;
}

constexpr std::uint32_t kSign = 0x80000000u, kFloatInfinity = 0x7f800000u;
inline bool is_nan(std::uint32_t bits) { return (bits & ~kSign) > kFloatInfinity; }

inline float from_bf16(std::uint32_t bits) { return float_of(bits << 16); }

/// To nearest even; every NaN becomes 0x7fff.
inline std::uint32_t to_bf16(float x) {
  const std::uint32_t bits = bits_of(x);
  if (is_nan(bits)) return 0x7fff;
  return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

inline float from_f16(std::uint32_t bits) {
  const std::uint32_t magnitude = (bits & 0x7fff) << 13;  // exponents are 112 too small
  const bool is_finite = (bits & 0x7c00) != 0x7c00;
  const float x = is_finite ? float_of(magnitude) * 0x1p112f : float_of(magnitude | kFloatInfinity);
  return float_of(bits_of(x) | (bits & 0x8000) << 16);
}

/// To nearest even; every NaN becomes 0x7fff.
inline std::uint32_t to_f16(float x) {
  const std::uint32_t bits = bits_of(x), magnitude = bits & ~kSign, sign = (bits & kSign) >> 16;
  if (is_nan(bits)) return 0x7fff;
  if (magnitude >= bits_of(0x1p16f)) return sign | 0x7c00;
  if (magnitude < bits_of(0x1p-14f))  // the sum has the unit of the subnormal numbers, 2^-24
    return sign | (bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f));
  return sign | (magnitude - (112u << 23) + 0xfff + (magnitude >> 13 & 1)) >> 13;
}

/// To nearest, halves away from zero.
inline std::uint32_t round_to_tf32(float x) {
  const std::uint32_t bits = bits_of(x);
  if (is_nan(bits)) return 0x7fffffff;
  return (bits + 0x1000) & ~0x1fffu;
}

/// Subnormal numbers count as zero, before and after.
inline float exp2_flushed(float x) {
  const float y = std::exp2(std::fabs(x) < 0x1p-126f ? 0.0f : x);
  return y < 0x1p-126f ? 0.0f : y;
}

}  // namespace sparse_attn::cuda::emulator
