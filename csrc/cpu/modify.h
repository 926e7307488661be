// What modifiers make of a tile of scores [key][query], between its products.
#pragma once

#include "dropout.h"
#include "pair_place.h"
#include "scheduler.h"
#include "softmax.h"
#include "tanh.h"

namespace {

struct VectorMath {
  template <class V>
  static SPARSE_ATTN_INLINE V tanh(V x) {
    using T = std::remove_reference_t<decltype(x[0])>;
    return ::tanh<T>(x);
  }
};

/// The tables of one head, and which of its probabilities dropout keeps.
template <class T>
class HeadModifiers {
 public:
  void start(const AttentionParams& params, int64_t head) {
    const Modifiers& m = params.modifiers;
    const int64_t b = head / params.heads, h = head % params.heads;
    const SlotWindow& window = m.window(h, params.heads);
    gate = HeadTable<T>(m.gate, window, b, h);
    bias = HeadTable<T>(m.bias, window, b, h);
    cap = static_cast<T>(m.softcap);
    drops_ = m.dropout_p > 0.0;
    if (!drops_) return;
    rule_ = {static_cast<uint64_t>(*m.dropout_seed), sparse_attn::dropout_threshold(m.dropout_p)};
    factor_ = m.dropout_p < 1.0 ? static_cast<T>(1.0 / (1.0 - m.dropout_p)) : T{0};
  }

  bool drops() const { return drops_; }
  /// What a kept probability is multiplied by.
  T factor() const { return factor_; }

  /// What a probability is multiplied by: 0 if it is dropped.
  T kept(int64_t head, int64_t query, int64_t key) const {
    return !drops_ ? T{1} : rule_.keeps(head, query, key) ? factor_ : T{0};
  }

  /// Calls visit(at, keep) for each pair of a tile. Rows lie side by side, for a loop that the
  /// compiler makes SIMD.
  template <class Visit>
  SPARSE_ATTN_INLINE void for_each_draw(const PlaceOfPairs& place, const Visit& visit) const {
    constexpr int64_t kRun = sparse_attn::kDropoutKeys;
    uint32_t words[4][kMaxTile];
    int64_t run = -1;
    for (int k = 0; k < place.keys; ++k) {
      const int64_t key = place.key[k];
      if (key / kRun != run) draw(place, run = key / kRun, words);
      const auto in_run = static_cast<int>(key % kRun);
      const uint32_t* word = words[in_run / 2];
      for (int r = 0; r < place.rows; ++r) {
        const bool keep = (word[r] >> (in_run % 2 * 16) & 0xffffu) >= rule_.threshold;
        visit(k * kMaxTile + r, keep);
      }
    }
  }

  HeadTable<T> gate, bias;
  T cap = T{0};

 private:
  void draw(const PlaceOfPairs& place, int64_t run, uint32_t (&words)[4][kMaxTile]) const {
    for (int r = 0; r < place.rows; ++r) {
      const sparse_attn::Random4 random =
          rule_.draw(place.head, place.query[r], run * sparse_attn::kDropoutKeys);
      for (int w = 0; w < 4; ++w) words[w][r] = random.word[w];
    }
  }

  bool drops_ = false;
  sparse_attn::DropoutRule rule_{};
  T factor_ = T{1};
};

/// Calls visit(at, key, vector) for each vector of a tile of numbers.
template <class T, class Visit>
SPARSE_ATTN_INLINE void for_each_vector(int keys, int vectors, const Visit& visit) {
  for (int k = 0; k < keys; ++k) {
    for (int v = 0; v < vectors; ++v) visit(k * kMaxTile + v * kLanes<T>, k, v);
  }
}

/// A vector of a tile that may not exist.
template <class T>
SPARSE_ATTN_INLINE Vec<T> load_or(const T* tile, int at, T other) {
  return tile ? load(tile + at) : broadcast(other);
}

template <class T>
class TileModifiers {
 public:
  explicit TileModifiers(Arena& arena)
      : gate_(arena.take<T>(kMaxTile * kMaxTile)), bias_(arena.take<T>(kMaxTile * kMaxTile)) {}

  void start(const AttentionParams& params, int64_t head) {
    exist_ = params.modifiers.any();
    if (!exist_) return;
    of_head_.start(params, head);
    shapes_ = of_head_.gate.exists() || of_head_.bias.exists() || of_head_.cap > T{0};
    place_.start(params, head);
  }
  bool exist() const { return exist_; }
  /// Whether they change scores, and whether they drop probabilities.
  bool shapes() const { return exist_ && shapes_; }
  bool drops() const { return exist_ && of_head_.drops(); }

  void set_rows(const Tile& tile, const int64_t* list) {
    if (exist_) place_.set_rows(tile, list);
  }
  void set_keys(const Tile& tile, const int64_t* list) { place_.set_keys(tile, list); }

  /// Scores -> logits, -inf where masked.
  void shape(T* scores, int vectors, const uint64_t* words) {
    const T *gate = of_head_.gate.load(place_, T{1}, gate_),
            *bias = of_head_.bias.load(place_, T{0}, bias_);
    for_each_vector<T>(place_.keys, vectors, [&](int at, int k, int v) {
      const auto logit = sparse_attn::logit_of<VectorMath>(
          load(scores + at), load_or(gate, at, T{1}), load_or(bias, at, T{0}), of_head_.cap);
      store(scores + at,
            words ? keep_lanes<T>(logit.value, words[k], v, -kInfinity<T>) : logit.value);
    });
  }

  /// Scores -> probabilities, and what a gradient of the logits is multiplied by to be one of the
  /// scores.
  void shape(T* scores, T* slopes, int vectors, const uint64_t* words, const T* lse) {
    const T *gate = of_head_.gate.load(place_, T{1}, gate_),
            *bias = of_head_.bias.load(place_, T{0}, bias_);
    for_each_vector<T>(place_.keys, vectors, [&](int at, int k, int v) {
      const auto logit = sparse_attn::logit_of<VectorMath>(
          load(scores + at), load_or(gate, at, T{1}), load_or(bias, at, T{0}), of_head_.cap);
      const Vec<T> p = probability<T>(logit.value, load(lse + v * kLanes<T>));
      store(scores + at, words ? keep_lanes<T>(p, words[k], v, T{0}) : p);
      store(slopes + at, logit.by_score);
    });
  }

  /// Gradients of the logits -> of the scores, by the slopes that `shape` gave.
  void multiply(T* gradients, const T* slopes, int vectors) const {
    for_each_vector<T>(place_.keys, vectors, [&](int at, int, int) {
      store(gradients + at, load(gradients + at) * load(slopes + at));
    });
  }

  void drop(T* probabilities) const {
    const T factor = of_head_.factor();
    of_head_.for_each_draw(place_, [=](int at, bool keep) {
      probabilities[at] = keep ? probabilities[at] * factor : T{0};
    });
  }
  /// Gives those to drop a minus, and what the others are to be multiplied by.
  T mark_dropped(T* probabilities) const {
    of_head_.for_each_draw(place_, [=](int at, bool keep) {
      probabilities[at] = keep ? probabilities[at] : -probabilities[at];
    });
    return of_head_.factor();
  }

 private:
  bool exist_ = false, shapes_ = false;
  HeadModifiers<T> of_head_;
  PlaceOfPairs place_{};
  T* gate_;
  T* bias_;
};

}  // namespace
