// Key and value tiles for the products: read in place where the tensor allows it, else packed once
// and kept for the next row tiles.
#pragma once

#include "params.h"
#include "scheduler.h"
#include "tile.h"

namespace {

/// A key tile ready for the products; `words` is null if every row of the tile sees every key.
template <class T>
struct KeyTile {
  int count;
  Rows<T> key;
  Rows<T> value;
  const uint64_t* words;
};

/// Which keys of the tiles of one head count, and the masks that say so.
class SeenKeys {
 public:
  explicit SeenKeys(Arena& arena) : words_(arena.take<uint64_t>(kMaxTile)) {}

  void start(const AttentionParams& params, int64_t head) {
    const int64_t b = head / params.heads;
    padding_ = params.key_padding ? params.key_padding + b * params.n_k : nullptr;
  }

  /// Bit i is set unless key i of the tile is padding.
  uint64_t keys(const Tile& tile, const int64_t* list) const {
    if (!padding_) return all_rows(tile.count);
    uint64_t bits = 0;
    for (int i = 0; i < tile.count; ++i) {
      const bool padded = padding_[sparse_attn::token(tile, list, i)] != 0;
      bits |= static_cast<uint64_t>(!padded) << i;
    }
    return bits;
  }

  /// A tile's mask without the keys that are not seen, going on as zeros to a multiple of so many
  /// keys. Null if every row sees all these keys. Valid until the next call.
  const uint64_t* words(int count, uint64_t seen, const uint64_t* mask, int multiple) {
    const int padded = round_up(count, multiple);
    if (seen == all_rows(count) && count == padded) return mask;
    for (int i = 0; i < padded; ++i) {
      words_[i] = !(seen >> i & 1) ? 0 : mask ? mask[i] : ~uint64_t{0};
    }
    return words_;
  }

 private:
  uint64_t* words_;
  const uint8_t* padding_ = nullptr;
};

/// Which of the last tiles are kept, and where.
class KeptTiles {
 public:
  explicit KeptTiles(Arena& arena) : tiles_(arena.take<int32_t>(kMostEntries)) {}

  void start(int entries = kMostEntries) {
    entries_ = entries < kMostEntries ? entries : kMostEntries;
    clear();
  }
  void clear() {
    for (int i = 0; i < entries_; ++i) tiles_[i] = -1;
  }
  int entry(int32_t tile) const { return tile % entries_; }
  /// Whether the tile is there; it is from now on.
  bool holds(int32_t tile) {
    int32_t& of_entry = tiles_[entry(tile)];
    const bool kept = of_entry == tile;
    of_entry = tile;
    return kept;
  }

 private:
  static constexpr int kMostEntries = 64;
  int entries_ = 0;
  int32_t* tiles_;
};

/// Which rows a single product reads, each once from one end to the other.
enum class ReadOnce { kNeither, kKeys, kValues };

template <class S>
class KeyTiles {
 public:
  using T = Real<S>;

  KeyTiles(Arena& arena, int d, int dv, ReadOnce once = ReadOnce::kNeither)
      : d_(d), dv_(dv), once_(once), seen_(arena), kept_(arena) {
    keys_ = arena.take<T>(int64_t{kKept} * kMaxTile * round_up(d, kLanes<T>));
    values_ = arena.take<T>(int64_t{kKept} * kMaxTile * round_up(dv, kLanes<T>));
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
    plan_ = &plan;
    pass_ = &pass;
    seen_.start(params, head);
    kept_.start(kKept * kMaxTile / plan.tile_keys);
  }

  const Tile& tile(int32_t index) const { return pass_->key_tiles[index]; }

  /// False if no row sees any key of the tile.
  bool get(int32_t index, int32_t mask, KeyTile<T>& out) {
    const Tile& tile = pass_->key_tiles[index];
    const uint64_t seen = seen_.keys(tile, plan_->token_list);
    if (seen == 0) return false;
    out.count = tile.count;
    out.words = seen_.words(tile.count, seen, mask < 0 ? nullptr : plan_->masks[mask], 1);
    const int entry = kept_.entry(index);
    const bool fresh = !kept_.holds(index);
    out.key = rows(key_, tile, seen, d_, once_ == ReadOnce::kKeys, keys_, entry, fresh);
    out.value = rows(value_, tile, seen, dv_, once_ == ReadOnce::kValues, values_, entry, fresh);
    return true;
  }

  /// The same for keys of a list: what was kept is lost.
  bool gather(const Tile& tile, const int64_t* list, KeyTile<T>& out) {
    const uint64_t seen = seen_.keys(tile, list);
    if (seen == 0) return false;
    out = {tile.count,
           {keys_, round_up(d_, kLanes<T>)},
           {values_, round_up(dv_, kLanes<T>)},
           seen_.words(tile.count, seen, nullptr, 1)};
    pack_rows(keys_, key_, tile, list, d_, seen);
    pack_rows(values_, value_, tile, list, dv_, seen);
    kept_.clear();
    return true;
  }

 private:
  /// A window of +-256 keeps 10 tiles in use; 16 of 64 x 64 keys and values are 512 KiB, which a
  /// level-2 cache holds. Smaller tiles have more entries in the same room.
  static constexpr int kKept = 16;
  /// Rows that are read once stay where they are up to this stride, which takes 2 % off a window of
  /// dilation 2; from 2 KiB on packing them is as fast or, for tiles that are used often, faster.
  static constexpr int64_t kFarthest = 1024 / sizeof(T);

  /// The rows of a tile, in place where the tensor allows it. Padded ones become zeros: whatever
  /// they hold, NaN too, is ignored.
  Rows<T> rows(const Head<const S>& head, const Tile& tile, uint64_t seen, int size, bool once,
               T* kept, int entry, bool fresh) const {
    if constexpr (kSameType<S, T>) {
      const bool in_place = once ? tile.list < 0 && head.stride * tile.step <= kFarthest
                                 : reads_rows_in_place<S>(head, tile, size);
      if (in_place && seen == all_rows(tile.count))
        return {head.row(tile, nullptr, 0), head.stride * tile.step};
    }
    const int padded = round_up(size, kLanes<T>);
    T* to = kept + int64_t{entry} * plan_->tile_keys * padded;
    if (fresh) pack_rows(to, head, tile, plan_->token_list, size, seen);
    return {to, padded};
  }

  const int d_, dv_;
  const ReadOnce once_;
  Head<const S> key_{}, value_{};
  const PlanView* plan_ = nullptr;
  const PassView* pass_ = nullptr;
  SeenKeys seen_;
  KeptTiles kept_;
  T* keys_;  // [entry][key][head_dim], padded
  T* values_;
};

}  // namespace
