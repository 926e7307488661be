// Logits that are more than scaled products, and dropout, in the fragments of a step.
#pragma once

#include "cuda/fragments.cuh"
#include "cuda/logits.cuh"
#include "cuda/mma.cuh"

namespace sparse_attn::cuda {

/// Where a warp's fragments are: 16 rows from `first_row` on of each of the task's tiles that is
/// `active`, and columns from `first_column` on of the tile `other`.
struct FragmentPlace {
  const Work& work;
  int other;
  int first_row;
  int first_column;
  unsigned active;

  __device__ int row(int i) const { return fragment_row(first_row, i / 2); }
  __device__ int column(int n, int i) const { return first_column + fragment_column(n, i); }
  /// A number beyond the end takes the last token's place.
  __device__ std::int64_t token_at(const Tile& tile, int i) const {
    return token(tile, work.pass->token_list, i < tile.count ? i : tile.count - 1);
  }
};

/// Products become logits: HeadLogits::shape(). With kByRows the fragments' rows are queries, else
/// keys.
template <bool kByRows, int kGroup, int kTiles>
__device__ inline void shape_fragments(float (&x)[kGroup][kTiles][4],
                                       float (&slopes)[kGroup][kTiles][4],
                                       const HeadLogits<float>& logits,
                                       const FragmentPlace& place) {
  using Flat = float[kGroup * kTiles][4];
  const Tile& other = place.work.other_tile(place.other);
  const auto pairs = [&](int m, PairPlace(&at)[4]) {
    const int g = m / kTiles, n = m % kTiles;
    if (!(place.active >> g & 1)) return false;
    const Tile& own = place.work.own_tile(g);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const std::int64_t row = place.token_at(own, place.row(i)),
                         column = place.token_at(other, place.column(n, i));
      at[i] = kByRows ? logits.pair(row, column) : logits.pair(column, row);
    }
    return true;
  };
  logits.shape(reinterpret_cast<Flat&>(x), reinterpret_cast<Flat&>(slopes), pairs);
}

/// Elements of pairs that dropout does not keep become 0, the others are multiplied with `factor`.
/// The words are those of load_keeps() for the tile at hand.
template <bool kByRows, int kTiles>
__device__ inline void drop_fragments(float (&x)[kTiles][4], const std::uint64_t* words,
                                      const FragmentPlace& place, float factor) {
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = place.row(i), column = place.column(n, i);
      const bool kept = words[kByRows ? row : column] >> (kByRows ? column : row) & 1;
      x[n][i] = kept ? x[n][i] * factor : 0.0f;
    }
  }
}

}  // namespace sparse_attn::cuda
