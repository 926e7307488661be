// Numbers of the types that tensors have.
#pragma once

#include <cstdint>
#include <cstring>
#include <vector>

#include "params.h"
#include "scalar_types.h"

namespace attention {

using namespace sparse_attn;

inline std::size_t index(std::int64_t i) { return static_cast<std::size_t>(i); }

inline std::size_t size_of(DataType type) {
  return type == DataType::kFloat64 ? 8 : type == DataType::kFloat32 ? 4 : 2;
}

inline const HalfFormat& half_format(DataType type) {
  return type == DataType::kFloat16 ? kFloat16Format : kBFloat16Format;
}

/// The type of sums and of the log-sum-exp.
inline DataType real_type(DataType type) {
  return type == DataType::kFloat64 ? type : DataType::kFloat32;
}

/// Numbers of one type; all bits set (a NaN) until written.
class Numbers {
 public:
  Numbers() = default;
  Numbers(DataType type, std::int64_t count)
      : type_(type), bytes_(index(count) * size_of(type), '\xff') {}

  double get(std::int64_t i) const {
    const char* at = bytes_.data() + index(i) * size_of(type_);
    switch (type_) {
      case DataType::kFloat64:
        return read<double>(at);
      case DataType::kFloat32:
        return static_cast<double>(read<float>(at));
      default:
        return half_to_double(read<std::uint16_t>(at), half_format(type_));
    }
  }
  void set(std::int64_t i, double x) {
    char* at = bytes_.data() + index(i) * size_of(type_);
    switch (type_) {
      case DataType::kFloat64:
        return write(at, x);
      case DataType::kFloat32:
        return write(at, static_cast<float>(x));
      default:
        return write(at, double_to_half(x, half_format(type_)));
    }
  }
  bool untouched(std::int64_t i) const {
    const char* at = bytes_.data() + index(i) * size_of(type_);
    for (std::size_t b = 0; b < size_of(type_); ++b) {
      if (at[b] != '\xff') return false;
    }
    return true;
  }
  void* data() { return bytes_.data(); }
  const std::vector<char>& bytes() const { return bytes_; }

 private:
  template <class T>
  static T read(const char* at) {
    T x;
    std::memcpy(&x, at, sizeof(T));
    return x;
  }
  template <class T>
  static void write(char* at, T x) {
    std::memcpy(at, &x, sizeof(T));
  }

  DataType type_ = DataType::kFloat32;
  std::vector<char> bytes_;
};

}  // namespace attention
