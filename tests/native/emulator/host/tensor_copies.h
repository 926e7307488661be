// TMA: tiles of a tensor that a unit of its own copies to shared memory.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "host/copies.h"
#include "host/map_contents.h"
#include "host/units.h"

namespace sparse_attn::cuda::emulator {

constexpr int kBoxRowBytes = 2 * kBoxColumns, kBoxBytes = kBoxTokens * kBoxRowBytes;

/// A box of 64 tokens, rows of 128 bytes, whose 16-byte chunk c lies in row r at place c ^ r % 8.
class Box {
 public:
  Box(const MapContents& map, const int (&at)[5]) : map_(map) { std::copy(at, at + 5, at_); }

  /// Reads the tensor, now.
  void copy_to(char* shared) const {
    for (int row = 0; row < kBoxTokens; ++row) {
      Words4 chunks[kBoxRowBytes / 16] = {};
      read_row(row, reinterpret_cast<char*>(chunks));
      for (int c = 0; c < kBoxRowBytes / 16; ++c)
        std::memcpy(shared + row * kBoxRowBytes + (c ^ row % 8) * 16, chunks + c, sizeof(Words4));
    }
  }

 private:
  /// What of the row is in the tensor.
  void read_row(int row, char* to) const {
    const std::int64_t rest[] = {at_[1], at_[2] + std::int64_t{row}, at_[3], at_[4]};
    const char* from = map_.data;
    for (int d = 1; d < 5; ++d) {
      if (rest[d - 1] < 0 || rest[d - 1] >= map_.dimensions[d]) return;
      from += rest[d - 1] * map_.strides[d];
    }
    const std::int64_t first = std::max<std::int64_t>(-std::int64_t{at_[0]}, 0);
    const std::int64_t last = std::min<std::int64_t>(map_.dimensions[0] - at_[0], kBoxColumns);
    if (first >= last) return;
    std::memcpy(to + 2 * first, from + 2 * (at_[0] + first),
                static_cast<std::size_t>(2 * (last - first)));
  }

  MapContents map_;
  int at_[5];
};

/// Only a map among the kernel's arguments is where the unit can read it.
inline MapContents contents(const TensorMap* map) {
  const auto begin = reinterpret_cast<std::uintptr_t>(block->arguments);
  const auto address = reinterpret_cast<std::uintptr_t>(map);
  if (address < begin || address + sizeof(TensorMap) > begin + block->argument_bytes)
    fail("tma_load: the map is not a parameter of the grid");
  MapContents contents;
  std::memcpy(&contents, map, sizeof(contents));
  if (contents.mark != MapContents::kMark) fail("tma_load: no map that make_tensor_map made");
  return contents;
}

/// The destination holds NaNs until the data lands, at some moment.
inline void tma_load(void* shared, const TensorMap* map, void* barrier, const int (&at)[5]) {
  const int byte = block->shared.offset(shared, kBoxBytes, 1024, "tma_load");
  const Box box(contents(map), at);
  const unsigned phase = units->barriers.begin_copy(barrier);
  char* to = static_cast<char*>(shared);
  for (int i = 0; i < kBoxBytes; i += 16) {
    std::memcpy(to + i, &kNaNs, sizeof(kNaNs));
    block->unfenced.overwritten(byte + i);
  }
  executor.later([=] {
    box.copy_to(to);
    units->barriers.end_copy(barrier, kBoxBytes, phase);
  });
}

}  // namespace sparse_attn::cuda::emulator
