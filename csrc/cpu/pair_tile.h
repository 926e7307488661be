// A tile of pairs with all that derivatives want of it: probabilities and gradients of the logits
// and, `kAlong` a tangent of the inputs (marked _dot), how these change:
//
//   score = scale · q · k            score_dot = scale · (q_dot · k + q · k_dot)
//   P = exp(logit - lse)             P_dot = P ∘ (logit_dot - lse_dot)
//   E = kept ∘ (V dOᵀ)               E_dot = kept ∘ (V_dot dOᵀ)
//   dS = P ∘ (E - delta)             dS_dot = P_dot ∘ (E - delta) + P ∘ (E_dot - delta_dot)
#pragma once

#include "gemm.h"
#include "gradient_rows.h"
#include "key_tiles.h"
#include "modify.h"

namespace {

/// What a vector of pairs has.
template <class T>
struct PairValues {
  sparse_attn::LogitAlong<Vec<T>> logit;
  Vec<T> p, kept, ds;
  Vec<T> p_dot, ds_dot;
};

template <class S, bool kAlong>
class PairTile {
 public:
  using T = Real<S>;

  PairTile(Arena& arena, const AttentionParams& params)
      : p_(params),
        rows_(arena, params),
        query_dot_(arena, kAlong ? static_cast<int>(params.head_dim) : 0),
        keys_(arena, static_cast<int>(params.head_dim), static_cast<int>(params.value_dim)),
        keys_dot_(arena, kAlong ? static_cast<int>(params.head_dim) : 0,
                  kAlong ? static_cast<int>(params.value_dim) : 0),
        lse_dot_(arena.take<T>(kMaxTile)),
        delta_dot_(arena.take<T>(kMaxTile)) {
    for (T** tile : {&score_, &e_, &gate_, &bias_, &kept_}) *tile = take_tile(arena);
    if (!kAlong) return;
    for (T** tile : {&score_dot_, &e_dot_, &gate_dot_, &bias_dot_}) *tile = take_tile(arena);
  }

  static T* take_tile(Arena& arena) { return arena.take<T>(kMaxTile * kMaxTile); }

  void start(const PlanView& plan, const PassView& pass, int64_t head) {
    head_ = head;
    list_ = plan.token_list;
    place_.start(p_, head);
    keys_.start(p_, plan, pass, head);
    of_head_.start(p_, head);
    if (!kAlong) return;
    keys_dot_.start(p_, p_.key_tangent, p_.value_tangent, plan, pass, head);
    const int64_t b = head / p_.heads, h = head % p_.heads;
    const SlotWindow& window = p_.modifiers.window(h, p_.heads);
    gate_table_dot_ = HeadTable<T>(p_.gate_tangent, window, b, h);
    bias_table_dot_ = HeadTable<T>(p_.bias_tangent, window, b, h);
  }

  /// Rows without the output's gradient and what follows from it.
  void load_inputs(const RowTile& tile, const int64_t* list) {
    rows_.load_inputs(head_, tile, list);
    load_tangents(tile, list);
  }
  void load_rows(const RowTile& tile, const int64_t* list) {
    rows_.load(head_, tile, list);
    load_tangents(tile, list);
    if (!kAlong) return;
    rows_.dot_outputs(head_, p_.output_tangent, tile.rows, list, delta_dot_);
    for (int i = 0; i < kMaxTile; ++i) {
      lse_dot_[i] = T{0};
      if (!(rows_.live >> i & 1)) continue;
      const int64_t row = head_ * p_.n_q + sparse_attn::token(tile.rows, list, i);
      lse_dot_[i] = static_cast<const T*>(p_.lse_tangent)[row];
    }
  }

  bool get(int32_t key_tile, int32_t mask) {
    if (!keys_.get(key_tile, mask, now_)) return false;
    if (kAlong) keys_dot_.get(key_tile, mask, now_dot_);
    place_.set_keys(keys_.tile(key_tile), list_);
    return true;
  }
  bool gather(const Tile& tile, const int64_t* list) {
    if (!keys_.gather(tile, list, now_)) return false;
    if (kAlong) keys_dot_.gather(tile, list, now_dot_);
    place_.set_keys(tile, list);
    return true;
  }

