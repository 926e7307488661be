// Causal linear attention: products of queries with the running sum of key value^T.
//
// A chunk of 64 tokens is two small attentions: its queries over its own keys, with a mask, and
// over the sum of all keys before, a matrix of (size, value_dim). Heads that are few are cut into
// segments, by sizes only: their sums, then the sums before each, then all segments at once.
#pragma once

#include "gemm.h"
#include "linear_params.h"
#include "scheduler.h"
#include "tile.h"

namespace {

using sparse_attn::ProductParams;

template <class S>
class CausalProducts {
 public:
  using T = Real<S>;

  explicit CausalProducts(const ProductParams& params)
      : p_(params),
        heads_(params.batch * params.heads),
        offset_(params.n_k - params.n_q),
        first_(offset_ < 0 ? -((kMaxTile - 1 - offset_) / kMaxTile) : 0),
        chunks_((params.n_k + kMaxTile - 1) / kMaxTile - first_),
        size_(static_cast<int>(params.size)),
        padded_size_(round_up(size_, kLanes<T>)),
        value_dim_(static_cast<int>(params.value_dim)),
        padded_value_(round_up(value_dim_, kLanes<T>)),
        state_size_(int64_t{size_} * padded_value_) {
    const int64_t wanted = (kItems + heads_ - 1) / heads_, most = chunks_ / kLeastChunks;
    segments_ = wanted < most ? wanted : most;
    if (segments_ < 1) segments_ = 1;
  }

  int64_t layout(void* base, int threads) {
    Arena arena(base);
    sums_ = arena.take<T>(heads_ * (segments_ - 1) * state_size_);
    scratch_ = arena.take<T>(threads * scratch_size());
    return arena.used();
  }

  void run(const Parallel& parallel) {
    layout(p_.workspace, parallel.threads);
    for_each_item(parallel, heads_ * (segments_ - 1), [&](int thread, int64_t item) {
      T* const sum = sums_ + item * state_size_;
      fill_zero(sum, state_size_);
      for_each_chunk(item / (segments_ - 1), item % (segments_ - 1), thread,
                     [&](const Chunk& chunk, const Scratch& s) { add_keys(chunk, s, sum); });
    });
    for_each_item(parallel, segments_ > 2 ? heads_ : 0, [&](int, int64_t head) {
      T* const sums = sums_ + head * (segments_ - 1) * state_size_;
      for (int64_t i = state_size_; i < (segments_ - 1) * state_size_; i += kLanes<T>)
        store(sums + i, load(sums + i) + load(sums + i - state_size_));
    });
    for_each_item(parallel, heads_ * segments_, [&](int thread, int64_t item) {
      const int64_t head = item / segments_, segment = item % segments_;
      T* const state = Scratch(*this, thread).state;
      const T* const before = sums_ + (head * (segments_ - 1) + segment - 1) * state_size_;
      for (int64_t i = 0; i < state_size_; i += kLanes<T>)
        store(state + i, segment > 0 ? load(before + i) : Vec<T>{});
      for_each_chunk(head, segment, thread, [&](const Chunk& chunk, const Scratch& s) {
        attend(chunk, s);
        if (!chunk.last) add_keys(chunk, s, s.state);
      });
    });
  }

 private:
  /// Heads and segments that are enough to share among threads, and chunks that are worth a segment
  /// of their own: each but the last of a head has its keys added twice.
  static constexpr int64_t kItems = 16;
  static constexpr int64_t kLeastChunks = 8;

  struct Chunk {
    Head<const S> query, key, value;
    Head<S> output;
    Tile queries, keys;
    int shift;  // the first query stands at the key of this number, counted from the first
    bool last;  // nothing comes after
  };

  /// Of a thread.
  struct Scratch {
    Scratch(const CausalProducts& of, int thread) {
      state = of.scratch_ + thread * of.scratch_size();
      query = state + of.state_size_;
      key = query + kMaxTile * of.padded_size_;
      transposed = key + kMaxTile * of.padded_size_;
      value = transposed + kMaxTile * of.padded_size_;
      output = value + kMaxTile * of.padded_value_;
      scores = output + kMaxTile * of.padded_value_;
    }
    T *state, *query, *key, *transposed, *value, *output, *scores;
  };
  int64_t scratch_size() const {
    return state_size_ + kMaxTile * (3 * padded_size_ + 2 * padded_value_ + kMaxTile);
  }

  template <class Body>
  void for_each_chunk(int64_t head, int64_t segment, int thread, const Body& body) const {
    const Scratch scratch(*this, thread);
    const int64_t begin = chunks_ * segment / segments_, end = chunks_ * (segment + 1) / segments_;
    for (int64_t i = begin; i < end; ++i) {
      body(chunk(head, first_ + (p_.reverse ? chunks_ - 1 - i : i), i == chunks_ - 1), scratch);
    }
  }

