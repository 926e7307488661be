// Kernels that go row by row: a warp has a row, and each lane every 32nd of its columns.
#pragma once

#include "cuda/kernels.h"
#include "cuda/scalar.cuh"
#include "cuda/tiles.cuh"

namespace sparse_attn::cuda {

constexpr int kWarp = 32;
constexpr int kRowThreads = kWarp * kRowsPerBlock;

/// What kernels that go row by row have in common.
struct RowKernel {
  static constexpr int kThreads = kRowThreads;
  static constexpr int kBlocksPerSM = 1;
  static constexpr int kSharedBytes = 0;
};

__device__ inline int warp_number() { return static_cast<int>(threadIdx.x) / kWarp; }
__device__ inline int lane_number() { return static_cast<int>(threadIdx.x) % kWarp; }

/// The number of the warp's row, over all blocks.
__device__ inline std::int64_t row_number() {
  return std::int64_t{blockIdx.x} * kRowsPerBlock + warp_number();
}

template <class T>
__device__ inline T warp_sum(T x) {
#pragma unroll
  for (int mask = kWarp / 2; mask > 0; mask /= 2) x += shuffle_xor(x, mask);
  return x;
}

/// A lane's columns of a row of up to 256.
template <class T>
struct LaneRow {
  static constexpr int kCount = 256 / kWarp;
  T x[kCount];

  __device__ void clear() {
#pragma unroll
    for (int i = 0; i < kCount; ++i) x[i] = T{0};
  }
  template <class S>
  __device__ void load(const S* row, int size) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const int column = lane_number() + kWarp * i;
      x[i] = column < size ? widen(row[column]) : T{0};
    }
  }
  __device__ void scale(T factor) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) x[i] *= factor;
  }
  __device__ void add(T factor, const LaneRow& row) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) x[i] += factor * row.x[i];
  }
  /// The product of whole rows, in every lane.
  __device__ T dot(const LaneRow& row) const {
    T sum{0};
#pragma unroll
    for (int i = 0; i < kCount; ++i) sum += x[i] * row.x[i];
    return warp_sum(sum);
  }
  template <class Sink>
  __device__ void put(const Sink& sink, int size) const {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const int column = lane_number() + kWarp * i;
      if (column < size) sink.put(column, x[i]);
    }
  }
};

/// The softmax state of a row, its sums spread over the lanes.
template <class T>
struct LaneState {
  T maximum, sum;
  LaneRow<T> output;

  __device__ void clear() {
    maximum = static_cast<T>(-kInfinity);
    sum = T{0};
    output.clear();
  }
  __device__ void load(const StateRow<T>& from, int size) {
    maximum = *from.maximum;
    sum = *from.sum;
    output.load(from.output, size);
  }
  /// Takes in another state: of several keys, or of one with sum 1 and its value.
  __device__ void merge(T other_maximum, T other_sum, const LaneRow<T>& other) {
    const T top = larger(maximum, other_maximum), finite = finite_maximum(top);
    const T keep = exponential(maximum - finite), take = exponential(other_maximum - finite);
    maximum = top;
    sum = sum * keep + other_sum * take;
    output.scale(keep);
    output.add(take, other);
  }
  /// A row without keys is 0 even if a value that it does not see is NaN.
  template <class Sink>
  __device__ void put(const Sink& sink, int size) {
    sync_warp();  // the sink may be where all lanes have read the state
    const T factor = sink.factor(sum);
    if (factor == T{0}) {
      output.clear();
    } else {
      output.scale(factor);
    }
    if (lane_number() == 0) sink.put_sums(maximum, sum);
    output.put(sink, size);
  }
};

}  // namespace sparse_attn::cuda
