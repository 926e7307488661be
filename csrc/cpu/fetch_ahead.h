// Rows that are needed soon, brought into the cache while products are at work: the queries,
// outputs and gradients of the next row tile, and keys that are met for the first time. A window of
// +-128 takes 8 % longer without, as each row of a head is far from memory when it is first read.
#pragma once

#include "key_tiles.h"
#include "tile.h"

namespace {

using sparse_attn::Run;
using sparse_attn::Segment;

/// Rows of a tile, the first vectors of each.
struct FetchBlock {
  const char* data;
  int64_t stride;  // bytes

  /// Into the level-2 cache: what fills the level-1 cache is in use.
  SPARSE_ATTN_INLINE void fetch(int row, int vector) const {
    __builtin_prefetch(data + row * stride + vector * kVectorBytes, 0, 2);
  }
};

/// What `finish` does with a vector of a product, and a vector of a block fetched with each:
/// fetches in a burst would wait for memory as the reads themselves do.
template <class T, class Finish>
struct Fetching {
  Finish finish;
  FetchBlock block;
  SPARSE_ATTN_INLINE void operator()(int m, int n, Vec<T> sum) const {
    finish(m, n, sum);
    block.fetch(m, n);
  }
};

/// Blocks to be fetched, one by each product: the last that came is needed first.
class FetchStack {
 public:
  void clear() { count_ = 0; }

  /// Rows of `size` numbers; nothing if they are not evenly spaced, or there is no room.
  template <class S>
  void push(const Head<S>& head, const Tile& tile, int size) {
    if (tile.list >= 0) return;
    const auto* rows = reinterpret_cast<const char*>(head.row(tile, nullptr, 0));
    const int64_t stride = head.stride * tile.step * static_cast<int64_t>(sizeof(S));
    for (int64_t at = 0; at < size * static_cast<int64_t>(sizeof(S)); at += kBlockBytes) {
      if (count_ < kMost) blocks_[count_++] = {rows + at, stride};
    }
  }

  /// The next block, or one that is in cache: for a product that leaves vectors out, too.
  FetchBlock take(bool whole = true) {
    if (count_ == 0 || !whole) return {reinterpret_cast<const char*>(this), 0};
    return blocks_[--count_];
  }

 private:
  static constexpr int kMost = 16;
  /// What the vectors of 64 single-precision queries reach over.
  static constexpr int64_t kBlockBytes = kMaxTile * sizeof(float);

  FetchBlock blocks_[kMost];
  int count_ = 0;
};

/// Calls visit(key_tile, mask, next) for each key tile of a segment; `next` comes after it, in the
/// segment `after` if need be, or is -1.
template <class Visit>
SPARSE_ATTN_INLINE void for_each_key_tile(const PassView& pass, const Segment& segment,
                                          const Segment* after, const Visit& visit) {
  const bool goes_on = after && after->first_run < after->end_run;
  for (uint32_t r = segment.first_run; r < segment.end_run; ++r) {
    const Run& run = pass.runs[r];
    const int32_t next = r + 1 < segment.end_run ? pass.runs[r + 1].key_tile
                         : goes_on               ? pass.runs[after->first_run].key_tile
                                                 : -1;
    for (int32_t i = 0; i < run.count; ++i)
      visit(run.key_tile + i, run.mask, i + 1 < run.count ? run.key_tile + i + 1 : next);
  }
}

}  // namespace
