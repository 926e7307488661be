// Products of one row with listed rows of a tensor: what single keys need instead of tiles.
#pragma once

#include "modify.h"
#include "tile.h"

namespace {

/// Listed rows are taken so many at a time: their logits stay in registers and level-1 cache.
constexpr int kListBlock = 64;

/// sums[r] += row · from[r], for each lane.
template <class S, int kRows>
SPARSE_ATTN_INLINE void add_products(Vec<Real<S>> (&sums)[kRows], const Real<S>* row,
                                     const S* const (&from)[kRows], int size) {
  using T = Real<S>;
  int c = 0;
  for (; c + kLanes<T> <= size; c += kLanes<T>) {
    const Vec<T> x = load(row + c);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) sums[r] += x * load_real(from[r] + c);
  }
  if (c == size) return;
  const Vec<T> x = load(row + c);
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) sums[r] += x * load_real_part(from[r] + c, size - c);
}

/// In lane i the sum of the lanes of parts[i]. Halves are added in pairs: half as many shuffles as
/// a transposition, and few roundings, as large logits need.
template <class T>
SPARSE_ATTN_INLINE Vec<T> sums_of_lanes(Vec<T> (&parts)[kLanes<T>]) {
  constexpr auto kEach = std::make_integer_sequence<int, kLanes<T>>{};
#pragma GCC unroll 4
  for (int half = kLanes<T> / 2; half > 0; half /= 2) {
#pragma GCC unroll 8
    for (int l = 0; l < half; ++l) {
      parts[l] = zip_low<T>(parts[l], parts[l + half], kEach) +
                 zip_high<T>(parts[l], parts[l + half], kEach);
    }
  }
  return parts[0];
}

/// out[i] = row · rows[list[i]]; `row` is padded with zeros to whole vectors, and `out` has room
/// for whole vectors too.
template <class S>
__attribute__((noinline)) void dots(const Real<S>* row, Head<const S> rows, const int32_t* list,
                                    int count, int size, Real<S>* out) {
  using T = Real<S>;
  // So many rows at a time: there are registers for their addresses.
  constexpr int kRows = kLanes<T> < 8 ? kLanes<T> : 8;
  for (int i = 0; i < count; i += kLanes<T>) {
    Vec<T> sums[kLanes<T>];
#pragma GCC unroll 2
    for (int l = 0; l < kLanes<T>; l += kRows) {
      const S* from[kRows];
      Vec<T> products[kRows] = {};
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r)
        from[r] = rows.data + list[i + l + r < count ? i + l + r : count - 1] * rows.stride;
      add_products<S>(products, row, from, size);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) sums[l + r] = products[r];
    }
    store(out + i, sums_of_lanes<T>(sums));
  }
}

/// The same as `combine` for kVectors vectors of columns, kRows rows at a time: a sum waits for the
/// one before it.
template <int kVectors, int kRows, class S>
SPARSE_ATTN_INLINE void combine_columns(Real<S>* sum, Real<S> rescale, const Real<S>* weights,
                                        Head<const S> rows, const int32_t* list, int count) {
  using T = Real<S>;
  Vec<T> total[kRows][kVectors] = {};
  const auto add = [&](Vec<T>(&to)[kVectors], int i) __attribute__((always_inline)) {
    const S* from = rows.data + list[i] * rows.stride;
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) to[v] += load_real(from + v * kLanes<T>) * weights[i];
  };
#pragma GCC unroll 4
  for (int v = 0; v < kVectors; ++v) total[0][v] = load(sum + v * kLanes<T>) * rescale;
  int i = 0;
  for (; i + kRows <= count; i += kRows) {
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) add(total[r], i + r);
  }
  for (; i < count; ++i) add(total[0], i);
#pragma GCC unroll 4
  for (int v = 0; v < kVectors; ++v) {
#pragma GCC unroll 4
    for (int r = 1; r < kRows; ++r) total[0][v] += total[r][v];
    store(sum + v * kLanes<T>, total[0][v]);
  }
}

/// sum = sum · rescale + Σ_i weights[i] · rows[list[i]], in whole vectors.
template <class S>
__attribute__((noinline)) void combine(Real<S>* sum, Real<S> rescale, const Real<S>* weights,
                                       Head<const S> rows, const int32_t* list, int count,
                                       int size) {
  using T = Real<S>;
  constexpr int kLane = kLanes<T>;
  const auto from = [&](int c) { return Head<const S>{rows.data + c, rows.stride}; };
  int c = 0;
  for (; c + 4 * kLane <= size; c += 4 * kLane)
    combine_columns<4, 2, S>(sum + c, rescale, weights, from(c), list, count);
  for (; c + kLane <= size; c += kLane)
    combine_columns<1, 4, S>(sum + c, rescale, weights, from(c), list, count);
  if (c == size) return;
  Vec<T> total = load(sum + c) * rescale;
  for (int i = 0; i < count; ++i)
    total += load_real_part(from(c).data + list[i] * rows.stride, size - c) * weights[i];
  store(sum + c, total);
}

