// Tiles in memory: where their rows are, how they are packed, transposed and written back.
#pragma once

#include <utility>

#include "params.h"
#include "scalar.h"

namespace {

using sparse_attn::kMaxTile;
using sparse_attn::Tile;

/// Rows of Real, `stride` elements apart.
template <class T>
struct Rows {
  const T* data;
  int64_t stride;
  const T* row(int64_t i) const { return data + i * stride; }
};

/// One head of a tensor.
template <class S>
struct Head {
  S* data;
  int64_t stride;

  S* row(const Tile& tile, const int64_t* list, int i) const {
    return data + sparse_attn::token(tile, list, i) * stride;
  }
};

/// Head number `head` of batch x heads.
template <class S>
SPARSE_ATTN_INLINE Head<S> head_of(const sparse_attn::TensorView& view, int64_t heads,
                                   int64_t head) {
  const int64_t offset = head / heads * view.batch_stride + head % heads * view.head_stride;
  return {static_cast<S*>(view.data) + offset, view.row_stride};
}

template <class S, class T>
constexpr bool kSameType = false;
template <class T>
constexpr bool kSameType<T, T> = true;

/// Widens `size` elements and pads them with zeros up to `padded`, a whole number of vectors.
template <class S>
SPARSE_ATTN_INLINE void pack_row(Real<S>* to, const S* from, int size, int padded) {
  constexpr int kStep = kLanes<Real<S>>;
  int i = 0;
  for (; i + kStep <= size; i += kStep) store(to + i, load_real(from + i));
  if (i < size) {
    store(to + i, load_real_part(from + i, size - i));
    i += kStep;
  }
  for (; i < padded; i += kStep) store(to + i, Vec<Real<S>>{});
}

template <class S>
SPARSE_ATTN_INLINE void unpack_row(S* to, const Real<S>* from, int size) {
  constexpr int kStep = kLanes<Real<S>>;
  int i = 0;
  for (; i + kStep <= size; i += kStep) store_real(to + i, load(from + i));
  if (i < size) store_real_part(to + i, load(from + i), size - i);
}

/// A bit for each of the first `count` rows of a tile.
SPARSE_ATTN_INLINE uint64_t all_rows(int count) { return ~uint64_t{0} >> (kMaxTile - count); }

/// Multiplies a row of whole vectors.
template <class T>
SPARSE_ATTN_INLINE void scale_row(T* row, T factor, int padded) {
  for (int c = 0; c < padded; c += kLanes<T>) store(row + c, load(row + c) * factor);
}

/// Divides a row by the sum of its weights. Without keys it becomes 0, whatever it holds: 0 · NaN
/// of a masked key is NaN.
template <class T>
SPARSE_ATTN_INLINE void normalise_row(T* row, T sum, int padded) {
  const T factor = T{1} / sum;
  for (int c = 0; c < padded; c += kLanes<T>)
    store(row + c, sum == T{0} ? Vec<T>{} : load(row + c) * factor);
}

/// Whether the products read a tile where it lies. Rows that are far apart are packed first: at a
/// stride of 2 KiB a tile falls into a few sets of the level-1 cache, which made the forward
/// pass 1.35 x slower.
template <class S>
SPARSE_ATTN_INLINE bool reads_rows_in_place(Head<const S> head, const Tile& tile, int size) {
  return kSameType<S, Real<S>> && tile.list < 0 && tile.step == 1 && head.stride == size;
}

/// Packs the rows of a tile, each widened and padded to a whole number of vectors; rows whose bit
/// in `live` is clear become zeros.
template <class S>
SPARSE_ATTN_INLINE void pack_rows(Real<S>* to, Head<const S> head, const Tile& tile,
                                  const int64_t* list, int size, uint64_t live) {
  const int padded = round_up(size, kLanes<Real<S>>);
  for (int i = 0; i < tile.count; ++i) {
    pack_row(to + i * padded, head.row(tile, list, i), live >> i & 1 ? size : 0, padded);
  }
}

/// The live rows of a tile in row-major order, each a whole number of vectors long, and zeros for
/// the others: in place where the tensor allows it, else packed into `buffer`.
template <class S>
SPARSE_ATTN_INLINE Rows<Real<S>> whole_vector_rows(Head<const S> head, const Tile& tile,
                                                   const int64_t* list, int size, uint64_t live,
                                                   Real<S>* buffer) {
  const int padded = round_up(size, kLanes<Real<S>>);
  const bool all_live = live == all_rows(tile.count);
  if constexpr (kSameType<S, Real<S>>) {
    if (all_live && padded == size && reads_rows_in_place(head, tile, size)) {
      return {head.row(tile, list, 0), head.stride};
    }
  }
  pack_rows(buffer, head, tile, list, size, live);
  return {buffer, padded};
}

/// The same for rows that are read only once, to be transposed: in place at any stride.
template <class S>
SPARSE_ATTN_INLINE Rows<Real<S>> rows_to_transpose(Head<const S> head, const Tile& tile,
                                                   const int64_t* list, int size, Real<S>* buffer) {
  if constexpr (kSameType<S, Real<S>>) {
    if (tile.list < 0 && size % kLanes<S> == 0)
      return {head.row(tile, list, 0), head.stride * tile.step};
  }
  pack_rows(buffer, head, tile, list, size, all_rows(tile.count));
  return {buffer, round_up(size, kLanes<Real<S>>)};
}

template <class T, int... kLane>
SPARSE_ATTN_INLINE Vec<T> zip_low(Vec<T> a, Vec<T> b, std::integer_sequence<int, kLane...>) {
  return __builtin_shufflevector(a, b, (kLane / 2 + kLane % 2 * kLanes<T>)...);
}
template <class T, int... kLane>
SPARSE_ATTN_INLINE Vec<T> zip_high(Vec<T> a, Vec<T> b, std::integer_sequence<int, kLane...>) {
  return __builtin_shufflevector(a, b, (kLanes<T> / 2 + kLane / 2 + kLane % 2 * kLanes<T>)...);
}

/// Transposes a square block in registers by log2(lanes) perfect shuffles.
template <class T>
SPARSE_ATTN_INLINE void transpose_block(Vec<T> (&block)[kLanes<T>]) {
  constexpr int kHalf = kLanes<T> / 2;
  constexpr auto kEach = std::make_integer_sequence<int, kLanes<T>>{};
#pragma GCC unroll 8
  for (int stage = kLanes<T>; stage > 1; stage /= 2) {
    Vec<T> next[kLanes<T>];
#pragma GCC unroll 16
    for (int i = 0; i < kHalf; ++i) {
      next[2 * i] = zip_low<T>(block[i], block[i + kHalf], kEach);
      next[2 * i + 1] = zip_high<T>(block[i], block[i + kHalf], kEach);
    }
#pragma GCC unroll 16
    for (int i = 0; i < kLanes<T>; ++i) block[i] = next[i];
  }
}

/// Times a factor.
template <class T>
struct Scaled {
  T factor;
  SPARSE_ATTN_INLINE Vec<T> operator()(Vec<T> x, int) const { return x * factor; }
};

/// to[c][r] = map(from[r][c], c), `map` taking whole vectors of columns; rows from `count` up to
/// the next whole vector become zero.
template <class T, class Map>
__attribute__((noinline)) void transpose_rows(T* to, int64_t to_stride, Rows<T> from, int count,
                                              int columns, Map map) {
  for (int r = 0; r < count; r += kLanes<T>) {
    for (int c = 0; c < columns; c += kLanes<T>) {
      const int end = columns - c < kLanes<T> ? columns - c : kLanes<T>;
      Vec<T> block[kLanes<T>];
#pragma GCC unroll 16
      for (int i = 0; i < kLanes<T>; ++i)
        block[i] = r + i < count ? map(load(from.row(r + i) + c), c) : Vec<T>{};
      transpose_block<T>(block);
#pragma GCC unroll 16
      for (int i = 0; i < kLanes<T>; ++i) {
        if (i < end) store(to + (c + i) * to_stride + r, block[i]);
      }
    }
  }
}

/// The same, times a factor.
template <class T>
SPARSE_ATTN_INLINE void transpose_rows(T* to, int64_t to_stride, Rows<T> from, int count,
                                       int columns, T factor) {
  transpose_rows<T>(to, to_stride, from, count, columns, Scaled<T>{factor});
}

/// Zeroes `count` elements, a whole number of vectors.
template <class T>
SPARSE_ATTN_INLINE void fill_zero(T* to, int64_t count) {
  for (int64_t i = 0; i < count; i += kLanes<T>) store(to + i, Vec<T>{});
}

/// to[i] += from[i] for a whole number of vectors.
template <class T>
SPARSE_ATTN_INLINE void add_row(T* to, const T* from, int count) {
  for (int i = 0; i < count; i += kLanes<T>) store(to + i, load(to + i) + load(from + i));
}

}  // namespace
