// Causal linear attention without tensor cores: thread blocks of 256 threads with tiles of 64 x 64.
#pragma once

#include "cuda/linear.h"
#include "cuda/simt_products.cuh"
#include "host_device.h"

namespace sparse_attn::cuda {

/// What the kernels share: a tile of numbers, a stage of the products, tokens of queries and keys.
template <class S>
struct LinearTiles {
  using T = Real<S>;
  using Products = SimtProducts<S>;
  static constexpr int kBytes = Products::kTileBytes + Products::kStageBytes +
                                2 * kMaxTile * static_cast<int>(sizeof(std::int64_t));

  T* tile = reinterpret_cast<T*>(shared_memory());
  char* stage = shared_memory() + Products::kTileBytes;
  std::int64_t* own = reinterpret_cast<std::int64_t*>(stage + Products::kStageBytes);
  std::int64_t* other = own + kMaxTile;

  /// Tokens from `begin` on, -1 for those that are not in [0, end).
  static __device__ void load_tokens(std::int64_t* tokens, std::int64_t begin, std::int64_t end) {
    sync_threads();  // all are done with those before
    const int i = static_cast<int>(threadIdx.x);
    if (i < kMaxTile) tokens[i] = begin + i >= 0 && begin + i < end ? begin + i : -1;
    sync_threads();
  }

  /// Neighboring threads ask for neighboring columns, whichever way round the tile gets them.
  template <bool kTransposed, class Element>
  __device__ void fill_tile(const Element& element) {
    sync_threads();
    for (int i = static_cast<int>(threadIdx.x); i < kMaxTile * kMaxTile; i += kSimtThreads) {
      const int row = i / kMaxTile, column = i % kMaxTile;
      *Products::at(tile, kTransposed ? column : row, kTransposed ? row : column) =
          element(row, column);
    }
  }
};

template <class S>
__device__ HeadView<const S> linear_head(const TensorView& view, const LinearCall& call,
                                         std::int64_t head) {
  return head_of<const S>(view, head / call.params.heads, head % call.params.heads);
}

/// Row `i` of the sums of a segment, (size, value_dim).
template <class T>
__device__ T* linear_sums(const LinearCall& call, std::int64_t head, std::int64_t segment) {
  return static_cast<T*>(call.params.workspace) +
         (head * call.segments + segment) * call.params.size * call.params.value_dim;
}

template <class T>
__device__ void clear_block(T (&sum)[kSimtRows][SimtProducts<T>::kVector]) {
#pragma unroll
  for (int i = 0; i < kSimtRows; ++i) {
#pragma unroll
    for (int v = 0; v < SimtProducts<T>::kVector; ++v) sum[i][v] = T{0};
  }
}

/// A block for each (head, segment, 64 features, block of values).
template <class S>
struct LinearSums {
  using T = Real<S>;
  using Products = SimtProducts<S>;
  static constexpr int kThreads = kSimtThreads;
  static constexpr int kBlocksPerSM = 2;
  static constexpr int kSharedBytes = LinearTiles<S>::kBytes;

  static std::int64_t blocks(const LinearCall& call) {
    return call.heads() * call.segments * call.size_blocks * call.value_blocks;
  }

  static __device__ void run(const LinearCall& call) {
    LinearTiles<S> tiles;
    std::int64_t block = blockIdx.x;
    const int first = static_cast<int>(block % call.value_blocks) * Products::kBlockColumns;
    block /= call.value_blocks;
    const std::int64_t feature = block % call.size_blocks * kMaxTile;
    block /= call.size_blocks;
    const std::int64_t segment = block % call.segments, head = block / call.segments;
    const ProductParams& p = call.params;
    const HeadView<const S> key = linear_head<S>(p.key, call, head);
    const TileRows<S> value{linear_head<S>(p.value, call, head), tiles.other,
                            static_cast<int>(p.value_dim)};
    typename Products::BlockSum sum;
    clear_block<T>(sum);
    const std::int64_t begin = segment * call.segment,
                       end = begin + call.segment < p.n_k ? begin + call.segment : p.n_k;
    for (std::int64_t token = begin; token < end; token += kMaxTile) {
      tiles.load_tokens(tiles.other, token, end);
      tiles.template fill_tile<true>([&](int j, int i) {
        const bool valid = token + j < end && feature + i < p.size;
        return valid ? widen(key.row(token + j)[feature + i]) : T{0};
      });
      Products::add_block(sum, tiles.tile, value, first, tiles.stage);
    }
    T* const sums = linear_sums<T>(call, head, segment);
#pragma unroll
    for (int i = 0; i < kSimtRows; ++i) {
      const std::int64_t row = feature + simt_y() + kSimtSide * i;
#pragma unroll
      for (int v = 0; v < Products::kVector; ++v) {
        const int column = Products::column(first, v);
        if (row < p.size && column < p.value_dim) sums[row * p.value_dim + column] = sum[i][v];
      }
    }
  }
};

/// Sums of segments become those of the segments before, or after; a thread has an entry of a head.
template <class S>
struct LinearPrefix {
  using T = Real<S>;
  static constexpr int kThreads = 256;
  static constexpr int kBlocksPerSM = 1;
  static constexpr int kSharedBytes = 0;

  static SPARSE_ATTN_HOST_DEVICE std::int64_t blocks_of_head(const LinearCall& call) {
    return (call.params.size * call.params.value_dim + kThreads - 1) / kThreads;
  }
  static std::int64_t blocks(const LinearCall& call) { return call.heads() * blocks_of_head(call); }