/// The modifiers' numbers for listed pairs.
template <class T>
struct ListedModifiers {
  explicit ListedModifiers(Arena& arena)
      : gate(arena.take<T>(kListBlock)),
        bias(arena.take<T>(kListBlock)),
        kept(arena.take<T>(kListBlock)) {}

  void start(const AttentionParams& params, int64_t head_) {
    exist = params.modifiers.any();
    if (!exist) return;
    head = head_;
    whole = params.whole;
    offset = params.offset();
    of_head.start(params, head);
  }

  /// Of `count` pairs; pair(i) gives a query and a key.
  template <class Pair>
  void load(int count, const Pair& pair) {
    for (int i = 0; i < count; ++i) {
      const auto [row, column] = pair(i);
      const int64_t query = whole.query(row), key = whole.key(column);
      const PairPlace place{query, query + offset, key};
      gate[i] = of_head.gate.exists() ? of_head.gate.at(place, T{1}) : T{1};
      bias[i] = of_head.bias.exists() ? of_head.bias.at(place, T{0}) : T{0};
      kept[i] = of_head.kept(head, query, key);
    }
  }
  SPARSE_ATTN_INLINE sparse_attn::Logit<Vec<T>> logits(int i, Vec<T> scores) const {
    return sparse_attn::logit_of<VectorMath>(scores, ::load(gate + i), ::load(bias + i),
                                             of_head.cap);
  }

  bool exist = false;
  sparse_attn::WholeTokens whole;
  int64_t head = 0, offset = 0;
  HeadModifiers<T> of_head;
  T* gate;
  T* bias;
  T* kept;  // factors
};

struct ListedPair {
  int64_t query, key;
};

/// Calls visit(tile) for the keys of query i, a tile of at most kMaxTile at a time; `room` gets
/// their numbers.
template <class Visit>
SPARSE_ATTN_INLINE void for_each_list_tile(const sparse_attn::ListsView& lists, int64_t i,
                                           int64_t* room, const Visit& visit) {
  for (int64_t at = lists.starts[i]; at < lists.starts[i + 1]; at += kMaxTile) {
    const int64_t left = lists.starts[i + 1] - at;
    const int count = static_cast<int>(left < kMaxTile ? left : kMaxTile);
    for (int k = 0; k < count; ++k) room[k] = lists.items[at + k];
    visit(Tile{0, 1, count, 0});
  }
}

/// A range of rows that one thread takes: number `share` of `shares`.
struct Share {
  int64_t begin, end;
  Share(int64_t rows, int64_t share, int64_t shares)
      : begin(rows * share / shares), end(rows * (share + 1) / shares) {}
};

/// At most kListBlock items of a row's list, without those that are padding.
struct ListPart {
  int64_t row;
  const int32_t* items;
  int count;
  bool first, last;  // of the row's parts
};

/// The lists of so many rows are gone through side by side, a part of each at a time. Parts of
/// sorted lists lie close together in the tensor that they list, so its rows come from the level-1
/// cache where neighbours have much the same lists, from level 2 where lists are random.
constexpr int64_t kListRows = 256;

/// Calls visit(part) for all parts of the lists of a share's rows; those of a row come in order.
template <class Visit>
SPARSE_ATTN_INLINE void for_each_part(const sparse_attn::ListsView& lists, const Share& share,
                                      const uint8_t* padding, const Visit& visit) {
  int32_t kept[kListBlock];
  for (int64_t group = share.begin; group < share.end; group += kListRows) {
    const int64_t end = group + kListRows < share.end ? group + kListRows : share.end;
    bool more = true;
    for (int64_t offset = 0; more; offset += kListBlock) {
      more = false;
      for (int64_t row = group; row < end; ++row) {
        const int64_t at = lists.starts[row] + offset, left = lists.starts[row + 1] - at;
        if (left <= 0) continue;
        more |= left > kListBlock;
        ListPart part{row, lists.items + at,
                      static_cast<int>(left < kListBlock ? left : kListBlock), offset == 0,
                      left <= kListBlock};
        if (padding) {
          int count = 0;
          for (int i = 0; i < part.count; ++i) {
            kept[count] = part.items[i];
            count += !padding[part.items[i]];
          }
          part.items = kept;
          part.count = count;
        }
        visit(part);
      }
    }
  }
}

/// Enough shares for 32 threads, of 64 rows at least; by sizes alone, as chunks are.
inline int64_t list_shares(int64_t heads, int64_t rows) {
  const int64_t wanted = (64 + heads - 1) / heads, most = (rows + 63) / 64;
  return wanted < most ? wanted : most;
}

inline bool has_lists(const AttentionParams& params) {
  for (int64_t i = 0; i < params.batch * params.heads; ++i) {
    if (params.plans[i]->keys_of_query.starts) return true;
  }
  return false;
}

}  // namespace
