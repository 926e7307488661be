// Keys chosen by their logits: all keys stream past each tile of queries, and what is chosen is
// kept; the logits never are. A logit is the same number whatever tile it is computed in.
#pragma once

#include "gemm.h"
#include "gradient_rows.h"
#include "selection_params.h"
#include "softmax.h"
#include "top_candidates.h"

namespace {

using sparse_attn::SelectionParams;

/// The queries of a tile and the keys that pass them.
template <class S>
struct SelectionTile {
  using T = Real<S>;

  SelectionTile(Arena& arena, const SelectionParams& params)
      : query(arena, static_cast<int>(params.head_dim)),
        numbers(arena.take<int32_t>(kMaxTile)),
        ends(arena.take<int64_t>(kMaxTile)),
        packed(arena.take<T>(int64_t{kMaxTile} *
                             round_up(static_cast<int>(params.head_dim), kLanes<T>))) {}

  TileRows<S> query;
  int64_t first_row;  // over all heads
  int rows;
  int keys;
  int32_t* numbers;  // of the keys
  int64_t* ends;     // the first key that a query does not see; 0 beyond the last query
  T* packed;
};

/// The k best.
template <class S>
struct ChooseTop {
  using T = Real<S>;

  ChooseTop(Arena& arena, const SelectionParams& params)
      : p(params), candidates(arena, params.width, params.n_k) {}

  void start(const SelectionTile<S>& tile) { candidates.start(tile.rows); }
  SPARSE_ATTN_INLINE unsigned takes(int vector, Vec<T> logits) const {
    return candidates.takes(vector, logits);
  }
  SPARSE_ATTN_INLINE void add(const SelectionTile<S>&, int query, IntLane<T> order, int32_t key) {
    candidates.add(query, order, key);
  }
  void finish(const SelectionTile<S>& tile) {
    for (int q = 0; q < tile.rows; ++q) {
      const int64_t row = tile.first_row + q;
      p.counts[row] = candidates.finish(q, p.indices + row * p.width);
    }
  }

  const SelectionParams& p;
  TopCandidates<T> candidates;
};

/// Those that are not below the query's bound, or NaN.
template <class S>
struct ChooseAbove {
  using T = Real<S>;

  ChooseAbove(Arena& arena, const SelectionParams& params)
      : p(params), bounds(arena.take<T>(kMaxTile)), counts(arena.take<int32_t>(kMaxTile)) {}

  void start(const SelectionTile<S>& tile) {
    for (int q = 0; q < kMaxTile; ++q) {
      bounds[q] =
          q < tile.rows ? static_cast<const T*>(p.bounds)[tile.first_row + q] : kInfinity<T>;
      counts[q] = 0;
    }
  }
  SPARSE_ATTN_INLINE unsigned takes(int vector, Vec<T> logits) const {
    return lane_bits<T>(~(logits < load(bounds + vector * kLanes<T>)));
  }
  void add(const SelectionTile<S>& tile, int query, IntLane<T>, int32_t key) {
    if (p.indices) p.indices[(tile.first_row + query) * p.width + counts[query]] = key;
    ++counts[query];
  }
  void finish(const SelectionTile<S>& tile) {
    for (int q = 0; q < tile.rows; ++q) p.counts[tile.first_row + q] = counts[q];
  }

  const SelectionParams& p;
  T* bounds;
  int32_t* counts;
};

/// Offers each logit of a product to the one who chooses.
template <class S, class Choose>
struct Offer {
  using T = Real<S>;

  SPARSE_ATTN_INLINE void operator()(int m, int n, Vec<T> sum) const {
    const Vec<T> logits = sum * scale;
    const unsigned bits = choose->takes(n, logits);
    if (__builtin_expect(bits != 0, 0)) take(m, n, logits, bits);
  }

  __attribute__((noinline)) void take(int m, int n, Vec<T> logits, unsigned bits) const {
    alignas(kVectorBytes) IntLane<T> orders[kLanes<T>];
    *reinterpret_cast<IntVec<T>*>(orders) = orders_of<T>(logits);
    const int32_t key = tile->numbers[m];
    for (; bits != 0; bits &= bits - 1) {
      const int lane = __builtin_ctz(bits), query = n * kLanes<T> + lane;
      if (key < tile->ends[query]) choose->add(*tile, query, orders[lane], key);
    }
  }

  const SelectionTile<S>* tile;
  Choose* choose;
  T scale;
};

template <class S, class Choose>
struct Chosen {
  using T = Real<S>;

  Chosen(Arena& arena, const SelectionParams& params)
      : choose(arena, params), scale(static_cast<T>(params.scale)) {}

  void start(const SelectionTile<S>& tile) { choose.start(tile); }
  void visit(const SelectionTile<S>& tile, const Rows<T>& keys) {
    gemm(tile.keys, round_up(tile.rows, kLanes<T>) / kLanes<T>, tile.query.size(),
         Operand<T, true>{keys.data, keys.stride}, tile.query.columns(), kMaxTile,
         Offer<S, Choose>{&tile, &choose, scale});
  }
  void finish(const SelectionTile<S>& tile) { choose.finish(tile); }

  Choose choose;
  T scale;
};

/// C = sum * scale.
template <class T>
struct SetScaled {
  T* c;
  T scale;
  SPARSE_ATTN_INLINE void operator()(int m, int n, Vec<T> sum) const {
    store(c + m * kMaxTile + n * kLanes<T>, sum * scale);
  }
};

/// The log-sum-exp of the same logits, summed over the tiles in double.
template <class S>
struct LogitSums {
  using T = Real<S>;

