// What a call does to logits besides the scale, by tables of gates and biases and a soft cap, and
// to probabilities, by dropout.
#pragma once

#include "cuda/scalar.cuh"
#include "cuda/tiles.cuh"
#include "dropout.h"
#include "logit.h"

namespace sparse_attn::cuda {

/// For logit.h.
struct DeviceMath {
  static SPARSE_ATTN_HOST_DEVICE_INLINE float tanh(float x) { return tanhf(x); }
  static SPARSE_ATTN_HOST_DEVICE_INLINE double tanh(double x) { return ::tanh(x); }
};

/// The tables of one head of queries.
template <class T>
class HeadLogits {
 public:
  __device__ HeadLogits(const AttentionParams& call, std::int64_t batch, std::int64_t head)
      : call_(call),
        window_(call.modifiers.window(head, call.heads)),
        bias_(first_number(call.modifiers.bias, batch, head)),
        gate_(first_number(call.modifiers.gate, batch, head)) {}

  __device__ PairPlace pair(std::int64_t query, std::int64_t key) const {
    return call_.place(query, key);
  }

  /// Products q · k become logits, and `slopes` their derivatives in scale · q · k.
  /// `pairs(row, at)` gives the pairs of a row of `x`, all of tokens that there are, or returns
  /// false to leave the row out. The loop is not unrolled, which keeps the code small; what it
  /// indexes lies in local memory, so registers are free meanwhile.
  template <int kRows, int kCount, class Pairs>
  __device__ void shape(T (&x)[kRows][kCount], T (&slopes)[kRows][kCount], Pairs pairs) const {
    T values[kRows][kCount];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) values[r][i] = x[r][i];
    }
#pragma unroll 1
    for (int r = 0; r < kRows; ++r) {
      PairPlace at[kCount];
      if (pairs(r, at)) shape_row(values[r], slopes[r], at);
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) x[r][i] = values[r][i];
    }
  }

  /// The same for a few pairs, whose numbers are loaded side by side. One with a bias of -inf is
  /// out, whatever its product is.
  template <int kCount>
  __device__ void shape_row(T (&x)[kCount], T (&slopes)[kCount],
                            const PairPlace (&at)[kCount]) const {
    const T scale = static_cast<T>(call_.scale), cap = static_cast<T>(call_.modifiers.softcap);
    const T excluded = static_cast<T>(-kInfinity);
    T gates[kCount], biases[kCount];
    load(gates, call_.modifiers.gate, gate_, T{1}, at);
    load(biases, call_.modifiers.bias, bias_, T{0}, at);
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const Logit<T> logit = logit_of<DeviceMath>(x[i] * scale, gates[i], biases[i], cap);
      x[i] = biases[i] == excluded ? excluded : logit.value;
      slopes[i] = biases[i] == excluded ? T{0} : logit.by_score;
    }
  }

 private:
  static __device__ const T* first_number(const LogitTable& table, std::int64_t batch,
                                          std::int64_t head) {
    return static_cast<const T*>(table.data) + batch * table.batch_stride +
           head * table.head_stride;
  }

  /// Without branches from pair to pair, in the common cases without divisions as well.
  template <int kCount>
  __device__ void load(T (&numbers)[kCount], const LogitTable& table, const T* first, T missing,
                       const PairPlace (&at)[kCount]) const {
    LogitTable known = table;
    switch (table.kind) {
      case TableKind::kSlopes:
        known.kind = TableKind::kSlopes;
        return load_known(numbers, known, window_, first, missing, at);
      case TableKind::kSlots:
        known.kind = TableKind::kSlots;
        if (window_.dilation == 1)
          return load_known(numbers, known, {window_.left, 1}, first, missing, at);
        return load_known(numbers, known, window_, first, missing, at);
      case TableKind::kBlocks:
        known.kind = TableKind::kBlocks;
        if (table.block != 1) return load_known(numbers, known, window_, first, missing, at);
        known.block = 1;
        return load_known(numbers, known, window_, first, missing, at);
      case TableKind::kNone:
        break;
    }
#pragma unroll
    for (T& number : numbers) number = missing;
  }

  template <int kCount>
  static __device__ void load_known(T (&numbers)[kCount], const LogitTable& table,
                                    const SlotWindow& window, const T* first, T missing,
                                    const PairPlace (&at)[kCount]) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const std::int64_t offset = table_offset(table, window, at[i]);
      const T number = first[offset < 0 ? 0 : offset];
      numbers[i] = offset < 0 ? missing : number * static_cast<T>(table_factor(table, at[i]));
    }
  }

  const AttentionParams& call_;
  const SlotWindow window_;
  const T* const bias_;
  const T* const gate_;
};

