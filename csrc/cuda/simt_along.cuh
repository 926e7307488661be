// The derivative of the backward pass along a tangent of the inputs, by tiles of queries and by
// tiles of keys as simt_backward.cuh: with S for the gradient of the score,
// dQ' = S' K + S K', dK' = S'ᵀ Q + Sᵀ Q' and dV' = P'ᵀ dO.
#pragma once

#include "cuda/simt_pairs.cuh"
#include "cuda/sinks.cuh"

namespace sparse_attn::cuda {

/// Columns of a tile's gradients that are summed at a time, 128 of float32 and 32 of float64.
template <class S>
class ColumnSums {
  using T = Real<S>;
  using Products = SimtProducts<S>;
  static constexpr int kBlocks = sizeof(T) == 8 ? 1 : 2;

 public:
  static constexpr int kColumns = kBlocks * Products::kBlockColumns;

  __device__ void clear() {
#pragma unroll
    for (int b = 0; b < kBlocks; ++b) {
#pragma unroll
      for (int i = 0; i < kSimtRows; ++i) {
        for (T& x : sums_[b][i]) x = T{0};
      }
    }
  }

  /// Adds a tile times rows of the other side, from column `first` on, through the tile's memory.
  __device__ void add(const typename Products::Logits& d, const TileRows<S>& other, int first,
                      SimtTiles<S, false>& tiles) {
    sync_threads();  // all are done with the tile before
    Products::store(tiles.tile, d);
#pragma unroll
    for (int b = 0; b < kBlocks; ++b) {
      const int column = first + b * Products::kBlockColumns;
      if (column < other.size)
        Products::add_block(sums_[b], tiles.tile, other, column, tiles.stage);
    }
  }

  /// Calls visit(column, sum) for the thread's columns of its i-th row.
  template <class Visit>
  __device__ void for_each_column(int i, int first, Visit visit) const {
#pragma unroll
    for (int b = 0; b < kBlocks; ++b) {
#pragma unroll
      for (int v = 0; v < Products::kVector; ++v)
        visit(Products::column(first + b * Products::kBlockColumns, v), sums_[b][i][v]);
    }
  }

 private:
  typename Products::BlockSum sums_[kBlocks];
};

template <class S, Side kSide>
class SimtBackwardAlong {
  using T = Real<S>;
  using Pairs = SimtPairs<S, kSide>;
  static constexpr bool kByRows = kSide == Side::kRows;

 public:
  static constexpr int kThreads = kSimtThreads;
  static constexpr int kBlocksPerSM = 1;
  static constexpr int kSharedBytes = Pairs::kSharedBytes;

  static __device__ void run(const Arguments& a) {
    const Work work(a, kSide);
    if (!work.found()) return;
    if (a.grad_query.add && !work.has_visits()) return;
    SimtBackwardAlong backward(a, work);
    const int size = kByRows || backward.head_dim_ > backward.value_dim_ ? backward.head_dim_
                                                                         : backward.value_dim_;
    for (int first = 0; first < size; first += ColumnSums<S>::kColumns) backward.sum_columns(first);
  }

 private:
  __device__ SimtBackwardAlong(const Arguments& a, const Work& work)
      : a_(a),
        work_(work),
        head_dim_(static_cast<int>(a.call.head_dim)),
        value_dim_(static_cast<int>(a.call.value_dim)),
        pairs_(a, work) {}

  /// Columns of the gradients from `first` on.
  __device__ void sum_columns(int first) {
    sum_x_.clear();
    sum_y_.clear();
    for (std::int64_t head = work_.head; head < work_.end_head(); ++head) {
      const typename Pairs::Head of = pairs_.head(head);
      for (VisitWalk at(work_, pairs_.tiles.covers); !at.done(); at.next()) visit(of, at, first);
    }
    write(first);
  }

  __device__ void visit(const typename Pairs::Head& of, const VisitWalk& at, int first) {
    pairs_.load_other(at, of.number);
    typename Pairs::PairProducts d;
    pairs_.multiply_scores(d, of);
    pairs_.multiply_values(d, of);
    differentiate(d, of);
    sum_x_.add(d.score_dot, kByRows ? of.key : of.query, first, pairs_.tiles);
    sum_x_.add(d.score, kByRows ? of.key_dot : of.query_dot, first, pairs_.tiles);
    if (!kByRows) sum_y_.add(d.dp, of.grad_output, first, pairs_.tiles);
  }

  /// Scores become their gradients, dP becomes the change of P.
  __device__ void differentiate(typename Pairs::PairProducts& d,
                                const typename Pairs::Head& of) const {
    const T scale = static_cast<T>(a_.call.scale);
#pragma unroll
    for (int i = 0; i < kSimtRows; ++i) {
#pragma unroll
      for (int j = 0; j < kSimtRows; ++j) {
        if (!pairs_.allows(i, j)) {
          d.score[i][j] = d.score_dot[i][j] = d.dp[i][j] = T{0};
          continue;
        }
        const GradientAlong<T> gradient = pairs_.gradient(d, of, i, j);
        d.score[i][j] = gradient.score * scale;
        d.score_dot[i][j] = gradient.score_dot * scale;
        d.dp[i][j] = gradient.kept_p_dot;
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
      const GradientSink<S> sink(a_, work_, to, a_.slots_key, 0, own, head_dim_);
      // A query without keys gets 0 even if a key that it does not see is NaN.
      const bool is_dead = kByRows && pairs_.numbers(own).is_none();
      sum_x_.for_each_column(i, first,
                             [&](int column, T x) { sink.put(column, is_dead ? T{0} : x); });
      if (kByRows) continue;
      const GradientSink<S> of_value(a_, work_, a_.grad_value, a_.slots_value, 0, own, value_dim_);
      sum_y_.for_each_column(i, first, [&](int column, T y) { of_value.put(column, y); });
    }
  }

  const Arguments& a_;
  const Work& work_;
  const int head_dim_, value_dim_;
  Pairs pairs_;
  ColumnSums<S> sum_x_, sum_y_;
};

}  // namespace sparse_attn::cuda
