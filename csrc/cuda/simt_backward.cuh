// Backward on any device. With P = exp(S - lse) and dS = P ∘ (dP - delta), by tiles of queries:
// dQ = dS K; by tiles of keys: dV = Pᵀ dO and dK = dSᵀ Q.
//
// Both are one text: a block has a tile of one side, `own`, and visits tiles of the `other`. With X
// for Q or K and Y for dO or V it makes own X · other Xᵀ = S (or Sᵀ) and own Y · other Yᵀ = dP (or
// dPᵀ), and sums products of P and dS with the other's Y and X.
#pragma once

#include "cuda/simt_tiles.cuh"
#include "cuda/sinks.cuh"

namespace sparse_attn::cuda {

/// `kModified`: the call has modifiers.
template <class S, Side kSide, bool kModified>
class SimtBackward {
  using T = Real<S>;
  using Products = SimtProducts<S>;
  using Logits = typename Products::Logits;
  using Tiles = SimtTiles<S, kModified>;
  static constexpr bool kByRows = kSide == Side::kRows;

  /// Columns of the gradients that are summed at a time, 128 of float32 and 64 of float64. For each
  /// further lot P and dS are computed again.
  static constexpr int kBlocks = 2;
  static constexpr int kColumns = kBlocks * Products::kBlockColumns;
  using Sums = typename Products::BlockSum[kBlocks];

 public:
  static constexpr int kThreads = kSimtThreads;
  static constexpr int kBlocksPerSM = kByRows && sizeof(T) == 4 ? 2 : 1;
  static constexpr int kSharedBytes = Tiles::kBytes;

  static __device__ void run(const Arguments& a) {
    const Work work(a, kSide);
    if (!work.found()) return;
    if (a.grad_query.add && !work.has_visits()) return;
    SimtBackward backward(a, work);
    const int size = kByRows || backward.head_dim_ > backward.value_dim_ ? backward.head_dim_
                                                                         : backward.value_dim_;
    for (int first = 0; first < size; first += kColumns) backward.sum_columns(first);
  }

 private:
  /// One head's tensors, by their place in the products.
  struct Heads {
    TileRows<S> own_x, own_y, other_x, other_y;
  };

  __device__ SimtBackward(const Arguments& a, const Work& work)
      : a_(a),
        work_(work),
        head_dim_(static_cast<int>(a.call.head_dim)),
        value_dim_(static_cast<int>(a.call.value_dim)),
        tiles_(a, work) {
    if (kByRows) {
      tiles_.load_rows(work.row_tile(0), work.head);
    } else {
      tiles_.load_keys(work.own_tile(0));
    }
  }

  __device__ Heads heads(std::int64_t head) const {
    const TileRows<S> query{query_head<S>(a_.call, work_.batch, head), tiles_.rows, head_dim_};
    const TileRows<S> grad{grad_output_head<S>(a_.call, work_.batch, head), tiles_.rows,
                           value_dim_};
    const TileRows<S> key{key_head<S>(a_.call, work_.batch, head), tiles_.keys, head_dim_};
    const TileRows<S> value{value_head<S>(a_.call, work_.batch, head), tiles_.keys, value_dim_};
    if (kByRows) return {query, grad, key, value};
    return {key, value, query, grad};
  }

  /// Columns of the gradients from `first` on.
  __device__ void sum_columns(int first) {
    clear(sum_x_);
    clear(sum_y_);
    for (std::int64_t head = work_.head; head < work_.end_head(); ++head) {
      const Heads of = heads(head);
      for (VisitWalk at(work_, tiles_.covers); !at.done(); at.next()) visit(of, at, head, first);
    }
    write(first);
  }

  __device__ void visit(const Heads& of, const VisitWalk& at, std::int64_t head, int first) {
    load_other(at, head);
    if constexpr (kModified) {
      visit_with_modifiers(of, at, head, first);
      return;
    }
    Logits d;
    Products::rows_by_rows(d, of.own_x, of.other_x, tiles_.stage);
    probabilities(d, static_cast<T>(a_.call.scale));
    Products::store(tiles_.tile, d);
    if (!kByRows) add(sum_y_, of.other_y, first);
    if (first >= head_dim_) return;
    Products::rows_by_rows(d, of.own_y, of.other_y, tiles_.stage);
    logit_gradients(d);
    Products::store(tiles_.tile, d);
    add(sum_x_, of.other_x, first);
  }