  LogitSums(Arena& arena, const SelectionParams& params)
      : p(params),
        scale(static_cast<T>(params.scale)),
        state(arena.take<SoftmaxState<T>>(1)),
        logits(arena.take<T>(kMaxTile * kMaxTile)),
        rescale(arena.take<T>(kMaxTile)),
        sums(arena.take<double>(kMaxTile)) {}

  void start(const SelectionTile<S>&) {
    state->init();
    for (int q = 0; q < kMaxTile; ++q) sums[q] = 0.0;
  }
  void visit(const SelectionTile<S>& tile, const Rows<T>& keys) {
    const int vectors = round_up(tile.rows, kLanes<T>) / kLanes<T>;
    gemm(tile.keys, vectors, tile.query.size(), Operand<T, true>{keys.data, keys.stride},
         tile.query.columns(), kMaxTile, SetScaled<T>{logits, scale});
    const int32_t last = tile.numbers[tile.keys - 1];
    for (int q = 0; q < tile.rows && tile.ends[q] <= last; ++q) {  // ends ascend
      for (int m = 0; m < tile.keys; ++m) {
        if (tile.numbers[m] >= tile.ends[q]) logits[m * kMaxTile + q] = -kInfinity<T>;
      }
    }
    for (int q = 0; q < kMaxTile; ++q) state->sum[q] = T{0};
    softmax_update(logits, {0, tile.keys}, {0, vectors}, *state, rescale);
    for (int q = 0; q < tile.rows; ++q)
      sums[q] = sums[q] * static_cast<double>(rescale[q]) + static_cast<double>(state->sum[q]);
  }
  void finish(const SelectionTile<S>& tile) {
    for (int q = 0; q < tile.rows; ++q) {
      p.lse[tile.first_row + q] =
          sums[q] == 0.0 ? -kInfinity<double>
                         : static_cast<double>(state->maximum[q]) + __builtin_log(sums[q]);
    }
  }

  const SelectionParams& p;
  const T scale;
  SoftmaxState<T>* state;
  T* logits;  // [key][query]
  T* rescale;
  double* sums;
};

/// Runs `Visitor` (start, visit for each tile of keys, finish) on each tile of queries.
template <class S, class Visitor>
class Selection {
 public:
  using T = Real<S>;

  explicit Selection(const SelectionParams& params)
      : p_(params), d_(static_cast<int>(params.head_dim)) {}

  static int64_t workspace(const SelectionParams& params, int threads) {
    return threads * Selection(params).scratch_bytes();
  }

  void run(const Parallel& parallel) const {
    const int64_t tiles = (p_.n_q + kMaxTile - 1) / kMaxTile, bytes = scratch_bytes();
    for_each_item(parallel, p_.batch * p_.heads * tiles, [&](int thread, int64_t item) {
      Arena arena(static_cast<char*>(p_.workspace) + thread * bytes);
      SelectionTile<S> tile(arena, p_);
      Visitor visitor(arena, p_);
      // The last tiles first: of causal ones they take the longest.
      pass_by(tile, visitor, item % (p_.batch * p_.heads),
              (tiles - 1 - item / (p_.batch * p_.heads)) * kMaxTile);
    });
  }

 private:
  int64_t scratch_bytes() const {
    Arena arena(nullptr);
    SelectionTile<S>(arena, p_);
    Visitor(arena, p_);
    return arena.used();
  }

  void pass_by(SelectionTile<S>& tile, Visitor& visitor, int64_t head, int64_t first) const {
    const int64_t left = p_.n_q - first;
    tile.rows = static_cast<int>(left < kMaxTile ? left : kMaxTile);
    tile.first_row = head * p_.n_q + first;
    tile.query.load(head_of<const S>(p_.query, p_.heads, head), Tile{first, 1, tile.rows, -1},
                    nullptr, all_rows(tile.rows), T{1});
    for (int q = 0; q < kMaxTile; ++q) tile.ends[q] = q < tile.rows ? end_of(first + q) : 0;
    visitor.start(tile);
    const Head<const S> key =
        head_of<const S>(p_.key, p_.heads_kv, head / (p_.heads / p_.heads_kv));
    const uint8_t* padding = p_.key_padding ? p_.key_padding + head / p_.heads * p_.n_k : nullptr;
    const int64_t end = tile.ends[tile.rows - 1];
    for (int64_t j = 0; j < end; j += kMaxTile) {
      const int count = static_cast<int>(end - j < kMaxTile ? end - j : kMaxTile);
      const Rows<T> keys = load_keys(tile, key, padding, j, count);
      if (tile.keys > 0) visitor.visit(tile, keys);
    }
    visitor.finish(tile);
  }

  int64_t end_of(int64_t query) const {
    const int64_t end = p_.is_causal ? query + 1 + p_.n_k - p_.n_q : p_.n_k;
    return end < 0 ? 0 : end;
  }

  /// The keys of a tile that are not padded.
  Rows<T> load_keys(SelectionTile<S>& tile, const Head<const S>& key, const uint8_t* padding,
                    int64_t first, int count) const {
    tile.keys = 0;
    for (int i = 0; i < count; ++i) {
      tile.numbers[tile.keys] = static_cast<int32_t>(first + i);
      tile.keys += padding && padding[first + i] ? 0 : 1;
    }
    if constexpr (kSameType<S, T>) {
      if (tile.keys == count && reads_rows_in_place(key, Tile{first, 1, count, -1}, d_))
        return {key.data + first * key.stride, key.stride};
    }
    const int padded = round_up(d_, kLanes<T>);
    for (int i = 0; i < tile.keys; ++i)
      pack_row(tile.packed + i * padded, key.data + tile.numbers[i] * key.stride, d_, padded);
    return {tile.packed, padded};
  }

  const SelectionParams& p_;
  const int d_;
};

}  // namespace