  /// The tokens at positions from kMaxTile * number on; those of queries may be negative.
  Chunk chunk(int64_t head, int64_t number, bool last) const {
    const int64_t begin = number * kMaxTile,
                  end = begin + kMaxTile < p_.n_k ? begin + kMaxTile : p_.n_k;
    const Tile queries = tokens(begin - offset_, end - offset_), keys = tokens(begin, end);
    return {head_of<const S>(p_.query, p_.heads, head),
            head_of<const S>(p_.key, p_.heads, head),
            head_of<const S>(p_.value, p_.heads, head),
            head_of<S>(p_.output, p_.heads, head),
            queries,
            keys,
            static_cast<int>(queries.start + offset_ - keys.start),
            last};
  }

  static Tile tokens(int64_t begin, int64_t end) {
    if (begin < 0) begin = 0;
    return {begin, 1, static_cast<int>(end > begin ? end - begin : 0), -1};
  }

  static Rows<T> rows(Head<const S> head, const Tile& tile, int size, T* buffer) {
    if (tile.count == 0) return {buffer, 0};
    return whole_vector_rows(head, tile, nullptr, size, all_rows(tile.count), buffer);
  }

  /// sum += keyᵀ value.
  void add_keys(const Chunk& c, const Scratch& s, T* sum) const {
    const Rows<T> key = rows(c.key, c.keys, size_, s.key),
                  value = rows(c.value, c.keys, value_dim_, s.value);
    gemm(size_, padded_value_ / kLanes<T>, c.keys.count, Operand<T, false>{key.data, key.stride},
         value.data, value.stride, AddTo<T>{sum, padded_value_});
  }

  /// output = mask(query keyᵀ) value + query state.
  void attend(const Chunk& c, const Scratch& s) const {
    if (c.queries.count == 0) return;
    const Rows<T> query = rows(c.query, c.queries, size_, s.query),
                  key = rows(c.key, c.keys, size_, s.key),
                  value = rows(c.value, c.keys, value_dim_, s.value);
    const Operand<T, true> by_row{query.data, query.stride};
    transpose_rows<T>(s.transposed, kMaxTile, key, c.keys.count, padded_size_, T{1});
    const int vectors = round_up(c.keys.count, kLanes<T>) / kLanes<T>;
    if (p_.reverse) {
      gemm(c.queries.count, vectors, size_, by_row, s.transposed, kMaxTile,
           Masked<true>{s.scores, c.shift});
    } else {
      gemm(c.queries.count, vectors, size_, by_row, s.transposed, kMaxTile,
           Masked<false>{s.scores, c.shift});
    }
    const int columns = padded_value_ / kLanes<T>;
    gemm(c.queries.count, columns, c.keys.count, Operand<T, true>{s.scores, kMaxTile}, value.data,
         value.stride, SetTo<T>{s.output, padded_value_});
    gemm(c.queries.count, columns, size_, by_row, s.state, padded_value_,
         AddTo<T>{s.output, padded_value_});
    for (int i = 0; i < c.queries.count; ++i) {
      unpack_row(c.output.row(c.queries, nullptr, i), s.output + i * padded_value_, value_dim_);
    }
  }

  /// Scores of the keys up to the query's own, or from it on; 0 for the others.
  template <bool kReverse>
  struct Masked {
    T* scores;
    int shift;
    SPARSE_ATTN_INLINE void operator()(int m, int n, Vec<T> sum) const {
      using Lane = typename VecTypes<T>::IntLane;
      IntVec<T> key;
#pragma GCC unroll 16
      for (int i = 0; i < kLanes<T>; ++i) key[i] = Lane{i};
      const IntVec<T> own = static_cast<Lane>(m + shift - n * kLanes<T>) - IntVec<T>{};
      const auto seen = kReverse ? key >= own : key <= own;
      store(scores + m * kMaxTile + n * kLanes<T>, seen ? sum : Vec<T>{});
    }
  };

  const ProductParams& p_;
  int64_t heads_;
  int64_t offset_;
  int64_t first_;   // chunk; negative if queries stand before the first key
  int64_t chunks_;  // of a head
  int size_, padded_size_, value_dim_, padded_value_;
  int64_t state_size_;
  int64_t segments_ = 1;
  T* sums_ =
      nullptr;  // (heads, segments - 1, size, padded value): of the segments, then up to them
  T* scratch_ = nullptr;
};

}  // namespace
