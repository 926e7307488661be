// The warpgroup that copies tiles: by TMA where they are boxes of a tensor map, else row by row.
#pragma once

#include "cuda/mma.cuh"
#include "cuda/pipeline_sm90.cuh"

namespace sparse_attn::cuda {

/// Where tiles come from: the rows of a head.
template <class S>
struct TileSource {
  const TensorMap* maps;
  HeadView<const S> rows;
  int batch, head;  // of the tensor itself
  std::int64_t tokens;
  int columns;
};

/// A bit for each of the first rows.
__device__ inline std::uint64_t first_rows(int count) {
  return count == kMaxTile ? ~std::uint64_t{0} : (std::uint64_t{1} << count) - 1;
}

template <class S, int kHeadSize>
class TileCopies {
  static constexpr int kRowBytesOfPiece = kBoxColumns * static_cast<int>(sizeof(S));

 public:
  static constexpr int kPieces = kHeadSize / kBoxColumns;
  static constexpr int kPieceBytes = kBoxTokens * kRowBytesOfPiece;
  static constexpr int kTileBytes = kPieces * kPieceBytes;

  __device__ TileCopies(const Sm90Arguments& a, const Work& work)
      : a_(a.base), list_(work.pass->token_list) {}

  /// Fills the place of a tile. Rows that are not `live` become zeros.
  __device__ void start(char* to, MBarrier* full, const TileSource<S>& from, const Tile& tile,
                        std::uint64_t live) const {
    const int map = live == first_rows(tile.count) ? map_of(tile, from.tokens) : -1;
    if (map < 0) {
      copy_rows(to, from, tile, live);
      cp_async_commit();
      cp_async_wait<0>();
      fence_async();
    }
    sync_warp();  // no lane may still be waiting for a phase before this one
    if (map >= 0 && threadIdx.x == 0) {
      copy_box(to, full, from, tile, map);
    } else if (threadIdx.x % 32 == 0) {
      arrive(full);
    }
  }

 private:
  /// The map in which the tile is a box, or -1.
  __device__ int map_of(const Tile& tile, std::int64_t tokens) const {
    if (tile.list >= 0) return -1;
#pragma unroll
    for (int i = 0; i < kMostSteps; ++i) {
      const std::int32_t step = a_.steps[i];
      if (step == 0 || step != tile.step) continue;
      return tile.start / step + tile.count <= tokens / step ? i : -1;
    }
    return -1;
  }

  __device__ void copy_box(char* to, MBarrier* full, const TileSource<S>& from, const Tile& tile,
                           int map) const {
    arrive_expecting(full, kTileBytes);
    const int of_class = static_cast<int>(tile.start % tile.step),
              in_class = static_cast<int>(tile.start / tile.step);
#pragma unroll
    for (int piece = 0; piece < kPieces; ++piece) {
      tma_load(to + piece * kPieceBytes, from.maps + map, full,
               {piece * kBoxColumns, of_class, in_class, from.head, from.batch});
    }
  }

  /// As TMA lays them: chunk c of row r at place c ^ r % 8.
  __device__ void copy_rows(char* to, const TileSource<S>& from, const Tile& tile,
                            std::uint64_t live) const {
    constexpr int kChunksOfRow = kRowBytesOfPiece / kChunkBytes;
    constexpr int kChunks = kBoxTokens * kChunksOfRow;
#pragma unroll 1
    for (int piece = 0; piece < kPieces; ++piece) {
#pragma unroll 1
      for (int i = static_cast<int>(threadIdx.x); i < kChunks; i += kWarpgroup) {
        const int row = i / kChunksOfRow, chunk = i % kChunksOfRow,
                  column = piece * kBoxColumns + chunk * kChunk<S>;
        const bool valid = (live >> row & 1) != 0 && column < from.columns;
        const S* source = valid ? from.rows.row(tile, list_, row) + column : from.rows.data;
        cp_async_16(
            to + piece * kPieceBytes + row * kRowBytesOfPiece + (chunk ^ row % 8) * kChunkBytes,
            source, valid);
      }
    }
  }

  const Arguments& a_;
  const std::int64_t* const list_;
};

/// Whether the predicate of each of a tile's rows holds, by a warp.
template <class Predicate>
__device__ inline std::uint64_t rows_for_which(int count, Predicate holds) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const std::uint32_t low = ballot(lane < count && holds(lane));
  const std::uint32_t high = ballot(lane + 32 < count && holds(lane + 32));
  return low | static_cast<std::uint64_t>(high) << 32;
}
/// The keys of a tile that are no padding.
__device__ inline std::uint64_t live_keys(const AttentionParams& call, const Work& work,
                                          const Tile& keys) {
  const std::uint8_t* padding = padding_of(call, work.batch);
  if (padding == nullptr) return first_rows(keys.count);
  return rows_for_which(keys.count,
                        [&](int i) { return padding[token(keys, work.pass->token_list, i)] == 0; });
}

/// The sources of a task.
template <class S>
__device__ inline TileSource<S> query_source(const Sm90Arguments& a, const Work& work,
                                             std::int64_t head) {
  const AttentionParams& call = a.base.call;
  return {a.query.maps,
          query_head<S>(call, work.batch, head),
          static_cast<int>(work.batch),
          static_cast<int>(head),
          call.n_q,
          static_cast<int>(call.head_dim)};
}
template <class S>
__device__ inline TileSource<S> grad_output_source(const Sm90Arguments& a, const Work& work,
                                                   std::int64_t head) {
  const AttentionParams& call = a.base.call;
  return {a.grad_output.maps,
          grad_output_head<S>(call, work.batch, head),
          static_cast<int>(work.batch),
          static_cast<int>(head),
          call.n_q,
          static_cast<int>(call.value_dim)};
}
template <class S>
__device__ inline TileSource<S> key_source(const Sm90Arguments& a, const Work& work) {
  const AttentionParams& call = a.base.call;
  return {a.key.maps,
          key_head<S>(call, work.batch, work.head),
          static_cast<int>(work.batch),
          static_cast<int>(work.place.key_head(call)),
          call.n_k,
          static_cast<int>(call.head_dim)};
}
template <class S>
__device__ inline TileSource<S> value_source(const Sm90Arguments& a, const Work& work) {
  const AttentionParams& call = a.base.call;
  return {a.value.maps,
          value_head<S>(call, work.batch, work.head),
          static_cast<int>(work.batch),
          static_cast<int>(work.place.key_head(call)),
          call.n_k,
          static_cast<int>(call.value_dim)};
}

}  // namespace sparse_attn::cuda
