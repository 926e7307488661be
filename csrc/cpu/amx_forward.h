// A row tile of the forward pass on AMX tiles: see forward_tile.h.
//
// S = K Qᵀ takes rows of K as they are and pairs of Q; Oᵀ += Vᵀ P takes columns of V, kept with the
// key tile, and pairs of P, which the softmax writes. Scores stay float32, so does the sum of P.
#pragma once

#include "amx_keys.h"
#include "amx_softmax.h"
#include "forward_tile.h"

namespace {

class AmxForwardTile {
 public:
  AmxForwardTile(Arena& arena, const AttentionParams& params)
      : p_(params),
        d_(static_cast<int>(params.head_dim)),
        dv_(static_cast<int>(params.value_dim)),
        query_rows_(arena.take<BFloat16>(int64_t{kMaxTile} * round_up(d_, kAmxSum))),
        query_(arena.take<BFloat16>(int64_t{kMaxTile} * round_up(d_, kAmxSum))),
        scores_(arena.take<float>(kMaxTile * kMaxTile)),
        pairs_(arena.take<BFloat16>(kMaxTile * kAmxColumns * kAmxRows)),
        rescale_(arena.take<float>(kMaxTile)),
        keys_(arena, params),
        modifiers_(arena) {}

  void start(const PlanView& plan, const PassView& pass, int64_t head) {
    head_ = head;
    list_ = plan.token_list;
    keys_.start(plan, pass, head);
    modifiers_.start(p_, head);
  }

  void load_rows(const Tile& tile) {
    const int rows = round_up(tile.count, kAmxRows), padded = round_up(d_, kAmxSum);
    copy_rows(query_rows_, head_of<const BFloat16>(p_.query, p_.heads, head_), tile, list_, d_,
              all_rows(tile.count), rows);
    pair_columns(query_, query_rows_, rows, padded);
    vectors_ = rows / kAmxRows;
    modifiers_.set_rows(tile, list_);
  }

  void attend(const RowState<float>& state, int32_t key_tile, int32_t mask, FetchStack& fetches) {
    AmxKeyTile keys;
    if (!keys_.get(key_tile, mask, keys)) return;
    const auto scale = static_cast<float>(p_.scale);
    const bool plain = !modifiers_.exist() && scale > 0.0f;
    if (!plain) {
      modifiers_.set_keys(keys_.tile(key_tile), list_);
      weigh_modified(state, keys, scale);
    }
    for_each_block([&](int first, int vectors) {
      if (plain) {
        weigh(state, keys, first, vectors, scale, fetches.take());
      } else {
        pair_keys(scores_, keys.words, round_up(keys.count, kAmxSum), first, vectors, pairs_);
      }
      add_values(state.output, keys, first, vectors);
    });
  }

 private:
  /// Calls visit(first, vectors) for each block of vectors of queries.
  template <class Visit>
  SPARSE_ATTN_INLINE void for_each_block(const Visit& visit) const {
    for (int first = 0; first < vectors_; first += kAmxColumns)
      visit(first, vectors_ - first < kAmxColumns ? vectors_ - first : kAmxColumns);
  }

  void multiply_keys(const AmxKeyTile& keys, int first, int vectors, AmxSums scores) const {
    const int size = round_up(d_, kAmxSum);
    amx_product<false>(round_up(keys.count, kAmxRows) / kAmxRows, vectors, size / kAmxSum, keys.key,
                       of_columns(query_, first, size), scores);
  }

  /// The weights of a block. It is small, so that what one step writes is still in the level-1
  /// cache for the next.
  void weigh(const RowState<float>& state, const AmxKeyTile& keys, int first, int vectors,
             float scale, FetchBlock ahead) {
    multiply_keys(keys, first, vectors, {scores_, kAmxColumns * kAmxRows});
    const AmxSoftmax softmax{scores_,  keys.words, round_up(keys.count, kAmxSum),
                             first,    scale,      *state.softmax,
                             rescale_, pairs_,     ahead};
    if (keys.words) {
      amx_softmax<true>(softmax, vectors);
    } else {
      amx_softmax<false>(softmax, vectors);
    }
  }

  /// Those of all queries by the text that all types share.
  void weigh_modified(const RowState<float>& state, const AmxKeyTile& keys, float scale) {
    for_each_block([&](int first, int vectors) {
      multiply_keys(keys, first, vectors, {scores_ + first * kAmxRows, kMaxTile});
    });
    const bool shapes = modifiers_.shapes();
    for_each_vector<float>(keys.count, vectors_, [&](int at, int k, int v) {
      const Vec<float> score = load(scores_ + at) * scale;
      const bool masks = keys.words && !shapes;
      store(scores_ + at,
            masks ? keep_lanes<float>(score, keys.words[k], v, -kInfinity<float>) : score);
    });
    if (shapes) modifiers_.shape(scores_, vectors_, keys.words);
    softmax_update(scores_, {0, keys.count}, {0, vectors_}, *state.softmax, rescale_);
    if (modifiers_.drops()) modifiers_.drop(scores_);
  }

  void add_values(float* output, const AmxKeyTile& keys, int first, int vectors) const {
    for (int v = first; v < first + vectors; ++v) {
      const Vec<float> factor = load(rescale_ + v * kLanes<float>);
      if (lane_bits<float>(factor != 1.0f) == 0) continue;
      for (int c = 0; c < dv_; ++c) {
        float* at = output + c * kMaxTile + v * kLanes<float>;
        store(at, load(at) * factor);
      }
    }
    amx_product<true>(round_up(dv_, kAmxRows) / kAmxRows, vectors,
                      round_up(keys.count, kAmxSum) / kAmxSum, keys.columns,
                      {pairs_, kAmxColumns * kAmxSum}, {output + first * kAmxRows, kMaxTile});
  }

  const AmxTiles tiles_;
  const AttentionParams& p_;
  const int d_, dv_;
  int64_t head_ = 0;
  const int64_t* list_ = nullptr;
  int vectors_ = 0;
  BFloat16* query_rows_;  // [query][head_dim], padded
  BFloat16* query_;       // [block][head_dim / 2][query][2]
  float* scores_;         // [key][query], of all queries or a block
  BFloat16* pairs_;       // of probabilities of a block, [key / 2][query][2]
  float* rescale_;        // [query]
  AmxKeyTiles<false> keys_;
  TileModifiers<float> modifiers_;
};

}  // namespace
