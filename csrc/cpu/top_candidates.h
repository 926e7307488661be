// The k best keys of each query of a tile while the keys pass by.
//
// A candidate is one unsigned number: the logit, so that greater logits are greater numbers, then
// the complement of the key's number, so that of equal logits the lower key is the greater. NaN is
// greater than all: who sees a NaN must not overlook it.
#pragma once

#include "scheduler.h"
#include "tile.h"

namespace {

template <class T>
struct CandidateTypes;
template <>
struct CandidateTypes<float> {
  using Unsigned = uint32_t;
  using Packed = uint64_t;
};
template <>
struct CandidateTypes<double> {
  using Unsigned = uint64_t;
  using Packed = unsigned __int128;
};
template <class T>
using Packed = typename CandidateTypes<T>::Packed;

/// The bits of a number, or of their order: of negative ones all but the sign are turned round.
template <class T>
SPARSE_ATTN_INLINE typename VecTypes<T>::IntLane turn_negative(typename VecTypes<T>::IntLane bits) {
  using Int = typename VecTypes<T>::IntLane;
  constexpr Int kMost = static_cast<Int>(~typename CandidateTypes<T>::Unsigned{0} >> 1);
  return bits < 0 ? bits ^ kMost : bits;
}

template <class T>
SPARSE_ATTN_INLINE Packed<T> pack_candidate(T logit, int32_t key) {
  using Unsigned = typename CandidateTypes<T>::Unsigned;
  constexpr int kBits = 8 * sizeof(T);
  const T value = logit != logit ? static_cast<T>(__builtin_nan("")) : logit + T{0};  // -0 is 0
  typename VecTypes<T>::IntLane bits;
  __builtin_memcpy(&bits, &value, sizeof(bits));
  const Unsigned order = static_cast<Unsigned>(turn_negative<T>(bits)) ^ Unsigned { 1 }
                                                                             << (kBits - 1);
  return static_cast<Packed<T>>(order) << kBits | static_cast<uint32_t>(~key);
}

template <class T>
SPARSE_ATTN_INLINE int32_t key_of(Packed<T> candidate) {
  return static_cast<int32_t>(~static_cast<uint32_t>(candidate));
}

template <class T>
SPARSE_ATTN_INLINE T logit_of(Packed<T> candidate) {
  using Unsigned = typename CandidateTypes<T>::Unsigned;
  constexpr int kBits = 8 * sizeof(T);
  const auto order = static_cast<Unsigned>(candidate >> kBits) ^ Unsigned { 1 } << (kBits - 1);
  const auto bits = turn_negative<T>(static_cast<typename VecTypes<T>::IntLane>(order));
  T value;
  __builtin_memcpy(&value, &bits, sizeof(value));
  return value;
}

/// The k-th greatest of `count` different numbers, 1 <= k <= count; reorders them.
template <class P>
P kth_greatest(P* data, int64_t count, int64_t k) {
  for (;;) {
    if (count == 1) return data[0];
    const P a = data[0], b = data[count / 2], c = data[count - 1];
    const P pivot = a < b ? (b < c ? b : a < c ? c : a) : (a < c ? a : b < c ? c : b);
    int64_t greater = 0;  // those stand first
    for (int64_t i = 0; i < count; ++i) {
      const P x = data[i];
      data[i] = data[greater];
      data[greater] = x;
      greater += x > pivot ? 1 : 0;
    }
    if (k == greater + 1) return pivot;
    if (k <= greater) {
      count = greater;
    } else {  // below the pivot, which is among what is left: taken out
      data += greater;
      count -= greater;
      k -= greater + 1;
      for (int64_t i = 0; i < count; ++i) {
        if (data[i] == pivot) data[i] = data[count - 1];
      }
      --count;
    }
  }
}

/// For each of the queries of a tile a list of candidates by ascending key. When one is full, the k
/// best of it stay, and the least of them becomes the query's threshold: a later key must exceed
/// it.
template <class T>
class TopCandidates {
 public:
  TopCandidates(Arena& arena, int64_t k, int64_t n_k)
      : k_(k < n_k ? k : n_k),
        capacity_(k_ + (k_ < kLeastRoom ? kLeastRoom : k_)),
        thresholds_(arena.take<T>(kMaxTile)),
        fill_(arena.take<int64_t>(kMaxTile)),
        lists_(arena.take<Packed<T>>(kMaxTile * capacity_)),
        reordered_(arena.take<Packed<T>>(capacity_)) {}

  /// Begins a tile of `queries`.
  void start(int queries) {
    for (int q = 0; q < kMaxTile; ++q) {
      // Nothing is at most NaN: every key is taken.
      thresholds_[q] = static_cast<T>(q < queries ? __builtin_nan("") : __builtin_inf());
      fill_[q] = 0;
    }
  }

  /// A bit for each query that takes the key whose logits these are.
  SPARSE_ATTN_INLINE unsigned takes(int vector, Vec<T> logits) const {
    return lane_bits<T>(~(logits <= load(thresholds_ + vector * kLanes<T>)));
  }

  void add(int query, T logit, int32_t key) {
    lists_[query * capacity_ + fill_[query]++] = pack_candidate(logit, key);
    if (fill_[query] == capacity_) keep_best(query);
  }

  /// Writes the keys of a query; returns their number.
  int32_t finish(int query, int32_t* keys) {
    if (fill_[query] > k_) keep_best(query);
    const Packed<T>* const list = lists_ + query * capacity_;
    for (int64_t i = 0; i < fill_[query]; ++i) keys[i] = key_of<T>(list[i]);
    return static_cast<int32_t>(fill_[query]);
  }

 private:
  static constexpr int64_t kLeastRoom = 8;

  /// In their order, so that keys go on ascending.
  __attribute__((noinline)) void keep_best(int query) {
    Packed<T>* const list = lists_ + query * capacity_;
    for (int64_t i = 0; i < fill_[query]; ++i) reordered_[i] = list[i];
    const Packed<T> last = kth_greatest(reordered_, fill_[query], k_);
    int64_t kept = 0;
    for (int64_t i = 0; i < fill_[query]; ++i) {
      const Packed<T> candidate = list[i];
      list[kept] = candidate;
      kept += candidate >= last ? 1 : 0;
    }
    fill_[query] = kept;
    thresholds_[query] = logit_of<T>(last);
  }

  const int64_t k_, capacity_;
  T* thresholds_;
  int64_t* fill_;
  Packed<T>* lists_;  // [query][candidate]
  Packed<T>* reordered_;
};

}  // namespace
