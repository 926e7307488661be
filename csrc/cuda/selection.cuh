// Keys chosen by their logits: all keys stream past a tile of queries, whose logits come to shared
// memory tile by tile. There a warp has eight of the queries, and each lane two of the keys.
#pragma once

#include "cuda/rows.cuh"
#include "cuda/selection.h"
#include "cuda/simt_products.cuh"

namespace sparse_attn::cuda {

/// Of the 32 lanes: how many before this one have the flag, and how many have it at all.
struct LaneCount {
  int before = 0, total;

  __device__ explicit LaneCount(bool flag) : total(flag ? 1 : 0) {
#pragma unroll
    for (int mask = 1; mask < kWarp; mask *= 2) {
      const int other = shuffle_xor(total, mask);
      if ((lane_number() & mask) != 0) before += other;
      total += other;
    }
  }
};

/// A logit as an integer of the same order; NaN is above all, and -0 is 0.
template <class T>
struct Order;
template <>
struct Order<float> {
  using Int = std::int32_t;
};
template <>
struct Order<double> {
  using Int = std::int64_t;
};
template <class T>
using OrderOf = typename Order<T>::Int;
template <class T>
constexpr OrderOf<T> kLeastOrder = static_cast<OrderOf<T>>(std::uint64_t{1} << (8 * sizeof(T) - 1));

template <class T>
__device__ inline OrderOf<T> order_of(T logit) {
  const T value = logit != logit ? static_cast<T>(kInfinity) : logit + T{0};
  OrderOf<T> bits;
  memcpy(&bits, &value, sizeof(bits));
  const OrderOf<T> order = bits < 0 ? bits ^ static_cast<OrderOf<T>>(~kLeastOrder<T>) : bits;
  return logit != logit ? order + 1 : order;
}

/// The k best: candidates by ascending key, of which the k best stay when room runs out.
template <class S>
struct ChooseTop {
  using T = Real<S>;
  using Int = OrderOf<T>;

  struct Row {
    std::int64_t fill;
    Int threshold;  // a later key must exceed it
  };

  static __device__ Row begin(const SelectionArguments&, std::int64_t) {
    return {0, kLeastOrder<T>};
  }

  /// Two keys of each lane, in the order of the keys; `seen` or not.
  static __device__ void visit(const SelectionArguments& a, Row& row, std::int64_t number,
                               const T (&logits)[2], const std::int64_t (&keys)[2],
                               const bool (&seen)[2]) {
    if (row.fill + kMaxTile > a.room) keep_best(a, row, number);
    Int* const orders = orders_of(a, number);
    std::int32_t* const list = keys_of(a, number);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const Int order = order_of(logits[i]);
      const bool takes = seen[i] && order > row.threshold;
      const LaneCount count(takes);
      if (takes) {
        orders[row.fill + count.before] = order;
        list[row.fill + count.before] = static_cast<std::int32_t>(keys[i]);
      }
      row.fill += count.total;
    }
    sync_warp();  // the lists are read by other lanes
  }

  static __device__ void finish(const SelectionArguments& a, Row& row, std::int64_t number) {
    if (row.fill > a.call.width) keep_best(a, row, number);
    const std::int32_t* const list = keys_of(a, number);
    for (std::int64_t i = lane_number(); i < row.fill; i += kWarp)
      a.call.indices[number * a.call.width + i] = list[i];
    if (lane_number() == 0) a.call.counts[number] = static_cast<std::int32_t>(row.fill);
  }

 private:
  static __device__ Int* orders_of(const SelectionArguments& a, std::int64_t number) {
    return static_cast<Int*>(a.call.workspace) + number * a.room;
  }
  static __device__ std::int32_t* keys_of(const SelectionArguments& a, std::int64_t number) {
    const std::int64_t rows = a.call.batch * a.call.heads * a.call.n_q;
    return reinterpret_cast<std::int32_t*>(orders_of(a, rows)) + number * a.room;
  }

  static __device__ std::int64_t count_from(const Int* orders, std::int64_t fill, Int bound) {
    int count = 0;
    for (std::int64_t i = lane_number(); i < fill; i += kWarp) count += orders[i] >= bound ? 1 : 0;
    return warp_sum(count);
  }

