// The warpgroup that copies tiles: by TMA where they are boxes of a tensor map, else row by row.
#pragma once

#include "cuda/mma.cuh"
#include "cuda/pipeline_sm90.cuh"

namespace sparse_attn::cuda {

/// The tensors of a side: X is Q or K, Y is dO or V.
enum class Operand { kX, kY };

/// Where tiles come from: the rows of a head.
template <class S>
struct TileSource {
  const MappedRows& mapped;
  HeadView<const S> rows;
  int batch, head;  // of the tensor itself
  std::int64_t tokens;
  int columns;

  /// For the heads of queries of a task; `head` is one of them.
  __device__ TileSource(const Sm90Arguments& a, const Work& work, Side side, Operand which,
                        std::int64_t query_head)
      : TileSource(a, work, side == Side::kRows, which == Operand::kX,
                   side == Side::kRows ? query_head : work.place.key_head(a.base.call)) {}

 private:
  __device__ TileSource(const Sm90Arguments& a, const Work& work, bool of_rows, bool is_x,
                        std::int64_t own_head)
      : mapped(of_rows ? (is_x ? a.query : a.grad_output) : (is_x ? a.key : a.value)),
        rows(head_of<const S>(of_rows ? (is_x ? a.base.call.query : a.base.call.grad_output)
                                      : (is_x ? a.base.call.key : a.base.call.value),
                              work.batch, own_head)),
        batch(static_cast<int>(work.batch)),
        head(static_cast<int>(own_head)),
        tokens(of_rows ? a.base.call.n_q : a.base.call.n_k),
        columns(static_cast<int>(is_x ? a.base.call.head_dim : a.base.call.value_dim)) {}
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

  __device__ explicit TileCopies(const Work& work) : list_(work.pass->token_list) {}

  /// Fills the place of a tile. Rows that are not `live` become zeros.
  __device__ void start(char* to, MBarrier* full, const TileSource<S>& from, const Tile& tile,
                        std::uint64_t live) const {
    Box box;
    if (live == first_rows(tile.count)) box = box_of(tile, from);
    if (box.map < 0) {
      copy_rows(to, from, tile, live);
      cp_async_commit();
      cp_async_wait<0>();
      fence_async();
    }
    sync_warp();  // no lane may still be waiting for a phase before this one
    if (box.map >= 0 && threadIdx.x == 0) {
      copy_box(to, full, from, box);
    } else if (threadIdx.x % 32 == 0) {
      arrive(full);
    }
  }

 private:
  /// A tile as a box of a map: its class of tokens, and where in it the tile begins.
  struct Box {
    int map = -1;  // -1: it is none
    int of_class = 0, in_class = 0;
  };

  /// Sequences with a map have less than 2^31 tokens.
  __device__ Box box_of(const Tile& tile, const TileSource<S>& from) const {
    Box box;
    if (tile.list >= 0) return box;
    const int start = static_cast<int>(tile.start);
    box.in_class = start / tile.step;
    box.of_class = start - box.in_class * tile.step;
    const std::int64_t end = std::int64_t{box.in_class + tile.count} * tile.step;
#pragma unroll
    for (int i = 0; i < kMostSteps; ++i) {
      if (from.mapped.steps[i] == tile.step && end <= from.tokens) box.map = i;
    }
    return box;
  }

  __device__ void copy_box(char* to, MBarrier* full, const TileSource<S>& from,
                           const Box& box) const {
    arrive_expecting(full, kTileBytes);
#pragma unroll
    for (int piece = 0; piece < kPieces; ++piece) {
      tma_load(to + piece * kPieceBytes, from.mapped.maps + box.map, full,
               {piece * kBoxColumns, box.of_class, box.in_class, from.head, from.batch});
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

}  // namespace sparse_attn::cuda
