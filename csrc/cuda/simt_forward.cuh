// Forward on any device: for each tile of keys: S = Q Kᵀ, mask, softmax update, O += P V; finish.
#pragma once

#include "cuda/simt_tiles.cuh"
#include "cuda/sinks.cuh"

namespace sparse_attn::cuda {

/// `kModified`: the call has modifiers.
template <class S, bool kModified>
class SimtForward {
  using T = Real<S>;
  using Products = SimtProducts<S>;

  /// Columns of the output that are summed at a time, 128 of float32 and 64 of float64. For each
  /// further lot the logits are computed again.
  static constexpr int kBlocks = 2;
  static constexpr int kColumns = kBlocks * Products::kBlockColumns;

 public:
  static constexpr int kThreads = kSimtThreads;
  static constexpr int kBlocksPerSM = sizeof(T) == 8 ? 1 : 2;  // float64 takes 181 registers
  static constexpr int kSharedBytes = SimtTiles<S, kModified>::kBytes;

  static __device__ void run(const Arguments& a) {
    const Work work(a, Side::kRows);
    if (!work.found() || (!a.first && !work.has_visits())) return;
    SimtForward forward(a, work);
    for (int first = 0; first < a.call.value_dim; first += kColumns) forward.attend(first);
  }

 private:
  __device__ SimtForward(const Arguments& a, const Work& work)
      : a_(a),
        work_(work),
        value_dim_(static_cast<int>(a.call.value_dim)),
        head_dim_(static_cast<int>(a.call.head_dim)),
        tiles_(a, work) {
    tiles_.load_rows(work.row_tile(0));
  }

  /// Columns of the output from `first` on.
  __device__ void attend(int first) {
    load_state(first);
    const TileRows<S> query{query_head<S>(a_.call, work_.batch, work_.head), tiles_.rows,
                            head_dim_};
    const TileRows<S> key{key_head<S>(a_.call, work_.batch, work_.head), tiles_.keys, head_dim_};
    const TileRows<S> value{value_head<S>(a_.call, work_.batch, work_.head), tiles_.keys,
                            value_dim_};
    for (VisitWalk at(work_, tiles_.covers); !at.done(); at.next()) {
      const Tile& tile = work_.other_tile(at.tile());
      tiles_.load_keys(tile);
      tiles_.load_words(tile, at);
      if (kModified) tiles_.load_keeps(at, work_.head);
      typename Products::Logits s;
      Products::rows_by_rows(s, query, key, tiles_.stage);
      const bool shapes = kModified && a_.call.modifiers.change_logits();
      if (shapes) shape(s);
      mask(s, shapes ? T{1} : static_cast<T>(a_.call.scale));
      update(s);
      if (kModified) tiles_.template drop<true>(s);
      Products::store(tiles_.tile, s);
#pragma unroll
      for (int b = 0; b < kBlocks; ++b) {
        const int column = first + b * Products::kBlockColumns;
        if (column < value_dim_)
          Products::add_block(o_[b], tiles_.tile, value, column, tiles_.stage);
      }
    }
    write(first);
  }

  __device__ void shape(typename Products::Logits& s) const {
    typename Products::Logits slopes;
    tiles_.template shape<true>(s, slopes, work_.head);
  }

  /// The scale leads from `s` to logits.
  __device__ void mask(typename Products::Logits& s, T scale) const {
#pragma unroll
    for (int i = 0; i < kSimtRows; ++i) {
#pragma unroll
      for (int j = 0; j < kSimtRows; ++j) {
        const bool allowed = tiles_.allows(simt_y() + kSimtSide * i, simt_x() + kSimtSide * j);
        s[i][j] = allowed ? s[i][j] * scale : static_cast<T>(-kInfinity);
      }
    }
  }

  /// Logits become probabilities. The 16 threads of a row are half a warp.
  __device__ void update(typename Products::Logits& s) {
#pragma unroll
    for (int i = 0; i < kSimtRows; ++i) {
      T top = maximum_[i];
#pragma unroll
      for (int j = 0; j < kSimtRows; ++j) top = larger(top, s[i][j]);
#pragma unroll
      for (int lanes = kSimtSide / 2; lanes > 0; lanes /= 2)
        top = larger(top, shuffle_xor(top, lanes));
      const T finite = finite_maximum(top), rescale = exponential(maximum_[i] - finite);
      maximum_[i] = top;
      sum_[i] *= rescale;
#pragma unroll
      for (int j = 0; j < kSimtRows; ++j) {
        s[i][j] = exponential(s[i][j] - finite);
        sum_[i] += s[i][j];  // of this thread's columns; write() adds the 16 up
      }
#pragma unroll
      for (int b = 0; b < kBlocks; ++b) {
        for (T& o : o_[b][i]) o *= rescale;
      }
    }
  }

  // ---- where the states come from and go to -----------------------------------------------------

  __device__ void load_state(int first) {
#pragma unroll
    for (int i = 0; i < kSimtRows; ++i) {
      maximum_[i] = static_cast<T>(-kInfinity);
      sum_[i] = T{0};
#pragma unroll
      for (int b = 0; b < kBlocks; ++b) {
        for (T& o : o_[b][i]) o = T{0};
      }
      const int row = simt_y() + kSimtSide * i;
      if (!a_.first && work_.task->slot < 0 && work_.owns(0, row))
        resume(work_.row_state<T>(a_, 0, row), i, first);
    }
  }

  /// The state that an earlier sweep left. The sum goes to one thread of the 16.
  __device__ void resume(const StateRow<T>& state, int i, int first) {
    maximum_[i] = *state.maximum;
    if (simt_x() == 0) sum_[i] = *state.sum;
    for_each_column(i, first, [&](int column, T& o) { o = state.output[column]; });
  }

  __device__ void write(int first) {
#pragma unroll
    for (int i = 0; i < kSimtRows; ++i) {
      T sum = sum_[i];
#pragma unroll
      for (int lanes = kSimtSide / 2; lanes > 0; lanes /= 2) sum += shuffle_xor(sum, lanes);
      const int row = simt_y() + kSimtSide * i;
      if (!work_.owns(0, row)) continue;
      const RowSink<S> sink(a_, work_, 0, row);
      const T factor = sink.factor(sum);
      // A row without keys is 0 even if a value that it does not see is NaN.
      for_each_column(
          i, first, [&](int column, T o) { sink.put(column, factor == T{0} ? T{0} : o * factor); });
      // Sums of earlier sweeps are read again for each lot of columns.
      if (simt_x() == 0 && first + kColumns >= value_dim_) sink.put_sums(maximum_[i], sum);
    }
  }

  /// Calls visit(column, sum) for the columns of a thread.
  template <class Visit>
  __device__ void for_each_column(int i, int first, Visit visit) {
#pragma unroll
    for (int b = 0; b < kBlocks; ++b) {
#pragma unroll
      for (int v = 0; v < Products::kVector; ++v) {
        const int column = Products::column(first + b * Products::kBlockColumns, v);
        if (column < value_dim_) visit(column, o_[b][i][v]);
      }
    }
  }

  const Arguments& a_;
  const Work& work_;
  const int value_dim_, head_dim_;
  SimtTiles<S, kModified> tiles_;
  typename Products::BlockSum o_[kBlocks];
  T maximum_[kSimtRows], sum_[kSimtRows];
};

}  // namespace sparse_attn::cuda