  /// The k best of more, by bisection of their bound; they stay in their order.
  static __device__ void keep_best(const SelectionArguments& a, Row& row, std::int64_t number) {
    Int* const orders = orders_of(a, number);
    std::int32_t* const list = keys_of(a, number);
    const std::int64_t k = a.call.width;
    if (row.fill <= k) return;
    Int least = row.threshold, most = static_cast<Int>(~kLeastOrder<T>);
    std::int64_t equal = row.fill;  // how many at the bound stay, if there are so many
    while (least < most) {
      const auto distance = static_cast<std::uint64_t>(most) - static_cast<std::uint64_t>(least);
      const Int middle = least + static_cast<Int>(distance / 2 + distance % 2);
      const std::int64_t count = count_from(orders, row.fill, middle);
      if (count >= k) least = middle;
      if (count == k) break;
      if (count < k) most = middle - 1;
    }
    if (least == most) equal = k - count_from(orders, row.fill, least + 1);
    std::int64_t kept = 0;
    for (std::int64_t first = 0; first < row.fill; first += kWarp) {
      const std::int64_t i = first + lane_number();
      const bool exists = i < row.fill;
      const Int order = exists ? orders[i] : least;
      const std::int32_t key = exists ? list[i] : 0;
      const LaneCount ties(exists && order == least);
      const bool stays = exists && (order > least || (order == least && ties.before < equal));
      const LaneCount count(stays);
      sync_warp();  // all lanes have read
      if (stays) {
        orders[kept + count.before] = order;
        list[kept + count.before] = key;
      }
      kept += count.total;
      equal = equal > ties.total ? equal - ties.total : 0;
      sync_warp();
    }
    row.fill = kept;
    row.threshold = least;
  }
};

/// Those that are not below the query's bound, or NaN.
template <class S>
struct ChooseAbove {
  using T = Real<S>;

  struct Row {
    std::int64_t count;
    T bound;
  };

  static __device__ Row begin(const SelectionArguments& a, std::int64_t number) {
    return {0, static_cast<const T*>(a.call.bounds)[number]};
  }
  static __device__ void visit(const SelectionArguments& a, Row& row, std::int64_t number,
                               const T (&logits)[2], const std::int64_t (&keys)[2],
                               const bool (&seen)[2]) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const bool takes = seen[i] && !(logits[i] < row.bound);
      const LaneCount count(takes);
      if (takes && a.call.indices != nullptr)
        a.call.indices[number * a.call.width + row.count + count.before] =
            static_cast<std::int32_t>(keys[i]);
      row.count += count.total;
    }
  }
  static __device__ void finish(const SelectionArguments& a, Row& row, std::int64_t number) {
    if (lane_number() == 0) a.call.counts[number] = static_cast<std::int32_t>(row.count);
  }
};

/// The log-sum-exp of the same logits, summed in double.
template <class S>
struct LogitSums {
  using T = Real<S>;

  struct Row {
    T maximum;
    double sum;
  };

  static __device__ Row begin(const SelectionArguments&, std::int64_t) {
    return {static_cast<T>(-kInfinity), 0.0};
  }
  static __device__ void visit(const SelectionArguments&, Row& row, std::int64_t,
                               const T (&logits)[2], const std::int64_t (&)[2],
                               const bool (&seen)[2]) {
    T top = row.maximum;
#pragma unroll
    for (int i = 0; i < 2; ++i) top = seen[i] ? larger(top, logits[i]) : top;
#pragma unroll
    for (int mask = kWarp / 2; mask > 0; mask /= 2) top = larger(top, shuffle_xor(top, mask));
    const T finite = finite_maximum(top);
    T sum{0};
#pragma unroll
    for (int i = 0; i < 2; ++i) sum += seen[i] ? exponential(logits[i] - finite) : T{0};
    row.sum = row.sum * static_cast<double>(exponential(row.maximum - finite)) +
              static_cast<double>(warp_sum(sum));
    row.maximum = top;
  }
  static __device__ void finish(const SelectionArguments& a, Row& row, std::int64_t number) {
    if (lane_number() != 0) return;
    a.call.lse[number] = row.sum == 0.0 ? static_cast<double>(-kInfinity)
                                        : static_cast<double>(row.maximum) + log(row.sum);
  }
};

