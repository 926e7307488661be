// Products of tiles without tensor cores. 256 threads stand 16 x 16 around a tile of 64 x 64:
// thread (y, x) has rows y + 16 i and columns x + 16 j of it.
//
// What is multiplied comes to shared memory 128 bytes of a row at a time, so that any head size and
// alignment will do in the 64 KiB that every device has, and is read from there in 16-byte vectors:
// 8 of them for 16 products of vectors.
#pragma once

#include "cuda/scalar.cuh"
#include "cuda/tiles.cuh"

namespace sparse_attn::cuda {

constexpr int kSimtSide = 16;
constexpr int kSimtThreads = kSimtSide * kSimtSide;
constexpr int kSimtRows = kMaxTile / kSimtSide;  // and columns, of a thread

__device__ inline int simt_y() { return static_cast<int>(threadIdx.x) / kSimtSide; }
__device__ inline int simt_x() { return static_cast<int>(threadIdx.x) % kSimtSide; }

/// Rows of a tensor: the tokens of a tile, -1 (in shared memory) for those that count as zero.
template <class S>
struct TileRows {
  HeadView<const S> head;
  const std::int64_t* tokens;
  int size;
};

template <class S>
class SimtProducts {
  using T = Real<S>;

 public:
  static constexpr int kVector = 16 / static_cast<int>(sizeof(T));

 private:
  static constexpr int kSlice = 8 * kVector;
  /// Eight rows, a vector of padding between them, lie in different banks.
  static constexpr int kSliceStride = kSlice + kVector;
  static constexpr int kTileStride = kMaxTile + kVector;

  struct alignas(16) Vector {
    T x[kVector];
  };

 public:
  using Logits = T[kSimtRows][kSimtRows];
  /// Columns of a sum that the threads have side by side, a vector each.
  static constexpr int kBlockColumns = kSimtSide * kVector;
  using BlockSum = T[kSimtRows][kVector];

  static constexpr int kTileBytes = kMaxTile * kTileStride * static_cast<int>(sizeof(T));
  static constexpr int kSliceBytes = kMaxTile * kSliceStride * static_cast<int>(sizeof(T));
  static constexpr int kBlockBytes = kMaxTile * kBlockColumns * static_cast<int>(sizeof(T));
  static constexpr int kStageBytes = 2 * kSliceBytes > kBlockBytes ? 2 * kSliceBytes : kBlockBytes;

  static __device__ void clear(Logits& d) {
#pragma unroll
    for (int i = 0; i < kSimtRows; ++i) {
#pragma unroll
      for (int j = 0; j < kSimtRows; ++j) d[i][j] = T{0};
    }
  }

  /// d = own · otherᵀ, through `stage` (kStageBytes).
  static __device__ void rows_by_rows(Logits& d, const TileRows<S>& own, const TileRows<S>& other,
                                      char* stage) {
    clear(d);
    add_rows_by_rows(d, own, other, stage);
  }
  static __device__ void add_rows_by_rows(Logits& d, const TileRows<S>& own,
                                          const TileRows<S>& other, char* stage) {
    T* const own_slice = reinterpret_cast<T*>(stage);
    T* const other_slice = reinterpret_cast<T*>(stage + kSliceBytes);
    for (int first = 0; first < own.size; first += kSlice) {
      sync_threads();  // all are done with the slices before
      load<kSlice, kSliceStride>(own_slice, own, first);
      load<kSlice, kSliceStride>(other_slice, other, first);
      sync_threads();
      const int depth = own.size - first < kSlice ? own.size - first : kSlice;
      for (int k = 0; k < depth; k += kVector)
        multiply_slices(d, own_slice + simt_y() * kSliceStride + k,
                        other_slice + simt_x() * kSliceStride + k);
    }
  }

  /// Writes a thread's elements of a tile, for add_block().
  static __device__ void store(T* tile, const Logits& d) {
#pragma unroll
    for (int i = 0; i < kSimtRows; ++i) {
#pragma unroll
      for (int j = 0; j < kSimtRows; ++j) *element(tile, i, j) = d[i][j];
    }
  }
  /// Of a thread, in a stored tile.
  static __device__ T* element(T* tile, int i, int j) {
    return at(tile, simt_y() + kSimtSide * i, simt_x() + kSimtSide * j);
  }
  static __device__ T* at(T* tile, int row, int column) {
    return tile + row * kTileStride + column;
  }

  /// sum += tile · other, for kBlockColumns columns of the other from `first` on.
  static __device__ void add_block(BlockSum& sum, const T* tile, const TileRows<S>& other,
                                   int first, char* stage) {
    T* const block = reinterpret_cast<T*>(stage);
    sync_threads();  // the tile is written, and all are done with the block before
    load<kBlockColumns, kBlockColumns>(block, other, first);
    sync_threads();
    const T* const own = tile + simt_y() * kTileStride;
    const T* const column = block + simt_x() * kVector;
    for (int k = 0; k < kMaxTile; k += kVector)
      multiply_block(sum, own + k, column + k * kBlockColumns);
  }

  /// Of a thread's v-th column of a block.
  static __device__ int column(int first, int v) { return first + simt_x() * kVector + v; }

 private:
  template <int kColumns, int kStride>
  static __device__ void load(T* shared, const TileRows<S>& from, int first) {
#pragma unroll 4
    for (int begin = 0; begin < kMaxTile * kColumns; begin += kSimtThreads) {
      const int i = begin + static_cast<int>(threadIdx.x);
      const int row = i / kColumns, column = first + i % kColumns;
      const std::int64_t token = from.tokens[row];
      const bool valid = token >= 0 && column < from.size;
      shared[row * kStride + i % kColumns] = valid ? widen(from.head.row(token)[column]) : T{0};
    }
  }

  static __device__ Vector vector_at(const T* shared) {
    return *reinterpret_cast<const Vector*>(shared);
  }

  static __device__ void multiply_slices(Logits& d, const T* own, const T* other) {
    Vector a[kSimtRows];
#pragma unroll
    for (int i = 0; i < kSimtRows; ++i) a[i] = vector_at(own + kSimtSide * i * kSliceStride);
#pragma unroll
    for (int j = 0; j < kSimtRows; ++j) {
      const Vector b = vector_at(other + kSimtSide * j * kSliceStride);
#pragma unroll
      for (int i = 0; i < kSimtRows; ++i) {
#pragma unroll
        for (int k = 0; k < kVector; ++k) d[i][j] += a[i].x[k] * b.x[k];
      }
    }
  }

  static __device__ void multiply_block(BlockSum& sum, const T* own, const T* other) {
    Vector a[kSimtRows];
#pragma unroll
    for (int i = 0; i < kSimtRows; ++i) a[i] = vector_at(own + kSimtSide * i * kTileStride);
#pragma unroll
    for (int k = 0; k < kVector; ++k) {
      const Vector b = vector_at(other + k * kBlockColumns);
#pragma unroll
      for (int i = 0; i < kSimtRows; ++i) {
#pragma unroll
        for (int v = 0; v < kVector; ++v) sum[i][v] += a[i].x[k] * b.x[v];
      }
    }
  }
};

}  // namespace sparse_attn::cuda
