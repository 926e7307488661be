// Which queries and keys a tile of pairs holds, and what the tables say of them.
#pragma once

#include "tile.h"

namespace {

using sparse_attn::LogitTable;
using sparse_attn::Modifiers;
using sparse_attn::PairPlace;
using sparse_attn::SlotWindow;
using sparse_attn::TableKind;

/// The queries and keys of a tile of pairs, as the whole sequence numbers them.
struct PlaceOfPairs {
  sparse_attn::WholeTokens whole;
  int64_t offset;  // of positions from queries
  int64_t head;    // batch x heads
  int rows, keys;
  int64_t row_step, key_step;  // between queries and between keys; 0 if it changes
  int64_t query[kMaxTile];
  int64_t key[kMaxTile];

  void start(const sparse_attn::AttentionParams& params, int64_t head_) {
    whole = params.whole;
    offset = params.offset();
    head = head_;
  }
  void set_rows(const Tile& tile, const int64_t* list) {
    rows = tile.count;
    for (int r = 0; r < rows; ++r) query[r] = whole.query(sparse_attn::token(tile, list, r));
    row_step = step_of(tile, whole.queries, query);
  }
  void set_keys(const Tile& tile, const int64_t* list) {
    keys = tile.count;
    for (int k = 0; k < keys; ++k) key[k] = whole.key(sparse_attn::token(tile, list, k));
    key_step = step_of(tile, whole.keys, key);
  }
  PairPlace at(int k, int r) const { return {query[r], query[r] + offset, key[k]}; }

 private:
  /// Tokens of a part may jump, those of a tile in the whole do not.
  static int64_t step_of(const Tile& tile, const int64_t* renumbered, const int64_t* tokens) {
    if (tile.list >= 0) return 0;
    for (int i = 1; renumbered && i < tile.count; ++i) {
      if (tokens[i] - tokens[i - 1] != tile.step) return 0;
    }
    return tile.step;
  }
};

/// One head of a table. A pair (k, r) of a tile is at [k][r] of a tile of numbers.
template <class T>
class HeadTable {
 public:
  HeadTable() = default;
  HeadTable(const LogitTable& table, const SlotWindow& window, int64_t batch, int64_t head)
      : table_(table),
        window_(window),
        data_(static_cast<T*>(table.data) + batch * table.batch_stride + head * table.head_stride) {
  }

  bool exists() const { return table_.kind != TableKind::kNone; }
  T* data() const { return data_; }

  /// One pair's number; `neutral` off the table.
  T at(const PairPlace& place, T neutral) const {
    const int64_t offset = sparse_attn::table_offset(table_, window_, place);
    if (offset < 0) return neutral;
    return data_[offset] * static_cast<T>(sparse_attn::table_factor(table_, place));
  }

  /// All pairs of a tile, into `numbers`; null for a table that does not exist.
  const T* load(const PlaceOfPairs& place, T neutral, T* numbers) const {
    if (!exists()) return nullptr;
    if (table_.kind == TableKind::kSlopes) {
      load_slopes(place, numbers);
      return numbers;
    }
    if (is_toeplitz(place)) {
      for (int k = 0; k < place.keys; ++k) {
        const int64_t slot = first_slot(place, k);
        for (int r = 0; r < place.rows; r += kLanes<T>)
          load_slots(numbers + k * kMaxTile + r, slot - r, neutral);
      }
      return numbers;
    }
    if (is_dense_block(place)) {
      const T* const first = data_ + (place.query[0] - table_.first_query) * table_.row_stride +
                             place.key[0] * table_.column_stride;
      transpose_rows<T>(numbers, kMaxTile, {first, place.row_step * table_.row_stride}, place.rows,
                        place.keys, T{1});
      return numbers;
    }
    for_each_key(place, [&](int k, const Offsets& of) {
      T* to = numbers + k * kMaxTile;
      for (int r = 0; r < place.rows; ++r) {
        const T number = data_[of.offset[r] < 0 ? 0 : of.offset[r]];
        to[r] = of.offset[r] < 0 ? neutral : number;
      }
    });
    return numbers;
  }

  /// Adds a tile of numbers to those of the table: neighbors that share one first to each other, as
  /// a long sum in one place rounds more.
  template <class Sum>
  void add(const PlaceOfPairs& place, const T* numbers, Sum* sums) const {
    for_each_key(place, [&](int k, const Offsets& of) {
      int64_t last = -1;
      Sum sum{0};
      for (int r = 0; r < place.rows; ++r) {
        if (of.offset[r] != last) {
          if (last >= 0) sums[last] += sum;
          sum = Sum{0};
        }
        last = of.offset[r];
        sum += static_cast<Sum>(numbers[k * kMaxTile + r]) * static_cast<Sum>(of.factor[r]);
      }
      if (last >= 0) sums[last] += sum;
    });
  }

