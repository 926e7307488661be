// The half types written plainly, one value at a time: the definition that the vector code is held
// to.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

/// Sign, then `exponent_bits`, then `mantissa_bits`, as IEEE 754 has them.
struct HalfFormat {
  int exponent_bits;
  int mantissa_bits;

  int bias() const { return (1 << (exponent_bits - 1)) - 1; }
  std::uint16_t infinity() const {
    return static_cast<std::uint16_t>(((1 << exponent_bits) - 1) << mantissa_bits);
  }
  /// The distance of neighbors around x.
  double unit(double x) const {
    const int least = 1 - bias();
    const int exponent = x == 0.0 ? least : std::ilogb(x);
    return std::ldexp(1.0, (exponent < least ? least : exponent) - mantissa_bits);
  }
};

constexpr HalfFormat kFloat16Format{5, 10};
constexpr HalfFormat kBFloat16Format{8, 7};

inline double half_to_double(std::uint16_t bits, const HalfFormat& format) {
  const int mantissa = bits & ((1 << format.mantissa_bits) - 1);
  const int exponent = (bits & 0x7fff) >> format.mantissa_bits;
  const double sign = bits & 0x8000 ? -1.0 : 1.0;
  if (exponent == (1 << format.exponent_bits) - 1)
    return mantissa ? std::nan("") : sign * static_cast<double>(INFINITY);
  const int hidden = exponent == 0 ? 0 : 1 << format.mantissa_bits;
  const int power = (exponent == 0 ? 1 : exponent) - format.bias() - format.mantissa_bits;
  return sign * std::ldexp(mantissa + hidden, power);
}

/// Round to nearest, ties to even.
inline std::uint16_t double_to_half(double x, const HalfFormat& format) {
  const int sign = std::signbit(x) ? 0x8000 : 0;
  if (std::isnan(x)) return static_cast<std::uint16_t>(sign | format.infinity() | 1);
  const double magnitude = std::fabs(x);
  if (std::isinf(x)) return static_cast<std::uint16_t>(sign | format.infinity());
  const double unit = format.unit(magnitude);
  const double rounded = std::nearbyint(magnitude / unit) * unit;
  const double least_infinite = std::ldexp(1.0, format.bias() + 1);
  if (rounded >= least_infinite) return static_cast<std::uint16_t>(sign | format.infinity());
  const double least_normal = std::ldexp(1.0, 1 - format.bias());
  if (rounded < least_normal)
    return static_cast<std::uint16_t>(sign | static_cast<int>(rounded / format.unit(0.0)));
  const int exponent = std::ilogb(rounded);
  const double fraction = rounded / std::ldexp(1.0, exponent) - 1.0;
  return static_cast<std::uint16_t>(sign | (exponent + format.bias()) << format.mantissa_bits |
                                    static_cast<int>(std::ldexp(fraction, format.mantissa_bits)));
}

inline float float_from_bits(std::uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof(x));
  return x;
}

inline double double_from_bits(std::uint64_t bits) {
  double x;
  std::memcpy(&x, &bits, sizeof(x));
  return x;
}
