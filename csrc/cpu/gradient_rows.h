// The rows of a row tile as the products of a backward pass need them.
#pragma once

#include "scheduler.h"
#include "softmax.h"
#include "tile.h"

namespace {

using sparse_attn::RowTile;

/// Sum of products of two rows of whole vectors.
template <class T>
SPARSE_ATTN_INLINE T dot(const T* a, const T* b, int size) {
  Vec<T> sum{};
  for (int i = 0; i < size; i += kLanes<T>) sum += load(a + i) * load(b + i);
  T total{0};
  for (int i = 0; i < kLanes<T>; ++i) total += sum[i];
  return total;
}

/// Rows of one tensor, row-major and with the queries in the lanes.
template <class S>
class TileRows {
 public:
  using T = Real<S>;

  TileRows(Arena& arena, int size)
      : size_(size),
        padded_(round_up(size, kLanes<T>)),
        buffer_(arena.take<T>(int64_t{kMaxTile} * padded_)),
        columns_(arena.take<T>(int64_t{kMaxTile} * padded_)) {}

  /// Rows whose bit in `live` is clear count as zero.
  void load(Head<const S> head, const Tile& tile, const int64_t* list, uint64_t live, T factor) {
    rows_ = whole_vector_rows(head, tile, list, size_, live, buffer_);
    transpose_rows<T>(columns_, kMaxTile, rows_, tile.count, padded_, factor);
  }

  /// The product of row i and another one of whole vectors.
  T dot(int i, const T* other) const { return ::dot(rows_.row(i), other, padded_); }

  const Rows<T>& rows() const { return rows_; }
  const T* columns() const { return columns_; }  // [size][kMaxTile], times the factor
  int size() const { return size_; }
  int vectors() const { return padded_ / kLanes<T>; }

 private:
  int size_, padded_;
  T* buffer_;
  T* columns_;
  Rows<T> rows_{};
};

/// `RowsOfTile` is TileRows or what other products take.
template <class S, class RowsOfTile = TileRows<S>>
class GradientRows {
 public:
  using T = Real<S>;

  GradientRows(Arena& arena, const AttentionParams& params)
      : query(arena, static_cast<int>(params.head_dim)),
        grad_output(arena, static_cast<int>(params.value_dim)),
        lse(arena.take<T>(kMaxTile)),
        delta(arena.take<T>(kMaxTile)),
        p_(params),
        dv_(static_cast<int>(params.value_dim)),
        output_(arena.take<T>(int64_t{kMaxTile} * round_up(dv_, kLanes<T>))) {}

  /// Those of the rows that the tile owns and that have keys. The others count as zero throughout,
  /// whatever their gradient holds.
  void load(int64_t head, const RowTile& tile, const int64_t* list) {
    load_inputs(head, tile, list);
    grad_output.load(head_of<const S>(p_.grad_output, p_.heads, head), tile.rows, list, live, T{1});
    dot_outputs(head, p_.output, tile.rows, list, delta);
    if (!p_.grad_lse) return;
    for (int i = 0; i < count; ++i) {
      const int64_t row = head * p_.n_q + sparse_attn::token(tile.rows, list, i);
      if (live >> i & 1) delta[i] -= static_cast<const T*>(p_.grad_lse)[row];
    }
  }

  /// All but what follows from the output's gradient.
  void load_inputs(int64_t head, const RowTile& tile, const int64_t* list) {
    count = tile.rows.count;
    vectors = round_up(count, kLanes<T>) / kLanes<T>;
    live = load_lse(head, tile, list);
    query.load(head_of<const S>(p_.query, p_.heads, head), tile.rows, list, live,
               static_cast<T>(p_.scale));
  }

  /// rowsum(dO ∘ rows), the rows being like the output.
  void dot_outputs(int64_t head, const sparse_attn::TensorView& like_output, const Tile& tile,
                   const int64_t* list, T* sums) const {
    const Rows<T> rows = whole_vector_rows(head_of<const S>(like_output, p_.heads, head), tile,
                                           list, dv_, live, output_);
    for (int i = 0; i < kMaxTile; ++i) {
      sums[i] = live >> i & 1 ? grad_output.dot(i, rows.row(i)) : T{0};
    }
  }

  int count = 0;
  int vectors = 0;
  uint64_t live = 0;
  RowsOfTile query;  // its columns are scaled
  RowsOfTile grad_output;
  T* const lse;    // +inf for rows without keys or of another tile: their probabilities are 0
  T* const delta;  // rowsum(dO ∘ O) less the gradient of the log-sum-exp

 private:
  uint64_t load_lse(int64_t head, const RowTile& tile, const int64_t* list) {
    uint64_t bits = 0;
    for (int i = 0; i < kMaxTile; ++i) {
      lse[i] = kInfinity<T>;
      if (i >= count || !(tile.owned >> i & 1)) continue;
      const int64_t row = head * p_.n_q + sparse_attn::token(tile.rows, list, i);
      const T of_row = static_cast<const T*>(p_.lse)[row];
      if (of_row == -kInfinity<T>) continue;
      lse[i] = of_row;
      bits |= uint64_t{1} << i;
    }
    return bits;
  }

  const AttentionParams& p_;
  const int dv_;
  T* const output_;
};

}  // namespace
