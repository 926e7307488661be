// Rows of tensors on their way to tiles in shared memory, by cp.async.
#pragma once

#include "cuda/config.h"
#include "cuda/mma.cuh"
#include "cuda/tiles.cuh"

namespace sparse_attn::cuda {

/// Starts copying rows [first_row, first_row + kRows) of a tile; those for which `live` is false
/// become zeros, and so does what lies beyond `size` columns (a whole number of chunks).
template <class S, int kHeadSize, int kRows, class Live>
__device__ inline void copy_rows(char* shared, HeadView<const S> from, const Tile& tile,
                                 const std::int64_t* list, int first_row, int size, Live live) {
  constexpr int kChunks = kHeadSize / kChunk<S>;
#pragma unroll
  for (int begin = 0; begin < kRows * kChunks; begin += kMmaThreads) {
    const int i = begin + static_cast<int>(threadIdx.x);
    if (kRows * kChunks % kMmaThreads != 0 && i >= kRows * kChunks) break;
    const int row = i / kChunks, column = i % kChunks * kChunk<S>, in_tile = first_row + row;
    const bool valid = in_tile < tile.count && column < size && live(in_tile);
    const S* source = valid ? from.row(tile, list, in_tile) + column : from.data;
    cp_async_16(shared + row * kRowBytes<S, kHeadSize> + column * static_cast<int>(sizeof(S)),
                source, valid);
  }
}

}  // namespace sparse_attn::cuda
