// A row tile of the forward pass and the key tiles that it visits: S = K Qᵀ, mask, softmax update,
// O = O + Vᵀ P.
#pragma once

#include "fetch_ahead.h"
#include "gemm.h"
#include "key_tiles.h"
#include "modify.h"
#include "scheduler.h"
#include "softmax.h"
#include "tile.h"
#include "visible_products.h"

namespace {

/// The softmax state of a row tile with its unnormalised output: what passes, key splits and chunks
/// merge.
template <class T>
struct RowState {
  SoftmaxState<T>* softmax;
  T* output;  // [value_dim][kMaxTile]

  static RowState take(Arena& arena, int64_t value_dim) {
    const int64_t padded = (value_dim + kLanes<T> - 1) / kLanes<T> * kLanes<T>;
    return {arena.take<SoftmaxState<T>>(1), arena.take<T>(padded * kMaxTile)};
  }
  void init(int value_dim) const {
    softmax->init();
    fill_zero(output, static_cast<int64_t>(value_dim) * kMaxTile);
  }
};

/// C = C · rescale + sum.
template <class T>
struct Accumulate {
  T* c;
  const T* rescale;
  SPARSE_ATTN_INLINE void operator()(int m, int n, Vec<T> sum) const {
    T* at = c + m * kMaxTile + n * kLanes<T>;
    store(at, load(at) * load(rescale + n * kLanes<T>) + sum);
  }
};

/// C = sum where the mask allows the pair, else -inf.
template <class T>
struct SetMasked {
  T* c;
  const uint64_t* words;  // one for each key
  SPARSE_ATTN_INLINE void operator()(int m, int n, Vec<T> sum) const {
    store(c + m * kMaxTile + n * kLanes<T>, keep_lanes<T>(sum, words[m], n, -kInfinity<T>));
  }
};

template <class S>
class ForwardTile {
 public:
  using T = Real<S>;

  ForwardTile(Arena& arena, const AttentionParams& params)
      : p_(params),
        d_(static_cast<int>(params.head_dim)),
        dv_(static_cast<int>(params.value_dim)),
        query_rows_(arena.take<T>(int64_t{kMaxTile} * round_up(d_, kLanes<T>))),
        query_(arena.take<T>(int64_t{kMaxTile} * round_up(d_, kLanes<T>))),
        logits_(arena.take<T>(kMaxTile * kMaxTile)),
        rescale_(arena.take<T>(kMaxTile)),
        keys_(arena, d_, dv_, ReadOnce::kKeys),
        modifiers_(arena) {}

  /// Turns to one head and pass.
  void start(const PlanView& plan, const PassView& pass, int64_t head) {
    head_ = head;
    list_ = plan.token_list;
    keys_.start(p_, plan, pass, head);
    modifiers_.start(p_, head);
  }

  void load_rows(const Tile& tile) {
    const Rows<T> rows = rows_to_transpose(head_of<const S>(p_.query, p_.heads, head_), tile, list_,
                                           d_, query_rows_);
    transpose_rows<T>(query_, kMaxTile, rows, tile.count, round_up(d_, kLanes<T>),
                      static_cast<T>(p_.scale));
    vectors_ = round_up(tile.count, kLanes<T>) / kLanes<T>;
    modifiers_.set_rows(tile, list_);
  }

  /// One key tile.
  SPARSE_ATTN_INLINE void attend(const RowState<T>& state, int32_t key_tile, int32_t mask,
                                 FetchStack& fetches) {
    KeyTile<T> keys;
    if (!keys_.get(key_tile, mask, keys)) return;
    visible_.set(keys.words, keys.count, vectors_);
    set_logits(keys, fetches);
    if (modifiers_.exist()) modifiers_.set_keys(keys_.tile(key_tile), list_);
    if (modifiers_.shapes()) modifiers_.shape(logits_, vectors_, keys.words);
    if (!visible_.whole()) {  // vectors that see no key stay as they are
      for (int i = 0; i < kMaxTile; i += kLanes<T>) store(rescale_ + i, broadcast(T{1}));
    }
    for (const VisibleColumns& part : visible_.columns())
      softmax_update(logits_, part.keys, part.vectors, *state.softmax, rescale_);
    if (modifiers_.drops()) modifiers_.drop(logits_);
    sum_over_visible_keys(visible_, dv_, Operand<T, false>{keys.value.data, keys.value.stride},
                          logits_,
                          Fetching<T, Accumulate<T>>{{state.output, rescale_}, fetches.take()});
  }

 private:
  SPARSE_ATTN_INLINE void set_logits(const KeyTile<T>& keys, FetchStack& fetches) {
    const Operand<T, true> key{keys.key.data, keys.key.stride};
    if (keys.words && !modifiers_.shapes()) {
      multiply_visible(
          visible_, d_, key, query_,
          Fetching<T, SetMasked<T>>{{logits_, keys.words}, fetches.take(visible_.whole())});
    } else {
      multiply_visible(visible_, d_, key, query_,
                       Fetching<T, SetTo<T>>{{logits_, kMaxTile}, fetches.take()});
    }
  }

  const AttentionParams& p_;
  const int d_, dv_;
  int64_t head_ = 0;
  const int64_t* list_ = nullptr;
  int vectors_ = 0;
  T* query_rows_;  // packed, when they cannot be read in place
  T* query_;       // [head_dim][kMaxTile], scaled
  T* logits_;      // [key][query], then the probabilities
  T* rescale_;     // [query]
  KeyTiles<S> keys_;
  VisibleBlocks<T> visible_;
  TileModifiers<T> modifiers_;
};

}  // namespace