  /// The same; dS = `weights` ∘ (D ∘ dP - delta), where weights = P ∘ (derivative of the logits in
  /// the scaled products) and D is dropout. By tiles of keys P ∘ D makes dV.
  __device__ void visit_with_modifiers(const Heads& of, const VisitWalk& at, std::int64_t head,
                                       int first) {
    tiles_.load_keeps(at, head);
    Logits d, weights, slopes;
    Products::rows_by_rows(d, of.own_x, of.other_x, tiles_.stage);
    const bool shapes = a_.call.modifiers.change_logits();
    if (shapes) tiles_.template shape<kByRows>(d, slopes, head);
    probabilities(d, shapes ? T{1} : static_cast<T>(a_.call.scale));
    weigh(weights, d, slopes, shapes);
    if (!kByRows) {
      tiles_.template drop<kByRows>(d);
      Products::store(tiles_.tile, d);
      add(sum_y_, of.other_y, first);
    }
    if (first >= head_dim_) return;
    Products::rows_by_rows(d, of.own_y, of.other_y, tiles_.stage);
    tiles_.template drop<kByRows>(d);
    Products::store(tiles_.tile, weights);
    logit_gradients(d);
    Products::store(tiles_.tile, d);
    add(sum_x_, of.other_x, first);
  }

  __device__ void load_other(const VisitWalk& at, std::int64_t head) {
    if (!kByRows) tiles_.load_rows(work_.pass->row_tiles[at.tile()], head);
    const Tile& keys = kByRows ? work_.other_tile(at.tile()) : work_.own_tile(0);
    if (kByRows) tiles_.load_keys(keys);
    tiles_.load_words(keys, at);
  }

  __device__ void add(Sums& sums, const TileRows<S>& other, int first) {
#pragma unroll
    for (int b = 0; b < kBlocks; ++b) {
      const int column = first + b * Products::kBlockColumns;
      if (column < other.size)
        Products::add_block(sums[b], tiles_.tile, other, column, tiles_.stage);
    }
  }

  // ---- elements -------------------------------------------------------------------------------

  static __device__ int row(int i, int j) { return Tiles::template row<kByRows>(i, j); }
  static __device__ int key(int i, int j) { return Tiles::template key<kByRows>(i, j); }

  /// S -> P, 0 where masked. The scale leads from `s` to logits.
  __device__ void probabilities(Logits& s, T scale) const {
#pragma unroll
    for (int i = 0; i < kSimtRows; ++i) {
#pragma unroll
      for (int j = 0; j < kSimtRows; ++j) {
        const T p = probability(s[i][j] * scale, tiles_.lse[row(i, j)]);
        s[i][j] = tiles_.allows(row(i, j), key(i, j)) ? p : T{0};
      }
    }
  }

  /// dP -> dS, with the P (or weights) that this thread has stored.
  __device__ void logit_gradients(Logits& d) const {
    const T scale = static_cast<T>(a_.call.scale);
#pragma unroll
    for (int i = 0; i < kSimtRows; ++i) {
#pragma unroll
      for (int j = 0; j < kSimtRows; ++j) {
        const T p = *Products::element(tiles_.tile, i, j);
        d[i][j] = p * (d[i][j] - tiles_.delta[row(i, j)]) * scale;
      }
    }
  }

  // ---- results --------------------------------------------------------------------------------

  static __device__ void clear(Sums& sums) {
#pragma unroll
    for (int b = 0; b < kBlocks; ++b) {
#pragma unroll
      for (int i = 0; i < kSimtRows; ++i) {
        for (T& x : sums[b][i]) x = T{0};
      }
    }
  }

  __device__ void write(int first) const {
    sync_threads();  // without visits there has been none since the rows were loaded
#pragma unroll
    for (int i = 0; i < kSimtRows; ++i) {
      const int own = simt_y() + kSimtSide * i;
      if (!work_.owns(0, own)) continue;
      const Gradient& to = kByRows ? a_.grad_query : a_.grad_key;
      // A query without keys gets 0 even if a value that it does not see is NaN.
      const bool is_dead = kByRows && tiles_.lse[own] == static_cast<T>(kInfinity);
      put(sum_x_, i, first, GradientSink<S>(a_, work_, to, a_.slots_key, 0, own, head_dim_),
          is_dead);
      if (kByRows) continue;
      put(sum_y_, i, first,
          GradientSink<S>(a_, work_, a_.grad_value, a_.slots_value, 0, own, value_dim_), false);
    }
  }

  static __device__ void put(const Sums& sums, int i, int first, const GradientSink<S>& sink,
                             bool is_zero) {
#pragma unroll
    for (int b = 0; b < kBlocks; ++b) {
#pragma unroll
      for (int v = 0; v < Products::kVector; ++v)
        sink.put(Products::column(first + b * Products::kBlockColumns, v),
                 is_zero ? T{0} : sums[b][i][v]);
    }
  }

  const Arguments& a_;
  const Work& work_;
  const int head_dim_, value_dim_;
  Tiles tiles_;
  Sums sum_x_, sum_y_;
};

template <class S, bool kModified>
using SimtGradQuery = SimtBackward<S, Side::kRows, kModified>;
template <class S, bool kModified>
using SimtGradKeyValue = SimtBackward<S, Side::kKeys, kModified>;

}  // namespace sparse_attn::cuda
