// What of a tile of pairs is worth computing: a tile at the edge of a window is half empty.
//
// The same pairs in two ways: for each vector of queries the range of keys that any of its queries
// sees, for the softmax, and for each group of keys the range of query vectors, for the products.
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
  /// What `words` allow: bit r of word k is set if query r sees key k. Null allows all.
  void set(const uint64_t* words, int keys, int vectors) {
    keys_ = keys;
    vectors_ = vectors;
    if (words) set_columns(words);
    if (!words || !set_rows()) set_all();
  }

  Range keys() const { return {0, keys_}; }
  int vectors() const { return vectors_; }
  bool whole() const {
    return row_count_ == 1 && rows_[0].keys.size() == keys_ && rows_[0].vectors.size() == vectors_;
  }

  Array<VisibleColumns> columns() const { return {columns_, column_count_}; }
  Array<VisibleRows> rows() const { return {rows_, row_count_}; }

 private:
  /// Ranges of keys begin at multiples of the rows of a register block.
  static constexpr int kStep = kBlockRows<kBlockVectors>;
  static constexpr int kSteps = (kMaxTile + kStep - 1) / kStep;

  void set_all() {
    columns_[0] = {{0, vectors_}, {0, keys_}};
    rows_[0] = {{0, keys_}, {0, vectors_}};
    column_count_ = row_count_ = 1;
  }

  void set_columns(const uint64_t* words) {
    column_count_ = 0;
    uint64_t any = 0;
    for (int k = 0; k < keys_; ++k) any |= words[k];
    for (int v = 0; v < vectors_; ++v) {
      const uint64_t lanes = ~uint64_t{0} >> (64 - kLanes<T>) << (v * kLanes<T>);
      if (any & lanes) add_vector(v, keys_of(words, lanes));
    }
  }

  /// The keys that any of the lanes sees; there is one.
  Range keys_of(const uint64_t* words, uint64_t lanes) const {
    int begin = 0, end = keys_;
    while (!(words[begin] & lanes)) ++begin;
    while (!(words[end - 1] & lanes)) --end;
    const int whole = round_up(end, kStep);
    return {begin / kStep * kStep, whole < keys_ ? whole : keys_};
  }

  void add_vector(int v, const Range& keys) {
    if (column_count_ > 0) {
      VisibleColumns& last = columns_[column_count_ - 1];
      if (last.vectors.end == v && last.keys == keys) {
        last.vectors.end = v + 1;
        return;
      }
    }
    columns_[column_count_++] = {{v, v + 1}, keys};
  }

  /// False if the query vectors of some keys are no single range.
  bool set_rows() {
    row_count_ = 0;
    for (int first = 0; first < keys_; first += kStep) {
      VisibleRows rows{{first, first + kStep < keys_ ? first + kStep : keys_}, {0, 0}};
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
    for (const VisibleColumns& group : columns()) {
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
    return a.keys.end == b.keys.begin && a.vectors == b.vectors;
  }

  VisibleColumns columns_[kMaxTile / kLanes<T>];
  VisibleRows rows_[kSteps];
  int keys_ = 0, vectors_ = 0;
  int column_count_ = 0, row_count_ = 0;
};

}  // namespace
