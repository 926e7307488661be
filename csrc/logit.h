// From a product of query and key to a logit:
//
//   logit = softcap(gate · score) + bias,   score = scale · q · k,   softcap(t) = cap · tanh(t /
//   cap)
//
// with tables for gate and bias, and what follows of it by differentiation. One text for scalars
// and for SIMD vectors, on the host and in kernels.
#pragma once

#include <cstdint>

#include "host_device.h"

namespace sparse_attn {

// ---- tables -------------------------------------------------------------------------------------

enum class TableKind : std::int32_t {
  kNone,
  kSlopes,  // minus the distance times the head's number (ALiBi)
  kSlots,   // a number for each slot of the head's window
  kBlocks,  // a number for each block of queries and block of keys
};

/// (batch, heads, rows, columns) numbers of type Real; strides are 0 where all are alike.
struct LogitTable {
  TableKind kind = TableKind::kNone;
  void* data = nullptr;
  std::int64_t batch_stride = 0;
  std::int64_t head_stride = 0;
  std::int64_t row_stride = 0;
  std::int64_t column_stride = 0;
  std::int64_t columns = 0;
  std::int64_t size = 0;         // of the whole table
  std::int64_t block = 1;        // of kBlocks: the side
  std::int64_t first_query = 0;  // whose row is the first one
};

/// The window whose slots a head's tables have.
struct SlotWindow {
  std::int64_t left;
  std::int64_t dilation;
};

/// A pair by its numbers: query i stands at position i + n_k - n_q.
struct PairPlace {
  std::int64_t query;
  std::int64_t position;
  std::int64_t key;
};

/// Where a pair finds its number from the head's first one on, or -1 if it has none.
SPARSE_ATTN_HOST_DEVICE_INLINE std::int64_t table_offset(const LogitTable& table,
                                                         const SlotWindow& window,
                                                         const PairPlace& at) {
  if (table.kind == TableKind::kSlopes) return 0;
  if (table.kind == TableKind::kBlocks)
    return (at.query - table.first_query) / table.block * table.row_stride +
           at.key / table.block * table.column_stride;
  const std::int64_t distance = at.key - at.position;
  const std::int64_t slot = distance / window.dilation + window.left;
  const bool exact = window.dilation == 1 || distance % window.dilation == 0;
  if (!exact || slot < 0 || slot >= table.columns) return -1;
  return (at.query - table.first_query) * table.row_stride + slot * table.column_stride;
}

/// What a pair's number is multiplied by.
SPARSE_ATTN_HOST_DEVICE_INLINE std::int64_t table_factor(const LogitTable& table,
                                                         const PairPlace& at) {
  if (table.kind != TableKind::kSlopes) return 1;
  const std::int64_t distance = at.key - at.position;
  return distance < 0 ? distance : -distance;
}

// ---- what a call does ---------------------------------------------------------------------------

/// Groups of heads whose windows may differ, in a call with slots.
constexpr int kMostSlotWindows = 32;

/// What a call does to its scores and probabilities.
struct Modifiers {
  LogitTable bias;
  LogitTable gate;
  double softcap = 0.0;                        // 0 = none
  double dropout_p = 0.0;                      // dropped are probabilities, not logits
  const std::int64_t* dropout_seed = nullptr;  // one number, on the device of the tensors
  SlotWindow windows[kMostSlotWindows] = {};   // of equal groups of consecutive heads
  std::int32_t window_count = 1;

  SPARSE_ATTN_HOST_DEVICE_INLINE bool change_logits() const {
    return bias.kind != TableKind::kNone || gate.kind != TableKind::kNone || softcap != 0.0;
  }
  SPARSE_ATTN_HOST_DEVICE_INLINE bool any() const { return change_logits() || dropout_p > 0.0; }
  SPARSE_ATTN_HOST_DEVICE_INLINE const SlotWindow& window(std::int64_t head,
                                                          std::int64_t heads) const {
    return windows[head * window_count / heads];
  }
};

// ---- derivatives --------------------------------------------------------------------------------

/// softcap(t) and its first two derivatives. `Math` has tanh for V.
template <class V>
struct Capped {
  V value, first, second;
};

template <class Math, class V, class T>
SPARSE_ATTN_HOST_DEVICE_INLINE Capped<V> softcapped(V t, T cap) {
  if (cap == T{0}) return {t, V{} + T{1}, V{}};
  const V u = Math::tanh(t / cap), first = T{1} - u * u;
  return {u * cap, first, u * first * (T{-2} / cap)};
}

/// A bias of -inf excludes the pair, whatever its score is.
template <class V, class T>
SPARSE_ATTN_HOST_DEVICE_INLINE V add_bias(V logit, V bias, T) {
  const V lowest = V{} - static_cast<T>(__builtin_inf());
  return bias == lowest ? lowest : logit + bias;
}

/// A logit and its derivatives in the score and in the gate.
template <class V>
struct Logit {
  V value, by_score, by_gate;
};

template <class Math, class V, class T>
SPARSE_ATTN_HOST_DEVICE_INLINE Logit<V> logit_of(V score, V gate, V bias, T cap) {
  const Capped<V> c = softcapped<Math>(gate * score, cap);
  return {add_bias(c.value, bias, cap), gate * c.first, score * c.first};
}

/// The same, and how all three change along a tangent of score, gate and bias.
template <class V>
struct LogitAlong {
  Logit<V> at, along;
};

template <class Math, class V, class T>
SPARSE_ATTN_HOST_DEVICE_INLINE LogitAlong<V> logit_along(V score, V gate, V bias, V score_dot,
                                                         V gate_dot, V bias_dot, T cap) {
  const Capped<V> c = softcapped<Math>(gate * score, cap);
  const V argument_dot = gate * score_dot + gate_dot * score, first_dot = c.second * argument_dot;
  return {{add_bias(c.value, bias, cap), gate * c.first, score * c.first},
          {c.first * argument_dot + bias_dot, gate_dot * c.first + gate * first_dot,
           score_dot * c.first + score * first_dot}};
}

}  // namespace sparse_attn