  /// The scores.
  void multiply_inputs() {
    multiply(now_.key, rows_.query, SetTo<T>{score_, kMaxTile});
    if (!kAlong) return;
    multiply(now_.key, query_dot_, SetTo<T>{score_dot_, kMaxTile});
    multiply(now_dot_.key, rows_.query, AddTo<T>{score_dot_, kMaxTile});
  }
  /// V dOᵀ.
  void multiply_gradients() {
    multiply(now_.value, rows_.grad_output, SetTo<T>{e_, kMaxTile});
    if (kAlong) multiply(now_dot_.value, rows_.grad_output, SetTo<T>{e_dot_, kMaxTile});
  }

  /// Calls visit(at, vector, values) for each vector of the tile, without what comes of the
  /// output's gradient.
  template <class Visit>
  void for_each_probability(const Visit& visit) {
    const T* gate = of_head_.gate.load(place_, T{1}, gate_);
    const T* bias = of_head_.bias.load(place_, T{0}, bias_);
    const T *gate_dot = nullptr, *bias_dot = nullptr, *kept = nullptr;
    if (kAlong) {
      gate_dot = gate_table_dot_.load(place_, T{0}, gate_dot_);
      bias_dot = bias_table_dot_.load(place_, T{0}, bias_dot_);
    }
    if (of_head_.drops()) {
      of_head_.for_each_draw(
          place_, [this](int at, bool keep) { kept_[at] = keep ? of_head_.factor() : T{0}; });
      kept = kept_;
    }
    for_each_vector<T>(now_.count, rows_.vectors, [&](int at, int k, int v) {
      PairValues<T> pair{};
      pair.logit = sparse_attn::logit_along<VectorMath>(
          load(score_ + at), load_or(gate, at, T{1}), load_or(bias, at, T{0}),
          kAlong ? load(score_dot_ + at) : Vec<T>{}, load_or(gate_dot, at, T{0}),
          load_or(bias_dot, at, T{0}), of_head_.cap);
      const Vec<T> p = probability<T>(pair.logit.at.value, load(rows_.lse + v * kLanes<T>));
      pair.p = now_.words ? keep_lanes<T>(p, now_.words[k], v, T{0}) : p;
      pair.kept = load_or(kept, at, T{1});
      visit(at, v, pair);
    });
  }

  /// The same with all values.
  template <class Visit>
  void for_each_gradient(const Visit& visit) {
    for_each_probability([&](int at, int v, PairValues<T>& pair) {
      const Vec<T> e = load(e_ + at) * pair.kept - load(rows_.delta + v * kLanes<T>);
      pair.ds = pair.p * e;
      if (kAlong) {
        const Vec<T> e_dot = load(e_dot_ + at) * pair.kept - load(delta_dot_ + v * kLanes<T>);
        pair.p_dot = pair.p * (pair.logit.along.value - load(lse_dot_ + v * kLanes<T>));
        pair.ds_dot = pair.p_dot * e + pair.p * e_dot;
      }
      visit(at, v, pair);
    });
  }

  const PlaceOfPairs& place() const { return place_; }
  const GradientRows<S>& rows() const { return rows_; }
  const TileRows<S>& query_dot() const { return query_dot_; }
  const KeyTile<T>& keys() const { return now_; }
  const KeyTile<T>& keys_dot() const { return now_dot_; }

 private:
  void load_tangents(const RowTile& tile, const int64_t* list) {
    place_.set_rows(tile.rows, list);
    if (!kAlong) return;
    query_dot_.load(head_of<const S>(p_.query_tangent, p_.heads, head_), tile.rows, list,
                    rows_.live, static_cast<T>(p_.scale));
  }

  template <class Finish>
  void multiply(const Rows<T>& keys, const TileRows<S>& queries, const Finish& finish) const {
    gemm(now_.count, rows_.vectors, queries.size(), Operand<T, true>{keys.data, keys.stride},
         queries.columns(), kMaxTile, finish);
  }

  const AttentionParams& p_;
  int64_t head_ = 0;
  const int64_t* list_ = nullptr;
  PlaceOfPairs place_{};
  GradientRows<S> rows_;
  TileRows<S> query_dot_;
  KeyTiles<S> keys_, keys_dot_;
  KeyTile<T> now_{}, now_dot_{};
  HeadModifiers<T> of_head_;
  HeadTable<T> gate_table_dot_, bias_table_dot_;
  T* lse_dot_;
  T* delta_dot_;
  T *score_, *e_, *gate_, *bias_, *kept_;  // [key][query]
  T *score_dot_ = nullptr, *e_dot_ = nullptr, *gate_dot_ = nullptr, *bias_dot_ = nullptr;
};

}  // namespace
