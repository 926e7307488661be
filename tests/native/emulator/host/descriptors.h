// Matrix descriptors: where wgmma finds an operand in shared memory. PTX ISA, "Matrix descriptor
// format" and "Strides"; CUTLASS's mma_sm90_desc.hpp draws the layouts.
#pragma once

#include <cstdint>
#include <sstream>
#include <string>

#include "host/block.h"

namespace sparse_attn::cuda {

enum class Major { kDepth, kOther };

namespace emulator {

constexpr std::uint64_t kSwizzle128 = std::uint64_t{1} << 62;

/// An address or a distance, without its 4 low bits.
constexpr std::uint64_t descriptor_field(std::uint64_t bytes) { return (bytes & 0x3ffff) >> 4; }

inline std::uint64_t matrix_descriptor(const void* shared, int piece_bytes) {
  const int address = block->shared.offset(shared, 16, 16, "matrix_descriptor");
  if (piece_bytes < 0 || piece_bytes % 16 != 0 || piece_bytes > 0x3ffff)
    fail("matrix_descriptor with a next piece after " + std::to_string(piece_bytes) + " bytes");
  return descriptor_field(static_cast<std::uint64_t>(address)) |
         descriptor_field(static_cast<std::uint64_t>(piece_bytes)) << 16 |
         descriptor_field(1024) << 32 | kSwizzle128;
}

inline std::uint64_t advance(std::uint64_t descriptor, int bytes) {
  if (bytes % 16 != 0) fail("a descriptor advanced by " + std::to_string(bytes) + " bytes");
  return descriptor + static_cast<std::uint64_t>(bytes >> 4);
}

inline std::string text_of_descriptor(std::uint64_t descriptor) {
  std::ostringstream text;
  text << "0x" << std::hex << descriptor;
  return text.str();
}

/// A matrix of 16-bit elements: its chunks of 8 that follow each other in memory.
class SharedMatrix {
 public:
  explicit SharedMatrix(std::uint64_t descriptor)
      : address_(field(descriptor, 0)),
        piece_bytes_(field(descriptor, 16)),
        atom_bytes_(field(descriptor, 32)) {
    constexpr std::uint64_t kFields = 0x00003fff3fff3fff | std::uint64_t{3} << 62;
    if ((descriptor & ~kFields) != 0 || descriptor >> 62 != 1) {
      fail("wgmma with the descriptor " + text_of_descriptor(descriptor) +
           ", of which a field has overflown");
    }
    if (address_ % 1024 >= 128) {
      fail("wgmma of a matrix at byte " + std::to_string(address_) +
           " of shared memory, which is not in the first row of an atom of 1024 bytes");
    }
  }

  /// Of Major::kDepth: elements 8 chunk to 8 chunk + 7 along the depth.
  void read_row(int row, int chunk, std::uint16_t (&to)[8]) const {
    read(row % 8 * 128 + row / 8 * atom_bytes_ + 16 * chunk, to);
  }
  /// Of Major::kOther: elements 8 chunk to 8 chunk + 7 along the other dimension.
  void read_other(int depth, int chunk, std::uint16_t (&to)[8]) const {
    read(chunk % 8 * 16 + chunk / 8 * piece_bytes_ + depth % 8 * 128 + depth / 8 * atom_bytes_, to);
  }

 private:
  static int field(std::uint64_t descriptor, int bit) {
    return static_cast<int>(descriptor >> bit & 0x3fff) << 4;
  }

  /// The swizzle is of the address.
  void read(int distance, std::uint16_t (&to)[8]) const {
    const int plain = address_ + distance, byte = plain ^ (plain >> 7 & 7) << 4;
    const char* from = block->shared.data() + byte;
    block->shared.check(from, "wgmma");
    if (block->unfenced.at(byte))
      fail("byte " + std::to_string(byte) + " of shared memory: read by wgmma without fence_async");
    std::memcpy(to, from, sizeof(to));
  }

  int address_, piece_bytes_, atom_bytes_;
};

}  // namespace emulator
}  // namespace sparse_attn::cuda
