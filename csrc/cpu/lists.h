// Products of one row with listed rows of a tensor: what single keys need instead of tiles.
#pragma once

#include "modify.h"
#include "tile.h"

namespace {

/// Listed rows are taken so many at a time: their logits stay in registers and level-1 cache.
constexpr int kListBlock = 64;

/// Partial sums of row · from, for each lane.
template <class S>
SPARSE_ATTN_INLINE Vec<Real<S>> partial_dot(const Real<S>* row, const S* from, int size) {
  using T = Real<S>;
  Vec<T> sum{};
  int c = 0;
  for (; c + kLanes<T> <= size; c += kLanes<T>) sum += load(row + c) * load_real(from + c);
  if (c < size) sum += load(row + c) * load_real_part(from + c, size - c);
  return sum;
}

/// out[i] = row · rows[list[i]]; `row` is padded with zeros to whole vectors, and `out` has room
/// for whole vectors too.
template <class S>
__attribute__((noinline)) void dots(const Real<S>* row, Head<const S> rows, const int32_t* list,
                                    int count, int size, Real<S>* out) {
  using T = Real<S>;
  for (int i = 0; i < count; i += kLanes<T>) {
    Vec<T> sums[kLanes<T>];
#pragma GCC unroll 16
    for (int l = 0; l < kLanes<T>; ++l) {
      const int64_t from = list[i + l < count ? i + l : count - 1];
      sums[l] = partial_dot(row, rows.data + from * rows.stride, size);
    }
    transpose_block<T>(sums);
    // In pairs: of few roundings, as large logits need.
#pragma GCC unroll 4
    for (int half = kLanes<T> / 2; half > 0; half /= 2) {
#pragma GCC unroll 8
      for (int l = 0; l < half; ++l) sums[l] += sums[l + half];
    }
    store(out + i, sums[0]);
  }
}

/// sum = sum · rescale + Σ_i weights[i] · rows[list[i]], in whole vectors.
template <class S>
__attribute__((noinline)) void combine(Real<S>* sum, Real<S> rescale, const Real<S>* weights,
                                       Head<const S> rows, const int32_t* list, int count,
                                       int size) {
  using T = Real<S>;
  constexpr int kVectors = 4, kStep = kVectors * kLanes<T>;
  int c = 0;
  for (; c + kStep <= size; c += kStep) {
    Vec<T> total[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) total[v] = load(sum + c + v * kLanes<T>) * rescale;
    for (int i = 0; i < count; ++i) {
      const S* from = rows.data + list[i] * rows.stride + c;
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) total[v] += load_real(from + v * kLanes<T>) * weights[i];
    }
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) store(sum + c + v * kLanes<T>, total[v]);
  }
  for (; c < size; c += kLanes<T>) {
    const int left = size - c < kLanes<T> ? size - c : kLanes<T>;
    Vec<T> total = load(sum + c) * rescale;
    for (int i = 0; i < count; ++i) {
      const S* from = rows.data + list[i] * rows.stride + c;
      total += (left == kLanes<T> ? load_real(from) : load_real_part(from, left)) * weights[i];
    }
    store(sum + c, total);
  }
}

/// Calls body(list, count) for at most kListBlock items of [begin, end) at a time, less those that
/// are padding.
template <class Body>
SPARSE_ATTN_INLINE void for_each_block(const int32_t* begin, const int32_t* end,
                                       const uint8_t* padding, const Body& body) {
  int32_t kept[kListBlock];
  while (begin < end) {
    const int count = static_cast<int>(end - begin < kListBlock ? end - begin : kListBlock);
    int seen = 0;
    for (int i = 0; padding && i < count; ++i) {
      if (!padding[begin[i]]) kept[seen++] = begin[i];
    }
    if (!padding) {
      body(begin, count);
    } else if (seen > 0) {
      body(kept, seen);
    }
    begin += count;
  }
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
    offset = params.n_k - params.n_q;
    of_head.start(params, head);
  }

  /// Of `count` pairs; pair(i) gives a query and a key.
  template <class Pair>
  void load(int count, const Pair& pair) {
    for (int i = 0; i < count; ++i) {
      const auto [query, key] = pair(i);
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