/// weights = P ∘ slopes, or P without them; 0 where P is, whatever a masked pair's product was.
template <class T, int kRows, int kCount>
__device__ inline void weigh(T (&weights)[kRows][kCount], const T (&p)[kRows][kCount],
                             const T (&slopes)[kRows][kCount], bool has_slopes) {
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
#pragma unroll
    for (int i = 0; i < kCount; ++i)
      weights[r][i] = has_slopes && p[r][i] != T{0} ? p[r][i] * slopes[r][i] : p[r][i];
  }
}

/// The draws of one head of queries.
class HeadDropout {
 public:
  const WholeTokens& whole;

  __device__ HeadDropout(const AttentionParams& call, std::int64_t batch, std::int64_t head)
      : whole(call.whole),
        rule_{static_cast<std::uint64_t>(*call.modifiers.dropout_seed),
              dropout_threshold(call.modifiers.dropout_p)},
        head_(batch * call.heads + head) {}

  __device__ bool keeps(std::int64_t query, std::int64_t key) const {
    return rule_.keeps(head_, whole.query(query), whole.key(key));
  }
  /// A bit for each key of the aligned run that `key` is in, by numbers of the whole.
  __device__ unsigned kept_of_run(std::int64_t query, std::int64_t key) const {
    const Random4 random = rule_.draw(head_, query, key);
    unsigned bits = 0;
#pragma unroll
    for (int i = 0; i < kDropoutKeys; ++i)
      bits |= static_cast<unsigned>(rule_.keeps(random, i)) << i;
    return bits;
  }

 private:
  const DropoutRule rule_;
  const std::int64_t head_;
};

/// What probabilities that are kept are multiplied with.
template <class T>
__device__ inline T keep_factor(const Modifiers& modifiers) {
  const double kept = 1.0 - modifiers.dropout_p;
  return kept > 0.0 ? static_cast<T>(1.0 / kept) : T{0};
}

/// Rows (or keys) of a tile from `first` on, a multiple of kDropoutKeys.
struct TilePart {
  int first = 0;
  int count = kMaxTile;
};

/// Draws for each pair of parts of two tiles: bit k of the word of row r is set where dropout keeps
/// key k. The words are there after a barrier. A thread has some rows and kDropoutKeys keys of each
/// at a time: one draw, where these are tokens of one aligned run.
__device__ inline void load_keeps(std::uint64_t* words, const HeadDropout& dropout,
                                  const std::int64_t* list, const Tile& rows,
                                  const TilePart& of_rows, const Tile& keys,
                                  const TilePart& of_keys) {
  static_assert(kDropoutKeys == 8, "a byte of a word");
  auto* const bytes = reinterpret_cast<std::uint8_t*>(words);
  const int row_bytes = of_keys.count / kDropoutKeys;
  for (int i = static_cast<int>(threadIdx.x); i < of_rows.count * row_bytes;
       i += static_cast<int>(blockDim.x)) {
    const int r = of_rows.first + i / row_bytes;
    const int first = of_keys.first + i % row_bytes * kDropoutKeys;
    if (r >= rows.count) continue;
    const std::int64_t query = dropout.whole.query(token(rows, list, r));
    std::int64_t run = -1;
    unsigned of_run = 0, kept = 0;
#pragma unroll 1
    for (int k = first; k < first + kDropoutKeys && k < keys.count; ++k) {
      const std::int64_t key = dropout.whole.key(token(keys, list, k));
      if (key == kNoToken) continue;
      if (key / kDropoutKeys != run) {
        run = key / kDropoutKeys;
        of_run = dropout.kept_of_run(query, key);
      }
      kept |= (of_run >> key % kDropoutKeys & 1) << (k - first);
    }
    bytes[r * static_cast<int>(sizeof(*words)) + first / kDropoutKeys] =
        static_cast<std::uint8_t>(kept);
  }
}

}  // namespace sparse_attn::cuda
