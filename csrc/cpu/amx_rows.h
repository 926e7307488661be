// Rows of one tensor as the backward products on AMX tiles need them: see gradient_rows.h.
#pragma once

#include "amx.h"

namespace {

class AmxTileRows {
 public:
  AmxTileRows(Arena& arena, int size)
      : size_(size),
        padded_(round_up(size, kAmxSum)),
        rows_(arena.take<BFloat16>(int64_t{kMaxTile} * padded_)),
        columns_(arena.take<BFloat16>(int64_t{kMaxTile} * padded_)),
        pairs_(arena.take<BFloat16>(int64_t{kMaxTile} * padded_)) {}

  /// Rows whose bit in `live` is clear, and those up to a multiple of 32, count as zero. A factor
  /// of the columns would round them once more; it is for the products.
  void load(Head<const BFloat16> head, const Tile& tile, const int64_t* list, uint64_t live,
            float /*factor*/) {
    const int rows = round_up(tile.count, kAmxSum);
    copy_rows(rows_, head, tile, list, size_, live, rows);
    pair_columns(columns_, rows_, rows, padded_);
    pair_rows(pairs_, rows_, padded_, rows);
  }

  /// The product of row i and another one of whole vectors.
  float dot(int i, const float* other) const {
    Vec<float> sum{};
    for (int c = 0; c < size_; c += kLanes<float>)
      sum += load_real(rows_ + i * padded_ + c) * ::load(other + c);
    float total = 0;
    for (int l = 0; l < kLanes<float>; ++l) total += sum[l];
    return total;
  }

  /// [size / 2][row][2] of some rows.
  AmxRows columns(int first) const { return of_columns(columns_, first, padded_); }
  AmxRows pairs() const { return {pairs_, int64_t{2} * padded_}; }  // [row / 2][size][2]
  int size() const { return size_; }
  int sum_tiles() const { return padded_ / kAmxSum; }

 private:
  const int size_, padded_;
  BFloat16 *rows_, *columns_, *pairs_;
};

}  // namespace
