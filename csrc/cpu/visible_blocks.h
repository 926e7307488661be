// What of a tile of pairs is worth computing: a tile at the edge of a window is half empty.
//
// The same pairs in two ways: for each group of query vectors the range of keys that any of its
// queries sees, and for each group of keys the range of query vectors. Products go by whichever
// leaves them the wider register blocks: those that give or read rows of keys by the latter (68 %
// of a whole tile's time for the triangle at the edge of a window, 92 % by the former), those that
// give columns of queries by the former (71 %).
#pragma once

#include "gemm.h"
#include "plan/schedule.h"
#include "range.h"

namespace {

using sparse_attn::Array;
using sparse_attn::kMaxTile;

/// Query vectors, and the keys that they see.
struct VisibleColumns {
  Range vectors;
  Range keys;
};

/// Keys, and the query vectors that see them.
struct VisibleRows {
  Range keys;
  Range vectors;
};

template <class T>
class VisibleBlocks {
 public:
  /// All pairs.
  void set_all(int keys, int vectors) {
    columns_[0] = {{0, vectors}, {0, keys}};
    rows_[0] = {{0, keys}, columns_[0].vectors};
    column_count_ = row_count_ = 1;
  }

  /// What `words` allow: bit r of word k is set if query r sees key k.
  void set(const uint64_t* words, int keys, int vectors) {
    column_count_ = 0;
    uint64_t any = 0;
    for (int k = 0; k < keys; ++k) any |= words[k];
    for (int v = 0; v < vectors; ++v) {
      const uint64_t lanes = ~uint64_t{0} >> (64 - kLanes<T>) << (v * kLanes<T>);
      if (any & lanes) add_vector(v, keys_of(words, keys, lanes));
    }
    if (!set_rows(keys)) set_all(keys, vectors);
  }

  Array<VisibleColumns> columns() const { return {columns_, column_count_}; }
  Array<VisibleRows> rows() const { return {rows_, row_count_}; }

 private:
  /// Ranges of keys begin at multiples of this, a whole number of the register blocks' rows.
  static constexpr int kStep = 6;
  static constexpr int kSteps = (kMaxTile + kStep - 1) / kStep;

  /// A product on fewer vectors than a register block has takes longer by about this much of a
  /// vector: sums of 12 x 1 run at 90 % of the rate of 6 x 4.
  static constexpr int kEighths = 8, kPartial = 1;

  /// The keys that any of the lanes sees; there is one.
  static Range keys_of(const uint64_t* words, int keys, uint64_t lanes) {
    int begin = 0, end = keys;
    while (!(words[begin] & lanes)) ++begin;
    while (!(words[end - 1] & lanes)) --end;
    const int whole = round_up(end, kStep);
    return {begin / kStep * kStep, whole < keys ? whole : keys};
  }

  static int cost(int vectors, const Range& keys) {
    const int partial = vectors % kBlockVectors ? kPartial : 0;
    return (vectors * kEighths + partial) * keys.size();
  }

  /// Joins the vector to the last group if one product is cheaper than two.
  void add_vector(int v, const Range& keys) {
    if (column_count_ > 0) {
      VisibleColumns& last = columns_[column_count_ - 1];
      const int vectors = last.vectors.size();
      const Range joined{keys.begin < last.keys.begin ? keys.begin : last.keys.begin,
                         keys.end > last.keys.end ? keys.end : last.keys.end};
      if (last.vectors.end == v &&
          cost(vectors + 1, joined) <= cost(vectors, last.keys) + cost(1, keys)) {
        last = {{last.vectors.begin, v + 1}, joined};
        return;
      }
    }
    columns_[column_count_++] = {{v, v + 1}, keys};
  }

  /// False if the query vectors of some keys are no single range.
  bool set_rows(int keys) {
    row_count_ = 0;
    for (int first = 0; first < keys; first += kStep) {
      VisibleRows rows{{first, first + kStep < keys ? first + kStep : keys}, {0, 0}};
      if (!find_vectors(rows)) return false;
      if (rows.vectors.empty()) continue;
      if (row_count_ > 0 && continues(rows_[row_count_ - 1], rows)) {
        rows_[row_count_ - 1].keys.end = rows.keys.end;
      } else {
        rows_[row_count_++] = rows;
      }
    }
    return true;
  }

  bool find_vectors(VisibleRows& rows) const {
    for (int i = 0; i < column_count_; ++i) {
      const VisibleColumns& group = columns_[i];
      if (rows.keys.begin < group.keys.begin || rows.keys.begin >= group.keys.end) continue;
      if (rows.vectors.empty()) {
        rows.vectors = group.vectors;
      } else if (rows.vectors.end == group.vectors.begin) {
        rows.vectors.end = group.vectors.end;
      } else {
        return false;
      }
    }
    return true;
  }

  static bool continues(const VisibleRows& a, const VisibleRows& b) {
    return a.keys.end == b.keys.begin && a.vectors.begin == b.vectors.begin &&
           a.vectors.end == b.vectors.end;
  }

  VisibleColumns columns_[kMaxTile / kLanes<T>];
  VisibleRows rows_[kSteps];
  int column_count_ = 0, row_count_ = 0;
};

}  // namespace
