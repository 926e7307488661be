// What kernels do with the sums that a warp has of its 16 rows: rows g and g + 8 of a fragment are
// its halves, four lanes share each row.
#pragma once

#include "cuda/sinks.cuh"

namespace sparse_attn::cuda {

/// The row of a tile of which a lane has a half, for a warp whose 16 rows begin at `first_row`.
__device__ inline int fragment_row(int first_row, int half) {
  return first_row + static_cast<int>(threadIdx.x) % 32 / 4 + 8 * half;
}
/// The column of element i of the n-th eight columns.
__device__ inline int fragment_column(int n, int i) {
  return 8 * n + 2 * (static_cast<int>(threadIdx.x) % 4) + i % 2;
}

template <int kTiles>
__device__ inline void clear(float (&sums)[kTiles][4]) {
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) sums[n][i] = 0.0f;
  }
}

template <int kTiles>
__device__ inline void multiply_row(float (&sums)[kTiles][4], int half, float factor) {
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
    sums[n][2 * half] *= factor;
    sums[n][2 * half + 1] *= factor;
  }
}

/// The first `columns` of a row, an even number, multiplied with a factor. With 0 they are 0 even
/// if a value that the row does not see is NaN.
template <class Sink, int kTiles>
__device__ inline void write_row(const Sink& sink, const float (&sums)[kTiles][4], int half,
                                 float factor, int columns) {
  sink.put_pairs([&](auto store) {
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      const int column = fragment_column(n, 0);
      const float x = sums[n][2 * half], next = sums[n][2 * half + 1];
      const bool any = factor != 0.0f;
      if (column < columns) store(column, any ? x * factor : 0.0f, any ? next * factor : 0.0f);
    }
  });
}

/// Logits of pairs whose bit is not set become -inf: a word for each of the lane's two rows, a bit
/// for each column.
template <int kTiles>
__device__ inline void mask_rows(float (&s)[kTiles][4], const std::uint64_t (&words)[2]) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const std::uint64_t word = words[half] >> 2 * (threadIdx.x % 4);
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        if (!(word >> (8 * n + i) & 1)) s[n][2 * half + i] = -kInfinity;
      }
    }
  }
}

}  // namespace sparse_attn::cuda
