// keyᵀ value of each head: sums over a long sequence in an order that depends on sizes only, which
// library products with several threads do not promise.
#pragma once

#include "gemm.h"
#include "linear_params.h"
#include "scheduler.h"
#include "tile.h"

namespace {

using sparse_attn::ProductParams;

template <class S>
class OuterSums {
 public:
  using T = Real<S>;

  explicit OuterSums(const ProductParams& params)
      : p_(params),
        heads_(params.batch * params.heads),
        chunks_((params.n_k + kChunk - 1) / kChunk),
        size_(static_cast<int>(params.size)),
        value_dim_(static_cast<int>(params.value_dim)),
        padded_(round_up(value_dim_, kLanes<T>)),
        sums_size_(int64_t{size_} * padded_) {
    const int64_t wanted = (kItems + heads_ - 1) / heads_, most = chunks_ / kLeastChunks;
    parts_ = wanted < most ? wanted : most;
    if (parts_ < 1) parts_ = 1;
  }

  int64_t layout(void* base, int threads) {
    Arena arena(base);
    sums_ = arena.take<T>(heads_ * parts_ * sums_size_);
    scratch_ = arena.take<T>(threads * scratch_size());
    return arena.used();
  }

  void run(const Parallel& parallel) {
    layout(p_.workspace, parallel.threads);
    for_each_item(parallel, heads_ * parts_,
                  [&](int thread, int64_t item) { add_part(item, thread); });
    for_each_item(parallel, heads_, [&](int, int64_t head) {
      T* const sums = sums_ + head * parts_ * sums_size_;
      for (int64_t i = sums_size_; i < parts_ * sums_size_; i += kLanes<T>) {
        T* const to = sums + i % sums_size_;
        store(to, load(to) + load(sums + i));
      }
      const Head<S> output = head_of<S>(p_.output, p_.heads, head);
      for (int row = 0; row < size_; ++row)
        unpack_row(output.data + row * output.stride, sums + int64_t{row} * padded_, value_dim_);
    });
  }

 private:
  static constexpr int kChunk = 256;  // tokens that pass through the level-2 cache together
  // Heads and parts that are enough to share among threads, and chunks that are worth a part.
  static constexpr int64_t kItems = 16;
  static constexpr int64_t kLeastChunks = 2;

  int64_t scratch_size() const { return kChunk * (round_up(size_, kLanes<T>) + padded_); }

  void add_part(int64_t item, int thread) const {
    const int64_t head = item / parts_, part = item % parts_;
    const Head<const S> key = head_of<const S>(p_.key, p_.heads, head),
                        value = head_of<const S>(p_.value, p_.heads, head);
    T* const sums = sums_ + item * sums_size_;
    T* const values = scratch_ + thread * scratch_size();
    fill_zero(sums, sums_size_);
    for (int64_t c = chunks_ * part / parts_; c < chunks_ * (part + 1) / parts_; ++c) {
      const int64_t first = c * kChunk, left = p_.n_k - first;
      const int count = static_cast<int>(left < kChunk ? left : kChunk);
      for (int i = 0; i < count; ++i)
        pack_row<S>(values + i * padded_, value.data + (first + i) * value.stride, value_dim_,
                    padded_);
      const Rows<T> keys = broadcast_rows(key, first, count, values + kChunk * padded_);
      gemm(size_, padded_ / kLanes<T>, count, Operand<T, false>{keys.data, keys.stride}, values,
           padded_, AddTo<T>{sums, padded_});
    }
  }

  /// Elements of keys are broadcast: they need no padding, only the type of the sums.
  Rows<T> broadcast_rows(Head<const S> key, int64_t first, int count, T* buffer) const {
    if constexpr (kSameType<S, T>) {
      return {key.data + first * key.stride, key.stride};
    } else {
      const int padded = round_up(size_, kLanes<T>);
      for (int i = 0; i < count; ++i)
        pack_row<S>(buffer + i * padded, key.data + (first + i) * key.stride, size_, padded);
      return {buffer, padded};
    }
  }

  const ProductParams& p_;
  int64_t heads_, chunks_;
  int size_, value_dim_, padded_;
  int64_t sums_size_, parts_ = 1;
  T* sums_ = nullptr;  // (heads, parts, size, padded)
  T* scratch_ = nullptr;
};

}  // namespace
