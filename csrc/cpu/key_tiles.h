// Key and value tiles for the products: read in place where the tensor allows it, else packed once
// and kept for the next row tiles.
#pragma once

#include "params.h"
#include "scheduler.h"
#include "tile.h"
#include "visible_blocks.h"

namespace {

/// A key tile ready for the products; `words` is null if every row of the tile sees every key.
template <class T>
struct KeyTile {
  int count;
  Rows<T> key;
  Rows<T> value;
  const uint64_t* words;

  /// What of the pairs with vectors of queries is worth computing.
  void find_visible(int vectors, VisibleBlocks<T>& blocks) const {
    if (words) {
      blocks.set(words, count, vectors);
    } else {
      blocks.set_all(count, vectors);
    }
  }
};

template <class S>
class KeyTiles {
 public:
  using T = Real<S>;

  KeyTiles(Arena& arena, int d, int dv) : d_(d), dv_(dv) {
    words_ = arena.take<uint64_t>(kMaxTile);
    cached_ = arena.take<int32_t>(kMostEntries);
    keys_ = arena.take<T>(int64_t{kCached} * kMaxTile * round_up(d, kLanes<T>));
    values_ = arena.take<T>(int64_t{kCached} * kMaxTile * round_up(dv, kLanes<T>));
  }

  /// Turns to one head (of the queries) and pass.
  void start(const AttentionParams& params, const PlanView& plan, const PassView& pass,
             int64_t head) {
    start(params, params.key, params.value, plan, pass, head);
  }
  /// The same for tensors that are like the key and the value.
  void start(const AttentionParams& params, const sparse_attn::TensorView& like_key,
             const sparse_attn::TensorView& like_value, const PlanView& plan, const PassView& pass,
             int64_t head) {
    const int64_t head_kv = head / (params.heads / params.heads_kv);
    key_ = head_of<const S>(like_key, params.heads_kv, head_kv);
    value_ = head_of<const S>(like_value, params.heads_kv, head_kv);
    const int64_t b = head / params.heads;
    padding_ = params.key_padding ? params.key_padding + b * params.n_k : nullptr;
    plan_ = &plan;
    pass_ = &pass;
    entries_ = kCached * kMaxTile / plan.tile_keys;
    if (entries_ > kMostEntries) entries_ = kMostEntries;
    for (int i = 0; i < entries_; ++i) cached_[i] = -1;
  }

  const Tile& tile(int32_t index) const { return pass_->key_tiles[index]; }

  /// False if no row sees any key of the tile.
  bool get(int32_t index, int32_t mask, KeyTile<T>& out) {
    const Tile& tile = pass_->key_tiles[index];
    const uint64_t all = all_rows(tile.count), seen = unpadded(tile, plan_->token_list);
    if (seen == 0) return false;
    out.count = tile.count;
    out.words = mask < 0 ? nullptr : plan_->masks[mask];
    if (seen != all) {
      for (int i = 0; i < tile.count; ++i) {
        words_[i] = !(seen >> i & 1) ? 0 : out.words ? out.words[i] : ~uint64_t{0};
      }
      out.words = words_;
    } else if (reads_in_place(tile)) {
      out.key = in_place(key_, tile);
      out.value = in_place(value_, tile);
      return true;
    }
    const int entry = index % entries_;
    const int64_t first = int64_t{entry} * plan_->tile_keys;
    out.key = {keys_ + first * round_up(d_, kLanes<T>), round_up(d_, kLanes<T>)};
    out.value = {values_ + first * round_up(dv_, kLanes<T>), round_up(dv_, kLanes<T>)};
    if (cached_[entry] != index) pack(tile, plan_->token_list, seen, out);
    cached_[entry] = index;
    return true;
  }

  /// The same for keys of a list: what was kept is lost.
  bool gather(const Tile& tile, const int64_t* list, KeyTile<T>& out) {
    const uint64_t seen = unpadded(tile, list);
    if (seen == 0) return false;
    out = {
        tile.count, {keys_, round_up(d_, kLanes<T>)}, {values_, round_up(dv_, kLanes<T>)}, nullptr};
    if (seen != all_rows(tile.count)) {
      for (int i = 0; i < tile.count; ++i) words_[i] = seen >> i & 1 ? ~uint64_t{0} : 0;
      out.words = words_;
    }
    pack(tile, list, seen, out);
    for (int i = 0; i < entries_; ++i) cached_[i] = -1;
    return true;
  }

 private:
  /// A window of +-256 keeps 10 tiles in use; 16 of 64 x 64 keys and values are 512 KiB, which a
  /// level-2 cache holds. Smaller tiles have more entries in the same room.
  static constexpr int kCached = 16, kMostEntries = 64;

  /// Padded keys become zeros: whatever they hold, NaN too, is ignored.
  void pack(const Tile& tile, const int64_t* list, uint64_t seen, const KeyTile<T>& to) const {
    pack_rows(const_cast<T*>(to.key.data), key_, tile, list, d_, seen);
    pack_rows(const_cast<T*>(to.value.data), value_, tile, list, dv_, seen);
  }

  bool reads_in_place(const Tile& tile) const {
    return reads_rows_in_place<S>(key_, tile, d_) && reads_rows_in_place<S>(value_, tile, dv_);
  }

  Rows<T> in_place(const Head<const S>& head, const Tile& tile) const {
    if constexpr (kSameType<S, T>) return {head.row(tile, plan_->token_list, 0), head.stride};
    return {nullptr, 0};
  }

  /// Bit i is set unless key i of the tile is padding.
  uint64_t unpadded(const Tile& tile, const int64_t* list) const {
    if (!padding_) return all_rows(tile.count);
    uint64_t bits = 0;
    for (int i = 0; i < tile.count; ++i) {
      const bool padded = padding_[sparse_attn::token(tile, list, i)] != 0;
      bits |= static_cast<uint64_t>(!padded) << i;
    }
    return bits;
  }

  const int d_, dv_;
  Head<const S> key_{}, value_{};
  const uint8_t* padding_ = nullptr;
  const PlanView* plan_ = nullptr;
  const PassView* pass_ = nullptr;
  uint64_t* words_;  // of the tile at hand
  int entries_ = 0;
  int32_t* cached_;  // which tile each entry holds
  T* keys_;          // [entry][key][head_dim], padded
  T* values_;
};

}  // namespace
