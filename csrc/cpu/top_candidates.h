// The k best keys of each query of a tile while the keys pass by.
#pragma once

#include "scheduler.h"
#include "tile.h"

namespace {

template <class T>
using IntLane = typename VecTypes<T>::IntLane;

/// Negative numbers of either order in the other: all bits but the sign are turned round.
template <class T, class Bits>
SPARSE_ATTN_INLINE Bits turn_negative(Bits bits) {
  constexpr auto kMost = static_cast<IntLane<T>>(~uint64_t{0} >> (65 - 8 * sizeof(T)));
  return bits < 0 ? bits ^ kMost : bits;
}

/// Logits as integers of the same order. NaN is above all: who sees a NaN must not overlook it.
/// -0 is 0.
template <class T>
SPARSE_ATTN_INLINE IntVec<T> orders_of(Vec<T> logits) {
  const Vec<T> nan = broadcast(static_cast<T>(__builtin_nan("")));
  return turn_negative<T>(reinterpret_cast<IntVec<T>>(logits != logits ? nan : logits + T{0}));
}

template <class T>
SPARSE_ATTN_INLINE T logit_of(IntLane<T> order) {
  const auto bits = turn_negative<T>(order);
  T value;
  __builtin_memcpy(&value, &bits, sizeof(value));
  return value;
}

/// For each of the queries of a tile a list of candidates by ascending key. When one is full, the k
/// best of it stay, and from then on a key must exceed the query's threshold, which is at most the
/// k-th best: an equal one would have the higher number.
template <class T>
class TopCandidates {
  using Order = IntLane<T>;

 public:
  TopCandidates(Arena& arena, int64_t k, int64_t n_k)
      : k_(k < n_k ? k : n_k),
        capacity_((k_ + (k_ < kLeastRoom ? kLeastRoom : k_) + kLanes<T> - 1) / kLanes<T> *
                  kLanes<T>),
        thresholds_(arena.take<T>(kMaxTile)),
        fill_(arena.take<int64_t>(kMaxTile)),
        orders_(arena.take<Order>(kMaxTile * capacity_)),
        keys_(arena.take<int32_t>(kMaxTile * capacity_)) {}

  /// Begins a tile of `queries`.
  void start(int queries) {
    for (int q = 0; q < kMaxTile; ++q) {
      // Nothing is at most NaN: every key is taken.
      thresholds_[q] = static_cast<T>(q < queries ? __builtin_nan("") : __builtin_inf());
      fill_[q] = 0;
    }
  }

  /// A bit for each query of the vector that takes the key whose logits these are.
  SPARSE_ATTN_INLINE unsigned takes(int vector, Vec<T> logits) const {
    return lane_bits<T>(~(logits <= load(thresholds_ + vector * kLanes<T>)));
  }

  SPARSE_ATTN_INLINE void add(int query, Order order, int32_t key) {
    const int64_t place = query * capacity_ + fill_[query]++;
    orders_[place] = order;
    keys_[place] = key;
    if (fill_[query] == capacity_) keep_best(query);
  }

  /// Writes the keys of a query; returns their number.
  int32_t finish(int query, int32_t* keys) {
    if (fill_[query] > k_) keep_best(query);
    for (int64_t i = 0; i < fill_[query]; ++i) keys[i] = keys_[query * capacity_ + i];
    return static_cast<int32_t>(fill_[query]);
  }

 private:
  /// Beside the k best. Measured with k = 16 and 64 of 4096 keys.
  static constexpr int64_t kLeastRoom = 32;
  static constexpr Order kLeast = static_cast<Order>(uint64_t{1} << (8 * sizeof(Order) - 1));

  /// Keeps the k best of more in their order, so that keys go on ascending. The bound is found by
  /// bisection: counting is a vector operation.
  __attribute__((noinline)) void keep_best(int query) {
    Order* const orders = orders_ + query * capacity_;
    int32_t* const keys = keys_ + query * capacity_;
    const int64_t fill = fill_[query];
    Order least = orders[0], most = orders[0];
    for (int64_t i = 1; i < fill; ++i) {
      least = orders[i] < least ? orders[i] : least;
      most = orders[i] > most ? orders[i] : most;
    }
    for (int64_t i = fill; i % kLanes<T> != 0; ++i) orders[i] = kLeast;
    // At least k are not below `least`, fewer than k are above `most`.
    int64_t equal = fill;  // how many of those at the bound stay, if there are so many
    while (least < most) {
      const Order middle = least + static_cast<Order>(half_up(least, most));
      const int64_t count = count_from(orders, fill, middle);
      if (count >= k_) least = middle;
      if (count == k_) break;
      if (count < k_) most = middle - 1;
    }
    if (least == most) equal = k_ - count_from(orders, fill, least + 1);
    int64_t kept = 0;
    for (int64_t i = 0; i < fill; ++i) {
      const Order order = orders[i];
      const int32_t key = keys[i];
      const int64_t ties = order == least ? 1 : 0;  // without branches, which nobody could predict
      orders[kept] = order;
      keys[kept] = key;
      kept += (order > least ? 1 : 0) | (ties & (equal > 0 ? 1 : 0));
      equal -= ties;
    }
    fill_[query] = kept;
    thresholds_[query] = logit_of<T>(least);
  }

  /// Half of most - least, rounded up.
  static uint64_t half_up(Order least, Order most) {
    const uint64_t distance = static_cast<uint64_t>(most) - static_cast<uint64_t>(least);
    return distance / 2 + distance % 2;
  }

  /// How many of the orders are at least `bound`.
  static int64_t count_from(const Order* orders, int64_t fill, Order bound) {
    IntVec<T> count{};
    for (int64_t i = 0; i < fill; i += kLanes<T>)
      count -= *reinterpret_cast<const IntVec<T>*>(orders + i) >= bound;
    int64_t total = 0;
    for (int l = 0; l < kLanes<T>; ++l) total += count[l];
    return total;
  }

  const int64_t k_, capacity_;
  T* thresholds_;
  int64_t* fill_;
  Order* orders_;  // [query][candidate]
  int32_t* keys_;
};

}  // namespace
