// Backward: five products for each key tile,
//
//   S = K Qᵀ, P = exp(S - lse), dP = V dOᵀ, dS = P ∘ (dP - delta),
//   dV += P dO, dK += dS Q, dQ += dSᵀ K
//
// with the queries in the SIMD lanes of S, P, dP, dS and dQ.
#pragma once

#include "gradient_rows.h"
#include "gradient_sweep.h"
#include "key_tiles.h"
#include "listed_backward.h"
#include "modify.h"
#include "softmax.h"
#include "visible_products.h"

namespace {

/// P = exp(S - lse).
template <class T>
struct Probabilities {
  T* p;
  const T* lse;
  SPARSE_ATTN_INLINE Vec<T> of(int n, Vec<T> sum) const {
    return probability<T>(sum, load(lse + n * kLanes<T>));
  }
  SPARSE_ATTN_INLINE void operator()(int m, int n, Vec<T> sum) const {
    store(p + m * kMaxTile + n * kLanes<T>, of(n, sum));
  }
};

/// The same, 0 where a mask forbids the pair.
template <class T>
struct MaskedProbabilities {
  Probabilities<T> all;
  const uint64_t* words;
  SPARSE_ATTN_INLINE void operator()(int m, int n, Vec<T> sum) const {
    const Vec<T> p = all.of(n, sum);
    store(all.p + m * kMaxTile + n * kLanes<T>, keep_lanes<T>(p, words[m], n, T{0}));
  }
};

/// dS = P ∘ (dP - delta) · scale.
template <class T>
struct LogitGradients {
  T* ds;
  const T* p;
  const T* delta;
  T scale;
  SPARSE_ATTN_INLINE void operator()(int m, int n, Vec<T> sum) const {
    const int at = m * kMaxTile + n * kLanes<T>;
    store(ds + at, load(p + at) * ((sum - load(delta + n * kLanes<T>)) * scale));
  }
};

/// The same with dropout, and P becomes what it leaves of the probabilities. Those with a minus are
/// dropped: a tile of factors beside these two would not fit the level-1 cache.
template <class T>
struct DroppedLogitGradients {
  LogitGradients<T> logits;
  T* p;
  T factor;
  SPARSE_ATTN_INLINE void operator()(int m, int n, Vec<T> sum) const {
    const int at = m * kMaxTile + n * kLanes<T>;
    const Vec<T> marked = load(p + at), zero{};
    const auto dropped = marked < zero;
    const Vec<T> all = dropped ? -marked : marked;
    store(logits.ds + at,
          all * (((dropped ? zero : sum * factor) - load(logits.delta + n * kLanes<T>)) *
                 logits.scale));
    store(p + at, dropped ? zero : all * factor);
  }
};

/// What a tile of pairs adds to the gradients.
template <class S>
class PairGradients {
 public:
  using T = Real<S>;

  PairGradients(Arena& arena, const AttentionParams& params)
      : p_(params),
        rows_(arena, params),
        keys_(arena, static_cast<int>(params.head_dim), static_cast<int>(params.value_dim),
              ReadOnce::kValues),
        modifiers_(arena),
        probabilities_(arena.take<T>(kMaxTile * kMaxTile)),
        ds_(arena.take<T>(kMaxTile * kMaxTile)),
        slopes_(arena.take<T>(kMaxTile * kMaxTile)) {}

  void start(const PlanView& plan, const PassView& pass, int64_t head) {
    head_ = head;
    list_ = plan.token_list;
    keys_.start(p_, plan, pass, head);
    modifiers_.start(p_, head);
  }

  void load_rows(const RowTile& tile, const int64_t* list) {
    rows_.load(head_, tile, list);
    modifiers_.set_rows(tile.rows, list);
  }

  bool get(int32_t key_tile, int32_t mask) {
    if (!keys_.get(key_tile, mask, now_)) return false;
    if (modifiers_.exist()) modifiers_.set_keys(keys_.tile(key_tile), list_);
    return true;
  }

  SPARSE_ATTN_INLINE void add(T* grad_query, AddTo<T> to_key, AddTo<T> to_value,
                              FetchStack& fetches) {
    visible_.set(now_.words, now_.count, rows_.vectors);
    set_probabilities(fetches);
    const LogitGradients<T> logits{ds_, probabilities_, rows_.delta, static_cast<T>(p_.scale)};
    if (modifiers_.drops()) {
      multiply(now_.value, rows_.grad_output, fetches,
               DroppedLogitGradients<T>{logits, probabilities_,
                                        modifiers_.mark_dropped(probabilities_)});
    } else {
      multiply(now_.value, rows_.grad_output, fetches, logits);
    }
    if (modifiers_.shapes()) modifiers_.multiply(ds_, slopes_, rows_.vectors);
    sum_over_visible_keys(visible_, rows_.query.size(),
                          Operand<T, false>{now_.key.data, now_.key.stride}, ds_,
                          Fetching<T, AddTo<T>>{{grad_query, kMaxTile}, fetches.take()});
    add_keys(probabilities_, rows_.grad_output, to_value);
    add_keys(ds_, rows_.query, to_key);
  }

