// What follows the sweeps: merging softmax states and slots of gradients, always in the same order,
// and what backward needs of each row beforehand.
#pragma once

#include "cuda/rows.cuh"
#include "cuda/sinks.cuh"

namespace sparse_attn::cuda {

/// The block's reduction.
struct ReductionWork {
  const HeadWork place;
  const GridPass* const pass;
  const Sweep* const sweep;
  const Reduction* const reduction;

  __device__ ReductionWork(const Arguments& a, Side side)
      : place(HeadWork::numbers_first(a.call, side, blockIdx.x)),
        pass(a.passes + place.plan(a)),
        sweep(side == Side::kRows ? &pass->rows : &pass->keys),
        reduction(sweep->reductions + a.first_reduction + place.number) {}

  /// Other heads' plans may have more, and rounds are filled up.
  __device__ bool found(const Arguments& a) const {
    return a.first_reduction + place.number < sweep->reduction_count &&
           reduction->first_slot < reduction->end_slot;
  }
  __device__ const Tile& tile(Side side) const {
    return side == Side::kRows ? pass->row_tiles[reduction->tile].rows
                               : pass->key_tiles[reduction->tile];
  }
  /// The number of a row in one of the slots.
  __device__ std::int64_t slot_row(const Arguments& a, std::int64_t slot, int row) const {
    return (place.own_head * a.slots_per_head + slot) * kMaxTile + row;
  }
};

/// Merges the slots of a row tile, after the state that earlier sweeps left.
template <class S>
struct MergeStates : RowKernel {
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
    const HeadWork& place = work.place;
    const int size = static_cast<int>(a.call.value_dim);
    const bool is_final = a.rows.output == nullptr;
    LaneState<T> state, part;
    state.clear();
    if (!a.first && !is_final) {
      state.load(state_row<T>(a.rows, first_row_of(a.call, place.batch, place.head) + token, size),
                 size);
    }
    for (int slot = work.reduction->first_slot; slot < work.reduction->end_slot; ++slot) {
      part.load(state_row<T>(a.slots, work.slot_row(a, slot, row), size), size);
      state.merge(part.maximum, part.sum, part.output);
    }
    state.put(RowSink<S>(a, place.batch, place.head, token, is_final), size);
  }
};

/// The states of the rows become output and log-sum-exp.
template <class S>
struct FinishStates : RowKernel {
  using T = Real<S>;

  static __device__ void run(const Arguments& a) {
    const std::int64_t row = row_number();
    if (row >= a.call.batch * a.call.heads * a.call.n_q) return;
    const HeadWork place = HeadWork::heads_first(a.call, Side::kRows, row);
    const int size = static_cast<int>(a.call.value_dim);
    LaneState<T> state;
    state.load(state_row<T>(a.rows, row, size), size);
    state.put(RowSink<S>(a, place.batch, place.head, place.number, true), size);
  }
};

/// rowsum(dO * O) less the gradient of the log-sum-exp.
template <class S>
struct Delta : RowKernel {
  using T = Real<S>;

  static __device__ void run(const Arguments& a) {
    const std::int64_t row = row_number();
    if (row >= a.call.batch * a.call.heads * a.call.n_q) return;
    const HeadWork place = HeadWork::heads_first(a.call, Side::kRows, row);
    const int size = static_cast<int>(a.call.value_dim);
    LaneRow<T> output, gradient;
    output.load(head_of<const S>(a.call.output, place.batch, place.head).row(place.number), size);
    gradient.load(grad_output_head<S>(a.call, place.batch, place.head).row(place.number), size);
    T delta = output.dot(gradient);
    if (a.call.grad_lse != nullptr) delta -= static_cast<const T*>(a.call.grad_lse)[row];
    if (lane_number() == 0) static_cast<T*>(a.delta)[row] = delta;
  }
};

/// Adds up the slots of each row of a tile: of dQ, or of dK and dV.
template <class S, Side kSide>
struct ReduceGradients : RowKernel {
  using T = Real<S>;

  static __device__ void run(const Arguments& a) {
    const ReductionWork work(a, kSide);
    if (!work.found(a)) return;
    const Tile& tile = work.tile(kSide);
    for (int row = warp_number(); row < tile.count; row += kRowsPerBlock) {
      if (kSide == Side::kRows && !(work.pass->row_tiles[work.reduction->tile].owned >> row & 1))
        continue;
      const std::int64_t to = token(tile, work.pass->token_list, row);
      const int head_dim = static_cast<int>(a.call.head_dim);
      if (kSide == Side::kRows) {
        add(a, work, row, to, a.grad_query, a.slots_key, head_dim);
      } else {
        add(a, work, row, to, a.grad_key, a.slots_key, head_dim);
        add(a, work, row, to, a.grad_value, a.slots_value, static_cast<int>(a.call.value_dim));
      }
    }
  }

 private:
  static __device__ void add(const Arguments& a, const ReductionWork& work, int row,
                             std::int64_t to, const Gradient& gradient, const void* slots,
                             int size) {
    LaneRow<T> sum, part;
    sum.clear();
    for (int slot = work.reduction->first_slot; slot < work.reduction->end_slot; ++slot) {
      part.load(static_cast<const T*>(slots) + work.slot_row(a, slot, row) * size, size);
      sum.add(T{1}, part);
    }
    sum.put(GradientSink<S>(a, kSide, work.place, gradient, to, size), size);
  }
};

}  // namespace sparse_attn::cuda