/// One block for a tile of queries of a head.
template <class S, class Visitor>
struct SelectKeys {
  using T = Real<S>;
  using Products = SimtProducts<S>;
  static constexpr int kThreads = kSimtThreads;
  static constexpr int kBlocksPerSM = 1;
  static constexpr int kTokenBytes = kMaxTile * static_cast<int>(sizeof(std::int64_t));
  static constexpr int kSharedBytes =
      Products::kStageBytes + Products::kTileBytes + 2 * kTokenBytes;
  static constexpr int kRowsPerWarp = kMaxTile / (kThreads / kWarp);

  static __device__ void run(const SelectionArguments& a) {
    const SelectionParams& call = a.call;
    char* const stage = shared_memory();
    T* const logits = reinterpret_cast<T*>(stage + Products::kStageBytes);
    auto* const rows =
        reinterpret_cast<std::int64_t*>(stage + Products::kStageBytes + Products::kTileBytes);
    std::int64_t* const keys = rows + kMaxTile;
    const std::int64_t tiles = (call.n_q + kMaxTile - 1) / kMaxTile,
                       heads = call.batch * call.heads;
    // The last tiles first: of causal ones they take the longest.
    const std::int64_t number = std::int64_t{blockIdx.x} % heads,
                       first = (tiles - 1 - std::int64_t{blockIdx.x} / heads) * kMaxTile;
    const std::int64_t batch = number / call.heads, head = number % call.heads;
    const TileRows<S> query{head_of<const S>(call.query, batch, head), rows,
                            static_cast<int>(call.head_dim)};
    const TileRows<S> key{head_of<const S>(call.key, batch, head / (call.heads / call.heads_kv)),
                          keys, static_cast<int>(call.head_dim)};
    const int thread = static_cast<int>(threadIdx.x), own = warp_number() * kRowsPerWarp;
    if (thread < kMaxTile) rows[thread] = first + thread < call.n_q ? first + thread : -1;

    typename Visitor::Row states[kRowsPerWarp];
#pragma unroll
    for (int r = 0; r < kRowsPerWarp; ++r) {
      const std::int64_t i = first + own + r;
      if (i < call.n_q) states[r] = Visitor::begin(a, number * call.n_q + i);
    }
    const std::int64_t left = call.n_q - first, last = first + (left < kMaxTile ? left : kMaxTile);
    const std::int64_t end = end_of(call, last - 1);
    for (std::int64_t j = 0; j < end; j += kMaxTile) {
      sync_threads();  // all are done with the keys before
      if (thread < kMaxTile) keys[thread] = key_at(call, batch, j + thread);
      typename Products::Logits d;
      Products::rows_by_rows(d, query, key, stage);
      Products::store(logits, d);
      sync_threads();
#pragma unroll
      for (int r = 0; r < kRowsPerWarp; ++r) {
        const std::int64_t i = first + own + r;
        if (i >= call.n_q) continue;
        T of_lane[2];
        std::int64_t key_of_lane[2];
        bool seen[2];
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          const int column = lane_number() + c * kWarp;
          of_lane[c] = *Products::at(logits, own + r, column) * static_cast<T>(call.scale);
          key_of_lane[c] = keys[column];
          seen[c] = key_of_lane[c] >= 0 && key_of_lane[c] < end_of(call, i);
        }
        Visitor::visit(a, states[r], number * call.n_q + i, of_lane, key_of_lane, seen);
      }
    }
#pragma unroll
    for (int r = 0; r < kRowsPerWarp; ++r) {
      const std::int64_t i = first + own + r;
      if (i < call.n_q) Visitor::finish(a, states[r], number * call.n_q + i);
    }
  }

 private:
  /// The first key that a query does not see.
  static __device__ std::int64_t end_of(const SelectionParams& call, std::int64_t query) {
    const std::int64_t end = call.is_causal ? query + 1 + call.n_k - call.n_q : call.n_k;
    return end < 0 ? 0 : end;
  }
  /// -1 for padded keys and those that there are not.
  static __device__ std::int64_t key_at(const SelectionParams& call, std::int64_t batch,
                                        std::int64_t key) {
    if (key >= call.n_k) return -1;
    const bool padded =
        call.key_padding != nullptr && call.key_padding[batch * call.n_k + key] != 0;
    return padded ? -1 : key;
  }
};

}  // namespace sparse_attn::cuda