  static __device__ void run(const LinearCall& call) {
    const std::int64_t per_head = blocks_of_head(call), head = blockIdx.x / per_head;
    const std::int64_t entry = blockIdx.x % per_head * kThreads + threadIdx.x;
    if (entry >= call.params.size * call.params.value_dim) return;
    T sum{0};
    for (std::int64_t i = 0; i < call.segments; ++i) {
      const std::int64_t segment = call.params.reverse ? call.segments - 1 - i : i;
      T* const at = linear_sums<T>(call, head, segment) + entry;
      const T own = *at;
      *at = sum;
      sum += own;
    }
  }
};

/// A block for each (head, 64 queries, block of values).
template <class S>
struct LinearProducts {
  using T = Real<S>;
  using Products = SimtProducts<S>;
  static constexpr int kThreads = kSimtThreads;
  static constexpr int kBlocksPerSM = 2;
  static constexpr int kSharedBytes = LinearTiles<S>::kBytes;

  static std::int64_t blocks(const LinearCall& call) {
    return call.heads() * call.chunks * call.value_blocks;
  }

  static __device__ void run(const LinearCall& call) {
    const ProductParams& p = call.params;
    LinearTiles<S> tiles;
    std::int64_t block = blockIdx.x;
    const int first = static_cast<int>(block % call.value_blocks) * Products::kBlockColumns;
    block /= call.value_blocks;
    const std::int64_t head = block / call.chunks;
    const std::int64_t position = (call.first_chunk + block % call.chunks) * kMaxTile;
    const std::int64_t query = position - (p.n_k - p.n_q);
    typename Products::BlockSum sum;
    clear_block<T>(sum);
    tiles.load_tokens(tiles.own, query, p.n_q);
    if (position >= 0 || p.reverse) {
      const std::int64_t segment = position < 0 ? 0 : position / call.segment;
      add_keys(call, tiles, head, segment, position, first, sum);
      add_sums(call, tiles, head, segment, first, sum);
    }
    const HeadView<S> output = head_of<S>(p.output, head / p.heads, head % p.heads);
#pragma unroll
    for (int i = 0; i < kSimtRows; ++i) {
      const std::int64_t row = tiles.own[simt_y() + kSimtSide * i];
#pragma unroll
      for (int v = 0; v < Products::kVector; ++v) {
        const int column = Products::column(first, v);
        if (row >= 0 && column < p.value_dim) output.row(row)[column] = narrow<S>(sum[i][v]);
      }
    }
  }

 private:
  /// Keys of the segment that the queries from `position` on see.
  static __device__ void add_keys(const LinearCall& call, LinearTiles<S>& tiles, std::int64_t head,
                                  std::int64_t segment, std::int64_t position, int first,
                                  typename Products::BlockSum& sum) {
    const ProductParams& p = call.params;
    const std::int64_t low = segment * call.segment, high = low + call.segment;
    const std::int64_t most = high < p.n_k ? high : p.n_k;
    const std::int64_t from = p.reverse && position > low ? position : low;
    const std::int64_t to = p.reverse || position + kMaxTile > most ? most : position + kMaxTile;
    const TileRows<S> queries{linear_head<S>(p.query, call, head), tiles.own,
                              static_cast<int>(p.size)};
    const TileRows<S> keys{linear_head<S>(p.key, call, head), tiles.other,
                           static_cast<int>(p.size)};
    const TileRows<S> values{linear_head<S>(p.value, call, head), tiles.other,
                             static_cast<int>(p.value_dim)};
    for (std::int64_t token = from; token < to; token += kMaxTile) {
      tiles.load_tokens(tiles.other, token, to);
      typename Products::Logits scores;
      Products::rows_by_rows(scores, queries, keys, tiles.stage);
#pragma unroll
      for (int i = 0; i < kSimtRows; ++i) {
        const std::int64_t own = position + simt_y() + kSimtSide * i;
#pragma unroll
        for (int j = 0; j < kSimtRows; ++j) {
          const std::int64_t key = token + simt_x() + kSimtSide * j;
          if (p.reverse ? key < own : key > own) scores[i][j] = T{0};
        }
      }
      sync_threads();  // all are done with the tile before
      Products::store(tiles.tile, scores);
      Products::add_block(sum, tiles.tile, values, first, tiles.stage);
    }
  }

  /// sum += query · the sums of the segments before, or after.
  static __device__ void add_sums(const LinearCall& call, LinearTiles<S>& tiles, std::int64_t head,
                                  std::int64_t segment, int first,
                                  typename Products::BlockSum& sum) {
    const ProductParams& p = call.params;
    const TileRows<T> sums{{linear_sums<T>(call, head, segment), p.value_dim},
                           tiles.other,
                           static_cast<int>(p.value_dim)};
    const HeadView<const S> queries = linear_head<S>(p.query, call, head);
    for (std::int64_t feature = 0; feature < p.size; feature += kMaxTile) {
      tiles.load_tokens(tiles.other, feature, p.size);
      tiles.template fill_tile<false>([&](int i, int c) {
        const bool valid = tiles.own[i] >= 0 && feature + c < p.size;
        return valid ? widen(queries.row(tiles.own[i])[feature + c]) : T{0};
      });
      SimtProducts<T>::add_block(sum, tiles.tile, sums, first, tiles.stage);
    }
  }
};

}  // namespace sparse_attn::cuda