 private:
  SPARSE_ATTN_INLINE void set_probabilities(FetchStack& fetches) {
    const Probabilities<T> all{probabilities_, rows_.lse};
    if (modifiers_.shapes()) {
      multiply(now_.key, rows_.query, fetches, SetTo<T>{probabilities_, kMaxTile});
      modifiers_.shape(probabilities_, slopes_, rows_.vectors, now_.words, rows_.lse);
    } else if (now_.words) {
      multiply(now_.key, rows_.query, fetches, MaskedProbabilities<T>{all, now_.words});
    } else {
      multiply(now_.key, rows_.query, fetches, all);
    }
  }

  /// Products of keys, or values, with rows of the queries.
  template <class Finish>
  SPARSE_ATTN_INLINE void multiply(const Rows<T>& keys, const TileRows<S>& queries,
                                   FetchStack& fetches, const Finish& finish) const {
    multiply_visible(visible_, queries.size(), Operand<T, true>{keys.data, keys.stride},
                     queries.columns(),
                     Fetching<T, Finish>{finish, fetches.take(visible_.whole())});
  }

  /// Adds up rows of the queries for each key.
  SPARSE_ATTN_INLINE void add_keys(const T* factors, const TileRows<S>& queries,
                                   const AddTo<T>& sums) const {
    sum_over_visible_queries(visible_, rows_.count, queries.vectors(),
                             Operand<T, true>{factors, kMaxTile}, queries.rows().data,
                             queries.rows().stride, sums);
  }

  const AttentionParams& p_;
  int64_t head_ = 0;
  const int64_t* list_ = nullptr;
  GradientRows<S> rows_;
  KeyTiles<S> keys_;
  KeyTile<T> now_{};
  VisibleBlocks<T> visible_;
  TileModifiers<T> modifiers_;
  T* probabilities_;  // [key][query]
  T* ds_;             // [key][query]
  T* slopes_;         // of the logits in the scores
};

template <class S, class PairsOfTile = PairGradients<S>>
class Backward {
 public:
  using T = Real<S>;

  explicit Backward(const AttentionParams& params) : p_(params), sweep_(params) {}

  int64_t layout(void* base, int threads) {
    Arena arena(base);
    const int64_t sweep_bytes = sweep_.layout(base, threads);
    arena.take<char>(sweep_bytes);
    if (!has_lists(p_)) return arena.used();
    delta_ = arena.take<T>(p_.batch * p_.heads * p_.n_q);
    Arena one_thread(nullptr);
    ListScratch(one_thread, p_);
    scratch_bytes_ = one_thread.used();
    scratch_ = arena.take<char>(threads * scratch_bytes_);
    return arena.used();
  }

  void run(const Parallel& parallel) {
    layout(p_.workspace, parallel.threads);
    sweep_.passes(parallel);
    if (has_lists(p_)) run_lists(parallel);
    sweep_.finish(parallel);
  }

 private:
  using ListScratch = typename ListedBackward<S>::Scratch;

  void run_lists(const Parallel& parallel) {
    const ListedBackward<S> listed(p_, delta_);
    const int64_t heads = p_.batch * p_.heads, shares = list_shares(heads, p_.n_q);
    for_each_item(parallel, heads * shares, [&](int thread, int64_t item) {
      Arena arena(scratch_ + thread * scratch_bytes_);
      ListScratch scratch(arena, p_);
      const int64_t head = item / shares;
      listed.queries(scratch, head, sweep_.query_sums(head), {p_.n_q, item % shares, shares});
    });
    const int64_t heads_kv = p_.batch * p_.heads_kv, key_shares = list_shares(heads_kv, p_.n_k);
    const int64_t group = p_.heads / p_.heads_kv;
    for_each_item(parallel, heads_kv * key_shares, [&](int thread, int64_t item) {
      Arena arena(scratch_ + thread * scratch_bytes_);
      ListScratch scratch(arena, p_);
      const int64_t head_kv = item / key_shares;
      for (int64_t head = head_kv * group; head < (head_kv + 1) * group; ++head) {
        listed.keys(scratch, head, sweep_.key_sums(head_kv), sweep_.value_sums(head_kv),
                    {p_.n_k, item % key_shares, key_shares});
      }
    });
  }

  const AttentionParams& p_;
  GradientSweep<S, PairsOfTile> sweep_;
  T* delta_ = nullptr;  // of the lists
  char* scratch_ = nullptr;
  int64_t scratch_bytes_ = 0;
};

}  // namespace
