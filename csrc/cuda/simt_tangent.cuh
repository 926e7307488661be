// The change of output and log-sum-exp along a tangent of the inputs: for each tile of keys
// A += D P (s' V + V') and l += P s'; then lse' = l and O' = A - l O.
#pragma once

#include "cuda/rows.cuh"
#include "cuda/simt_along.cuh"
#include "cuda/states.cuh"

namespace sparse_attn::cuda {

/// Sums of a row in memory, in the place of a softmax state: A and l.
template <class T>
struct TangentRow {
  T* output;
  T* lse;

  __device__ TangentRow(const States& states, std::int64_t row, std::int64_t value_dim)
      : output(static_cast<T*>(states.output) + row * value_dim),
        lse(static_cast<T*>(states.sum) + row) {}
  __device__ void put(int column, T x) const { output[column] = x; }
};

template <class S>
class SimtTangent {
  using T = Real<S>;
  using Pairs = SimtPairs<S, Side::kRows>;
  using Products = SimtProducts<S>;

 public:
  static constexpr int kThreads = kSimtThreads;
  static constexpr int kBlocksPerSM = 1;
  static constexpr int kSharedBytes = Pairs::kSharedBytes;

  static __device__ void run(const Arguments& a) {
    const Work work(a, Side::kRows);
    if (!work.found() || (!a.first && !work.has_visits())) return;
    SimtTangent tangent(a, work);
    for (int first = 0; first < a.call.value_dim; first += ColumnSums<S>::kColumns)
      tangent.sum_columns(first);
  }

 private:
  __device__ SimtTangent(const Arguments& a, const Work& work)
      : a_(a), work_(work), value_dim_(static_cast<int>(a.call.value_dim)), pairs_(a, work) {}

  __device__ void sum_columns(int first) {
    output_.clear();
    for (T& l : lse_) l = T{0};
    const typename Pairs::Head of = pairs_.head(work_.head);
    for (VisitWalk at(work_, pairs_.tiles.covers); !at.done(); at.next()) {
      pairs_.load_other(at, of.number);
      typename Pairs::PairProducts d;
      pairs_.multiply_scores(d, of);
      weigh(d, of);
      output_.add(d.score_dot, of.value, first, pairs_.tiles);
      output_.add(d.score, of.value_dot, first, pairs_.tiles);
    }
    write(first);
  }

  /// Scores and their changes become D P and D P s'.
  __device__ void weigh(typename Pairs::PairProducts& d, const typename Pairs::Head& of) {
#pragma unroll
    for (int i = 0; i < kSimtRows; ++i) {
      const RowAlong<T> row = pairs_.numbers(simt_y() + kSimtSide * i);
#pragma unroll
      for (int j = 0; j < kSimtRows; ++j) {
        if (!pairs_.allows(i, j)) {
          d.score[i][j] = d.score_dot[i][j] = T{0};
          continue;
        }
        const PairAlong<T> pair =
            of.modifiers.logit(pairs_.place(of, i, j), d.score[i][j], d.score_dot[i][j]);
        const T p = probability(pair.logit.at.value, row.lse), s_dot = pair.logit.along.value;
        lse_[i] += p * s_dot;  // of this thread's columns; write() adds the 16 up
        d.score[i][j] = p * pair.kept;
        d.score_dot[i][j] = p * pair.kept * s_dot;
      }
    }
  }

  /// To a slot, or to the sums of the row after those of earlier sweeps.
  __device__ void write(int first) const {
    const bool in_slot = work_.task->slot >= 0, add = !in_slot && !a_.first;
#pragma unroll
    for (int i = 0; i < kSimtRows; ++i) {
      T lse = lse_[i];
#pragma unroll
      for (int lanes = kSimtSide / 2; lanes > 0; lanes /= 2) lse += shuffle_xor(lse, lanes);
      const int row = simt_y() + kSimtSide * i;
      if (!work_.owns(0, row)) continue;
      const std::int64_t number =
          in_slot ? work_.slot_row(a_, 0, row)
                  : first_row_of(a_.call, work_.batch, work_.head) + work_.own_token(0, row);
      const TangentRow<T> to(in_slot ? a_.slots : a_.rows, number, value_dim_);
      output_.for_each_column(i, first, [&](int column, T x) {
        if (column < value_dim_) to.output[column] = add ? to.output[column] + x : x;
      });
      if (simt_x() == 0 && first == 0) *to.lse = add ? *to.lse + lse : lse;
    }
  }

  const Arguments& a_;
  const Work& work_;
  const int value_dim_;
  Pairs pairs_;
  ColumnSums<S> output_;
  T lse_[kSimtRows];
};

/// Adds the slots of a row tile to the sums of its rows.
template <class S>
struct MergeTangents : RowKernel {
  using T = Real<S>;

  static __device__ void run(const Arguments& a) {
    const ReductionWork work(a, Side::kRows);
    if (!work.found(a)) return;
    const RowTile& tile = work.pass->row_tiles[work.reduction->tile];
    for (int row = warp_number(); row < tile.rows.count; row += kRowsPerBlock) {
      if (tile.owned >> row & 1) merge(a, work, row, token(tile.rows, work.pass->token_list, row));
    }
  }

 private:
  static __device__ void merge(const Arguments& a, const ReductionWork& work, int row,
                               std::int64_t token) {
    const int size = static_cast<int>(a.call.value_dim);
    const TangentRow<T> to(a.rows, first_row_of(a.call, work.place.batch, work.place.head) + token,
                           size);
    LaneRow<T> sum, part;
    sum.clear();
    if (!a.first) sum.load(to.output, size);
    T lse = a.first ? T{0} : *to.lse;
    for (int slot = work.reduction->first_slot; slot < work.reduction->end_slot; ++slot) {
      const TangentRow<T> from(a.slots, work.slot_row(a, slot, row), size);
      part.load(from.output, size);
      sum.add(T{1}, part);
      lse += *from.lse;
    }
    sync_warp();  // all lanes have read the sums
    sum.put(to, size);
    if (lane_number() == 0) *to.lse = lse;
  }
};

/// The sums of the rows become the tangents of output and log-sum-exp.
template <class S>
struct FinishTangents : RowKernel {
  using T = Real<S>;

  struct Sink {
    S* row;
    __device__ void put(int column, T x) const { row[column] = narrow<S>(x); }
  };

  static __device__ void run(const Arguments& a) {
    const std::int64_t row = row_number();
    if (row >= a.call.batch * a.call.heads * a.call.n_q) return;
    const HeadWork place = HeadWork::heads_first(a.call, Side::kRows, row);
    const int size = static_cast<int>(a.call.value_dim);
    const bool is_dead = static_cast<const T*>(a.call.lse)[row] == static_cast<T>(-kInfinity);
    const TangentRow<T> from(a.rows, row, size);
    const T lse = is_dead ? T{0} : *from.lse;
    LaneRow<T> sum, output;
    sum.clear();
    if (!is_dead) {  // else values that the row does not see may have made NaN of the sums
      sum.load(from.output, size);
      output.load(head_of<const S>(a.call.output, place.batch, place.head).row(place.number), size);
      sum.add(-lse, output);
    }
    sum.put(Sink{head_of<S>(a.call.output_tangent, place.batch, place.head).row(place.number)},
            size);
    if (lane_number() == 0) static_cast<T*>(a.call.lse_tangent)[row] = lse;
  }
};

}  // namespace sparse_attn::cuda
