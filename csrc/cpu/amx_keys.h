// Key and value tiles for AMX: see key_tiles.h.
#pragma once

#include "amx.h"
#include "key_tiles.h"

namespace {

/// A key tile ready for the products. Its masks, if any, and its columns go on as zeros to a
/// multiple of 32 keys.
struct AmxKeyTile {
  int count;
  AmxRows key;
  AmxRows value;    // backward only
  AmxRows columns;  // [size][key] of what the products of the keys' sums need
  const uint64_t* words;
};

/// `kBackward` says which columns: those of the keys, for dQ += dSᵀ K, or those of the values, for
/// O += P V.
template <bool kBackward>
class AmxKeyTiles {
 public:
  AmxKeyTiles(Arena& arena, const AttentionParams& params)
      : p_(params),
        d_(static_cast<int>(params.head_dim)),
        dv_(static_cast<int>(params.value_dim)),
        seen_(arena),
        kept_(arena),
        keys_(arena.take<BFloat16>(kKept * kMaxTile * round_up(d_, kAmxSum))),
        values_(arena.take<BFloat16>(kBackward ? kKept * kMaxTile * round_up(dv_, kAmxSum) : 0)),
        columns_(arena.take<BFloat16>(kKept * kMaxTile * column_size())),
        rows_(arena.take<BFloat16>(int64_t{kMaxTile} * column_size())),
        pairs_(arena.take<BFloat16>(int64_t{kMaxTile} * column_size())) {}

  void start(const PlanView& plan, const PassView& pass, int64_t head) {
    const int64_t head_kv = head / (p_.heads / p_.heads_kv);
    key_ = head_of<const BFloat16>(p_.key, p_.heads_kv, head_kv);
    value_ = head_of<const BFloat16>(p_.value, p_.heads_kv, head_kv);
    plan_ = &plan;
    pass_ = &pass;
    entry_keys_ = round_up(plan.tile_keys, kAmxSum);
    seen_.start(p_, head);
    kept_.start(kKept * kMaxTile / entry_keys_);
  }

  const Tile& tile(int32_t index) const { return pass_->key_tiles[index]; }

  /// False if no row sees any key of the tile.
  bool get(int32_t index, int32_t mask, AmxKeyTile& out) {
    const Tile& tile = pass_->key_tiles[index];
    const uint64_t seen = seen_.keys(tile, plan_->token_list);
    if (seen == 0) return false;
    out.count = tile.count;
    out.words = seen_.words(tile.count, seen, mask < 0 ? nullptr : plan_->masks[mask], kAmxSum);
    const int entry = kept_.entry(index);
    const bool fresh = !kept_.holds(index);
    out.key = rows(key_, tile, seen, d_, keys_, entry, fresh);
    if (kBackward) out.value = rows(value_, tile, seen, dv_, values_, entry, fresh);
    BFloat16* columns = columns_ + int64_t{entry} * entry_keys_ * column_size();
    out.columns = {columns, entry_keys_};
    if (fresh) pack_columns(columns, tile, seen);
    return true;
  }

 private:
  /// As in KeyTiles; all that is kept of 16 tiles of 64 x 64 is 256 or 384 KiB.
  static constexpr int64_t kKept = 16;

  int column_size() const { return round_up(kBackward ? d_ : dv_, kAmxSum); }
  /// The rows of a tile, in place where the tensor allows it.
  AmxRows rows(Head<const BFloat16> head, const Tile& tile, uint64_t seen, int size, BFloat16* kept,
               int entry, bool fresh) const {
    const int padded = round_up(size, kAmxSum);
    const bool in_place = seen == all_rows(tile.count) && tile.list < 0 && tile.step == 1 &&
                          head.stride == size && padded == size && tile.count % kAmxRows == 0;
    if (in_place) return {head.row(tile, nullptr, 0), head.stride};
    BFloat16* to = kept + int64_t{entry} * entry_keys_ * padded;
    if (fresh)
      copy_rows(to, head, tile, plan_->token_list, size, seen, round_up(tile.count, kAmxRows));
    return {to, padded};
  }

  void pack_columns(BFloat16* to, const Tile& tile, uint64_t seen) const {
    const int keys = round_up(tile.count, kAmxSum), size = column_size();
    copy_rows(rows_, kBackward ? key_ : value_, tile, plan_->token_list, kBackward ? d_ : dv_, seen,
              keys);
    pair_rows(pairs_, rows_, size, keys);
    transpose_pairs(to, entry_keys_ / 2, pairs_, keys / 2, size);
  }

  const AttentionParams& p_;
  const int d_, dv_;
  Head<const BFloat16> key_{}, value_{};
  const PlanView* plan_ = nullptr;
  const PassView* pass_ = nullptr;
  int entry_keys_ = 0;
  SeenKeys seen_;
  KeptTiles kept_;
  BFloat16* keys_;     // [entry][key][head_dim], padded
  BFloat16* values_;   // [entry][key][value_dim]
  BFloat16* columns_;  // [entry][size][key]
  BFloat16 *rows_, *pairs_;
};

}  // namespace