 private:
  /// Where the pairs of one key and all rows of a tile have their numbers.
  struct Offsets {
    int64_t offset[kMaxTile];  // -1 = none
    int64_t factor[kMaxTile];
  };

  /// Calls visit(k, offsets) for each key. What `table_offset` says, with fewer divisions.
  template <class Visit>
  void for_each_key(const PlaceOfPairs& place, const Visit& visit) const {
    Offsets of;
    int64_t first[kMaxTile];  // of each row
    const bool blocks = table_.kind == TableKind::kBlocks;
    for (int r = 0; r < place.rows; ++r) {
      const int64_t query = place.query[r] - table_.first_query,
                    row = blocks && table_.block > 1 ? query / table_.block : query;
      first[r] = row * table_.row_stride;
      of.factor[r] = 1;
    }
    for (int k = 0; k < place.keys; ++k) {
      const int64_t key = place.key[k];
      if (blocks) {
        const int64_t column = (table_.block > 1 ? key / table_.block : key) * table_.column_stride;
        for (int r = 0; r < place.rows; ++r) of.offset[r] = first[r] + column;
      } else if (table_.kind == TableKind::kSlopes) {
        for (int r = 0; r < place.rows; ++r) {
          const int64_t distance = key - place.query[r] - place.offset;
          of.offset[r] = 0;
          of.factor[r] = distance < 0 ? distance : -distance;
        }
      } else {
        for (int r = 0; r < place.rows; ++r)
          of.offset[r] = sparse_attn::table_offset(table_, window_, place.at(k, r));
      }
      visit(k, of);
    }
  }

  /// Distances from the first query on: small numbers, which floats hold exactly.
  void load_slopes(const PlaceOfPairs& place, T* numbers) const {
    T rows[kMaxTile];
    for (int r = 0; r < place.rows; ++r) rows[r] = static_cast<T>(place.query[r] - place.query[0]);
    for (int k = 0; k < place.keys; ++k) {
      const T key = static_cast<T>(place.key[k] - place.query[0] - place.offset);
      for (int r = 0; r < place.rows; ++r) {
        const T distance = key - rows[r];
        numbers[k * kMaxTile + r] = (distance < T{0} ? distance : -distance) * data_[0];
      }
    }
  }

  /// Whether the slot falls by one from each query of the tile to the next, and no query has
  /// numbers of its own.
  bool is_toeplitz(const PlaceOfPairs& place) const {
    return table_.kind == TableKind::kSlots && table_.row_stride == 0 &&
           table_.column_stride == 1 && place.row_step == window_.dilation;
  }

  /// Whether each query has a number for each key, those of a query in whole vectors.
  bool is_dense_block(const PlaceOfPairs& place) const {
    return table_.kind == TableKind::kBlocks && table_.block == 1 && table_.column_stride == 1 &&
           place.row_step > 0 && place.key_step == 1 && place.keys % kLanes<T> == 0;
  }

  /// Of key k and the first query; far outside if no query has one.
  int64_t first_slot(const PlaceOfPairs& place, int k) const {
    const int64_t distance = place.key[k] - place.query[0] - place.offset;
    if (distance % window_.dilation != 0) return -1;
    return distance / window_.dilation + window_.left;
  }

  /// Slots slot, slot - 1, ... of as many queries as a vector has lanes.
  void load_slots(T* to, int64_t slot, T neutral) const {
    const int64_t lowest = slot - kLanes<T> + 1;
    if (lowest >= 0 && slot < table_.columns) {
      store(to, reversed(load_vector(data_ + lowest)));
      return;
    }
    for (int l = 0; l < kLanes<T>; ++l) {
      const bool inside = 0 <= slot - l && slot - l < table_.columns;
      to[l] = inside ? data_[slot - l] : neutral;
    }
  }

  static SPARSE_ATTN_INLINE Vec<T> load_vector(const T* from) { return ::load(from); }

  template <int... kLane>
  static SPARSE_ATTN_INLINE Vec<T> reversed(Vec<T> x, std::integer_sequence<int, kLane...>) {
    return __builtin_shufflevector(x, x, (kLanes<T> - 1 - kLane)...);
  }
  static SPARSE_ATTN_INLINE Vec<T> reversed(Vec<T> x) {
    return reversed(x, std::make_integer_sequence<int, kLanes<T>>{});
  }

  LogitTable table_;
  SlotWindow window_{0, 1};
  T* data_ = nullptr;
};

}  // namespace
