// Forward for the pairs that no tile holds: each query takes its own list of keys and goes on from
// the state that the tiles left in its output and log-sum-exp.
#pragma once

#include "lists.h"
#include "scheduler.h"
#include "softmax.h"

namespace {

template <class T>
SPARSE_ATTN_INLINE T log_sum_exp(T maximum, T sum) {
  if (sum == T{0}) return -kInfinity<T>;
  return static_cast<T>(static_cast<double>(maximum) + __builtin_log(static_cast<double>(sum)));
}

template <class S>
class ListedForward {
 public:
  using T = Real<S>;

  struct Scratch {
    Scratch(Arena& arena, int d, int dv)
        : query(arena.take<T>(round_up(d, kLanes<T>))),
          output(arena.take<T>(round_up(dv, kLanes<T>))),
          logits(arena.take<T>(kListBlock)) {}

    T* query;   // scaled
    T* output;  // unnormalised
    T* logits;  // then the probabilities
  };

  explicit ListedForward(const AttentionParams& params)
      : p_(params),
        d_(static_cast<int>(params.head_dim)),
        dv_(static_cast<int>(params.value_dim)) {}

  /// The queries of one share; `output` is where the tiles left their rows.
  void run(const Scratch& scratch, int64_t head, Head<T> output, const Share& share) const {
    const auto& lists = p_.plans[head]->keys_of_query;
    if (!lists.starts) return;
    const int64_t head_kv = head / (p_.heads / p_.heads_kv);
    const Head<const S> query = head_of<const S>(p_.query, p_.heads, head),
                        key = head_of<const S>(p_.key, p_.heads_kv, head_kv),
                        value = head_of<const S>(p_.value, p_.heads_kv, head_kv);
    const uint8_t* padding = p_.key_padding ? p_.key_padding + head / p_.heads * p_.n_k : nullptr;
    T* lse = static_cast<T*>(p_.lse) + head * p_.n_q;
    for (int64_t i = share.begin; i < share.end; ++i) {
      const int32_t *begin = lists.items + lists.starts[i],
                    *end = lists.items + lists.starts[i + 1];
      if (begin == end) continue;
      load_query(scratch, query.data + i * query.stride);
      pack_row<T>(scratch.output, output.data + i * output.stride, dv_, round_up(dv_, kLanes<T>));
      T maximum = lse[i], sum = lse[i] == -kInfinity<T> ? T{0} : T{1};
      for_each_block(begin, end, padding, [&](const int32_t* list, int count) {
        dots<S>(scratch.query, key, list, count, d_, scratch.logits);
        const T rescale = update(scratch.logits, count, maximum, sum);
        combine<S>(scratch.output, rescale, scratch.logits, value, list, count, dv_);
      });
      normalise(scratch.output, sum);
      unpack_row<T>(output.data + i * output.stride, scratch.output, dv_);
      lse[i] = log_sum_exp(maximum, sum);
    }
  }

 private:
  void load_query(const Scratch& scratch, const S* row) const {
    const int padded = round_up(d_, kLanes<T>);
    pack_row<S>(scratch.query, row, d_, padded);
    const T scale = static_cast<T>(p_.scale);
    for (int c = 0; c < padded; c += kLanes<T>)
      store(scratch.query + c, load(scratch.query + c) * scale);
  }

  /// logits -> exp(logits - maximum); returns the factor that the sums so far shrink by.
  static T update(T* logits, int count, T& maximum, T& sum) {
    for (int i = count; i % kLanes<T> != 0; ++i) logits[i] = -kInfinity<T>;
    Vec<T> top = broadcast(maximum);
    for (int i = 0; i < count; i += kLanes<T>) top = max<T>(load(logits + i), top);
    T highest = top[0];
    for (int l = 1; l < kLanes<T>; ++l) highest = top[l] > highest ? top[l] : highest;
    const Vec<T> finite = finite_maximum<T>(broadcast(highest));
    const T rescale = exp<T>(broadcast(maximum) - finite)[0];
    Vec<T> total{};
    for (int i = 0; i < count; i += kLanes<T>) {
      const Vec<T> p = exp<T>(load(logits + i) - finite);
      store(logits + i, p);
      total += p;
    }
    sum *= rescale;
    for (int l = 0; l < kLanes<T>; ++l) sum += total[l];
    maximum = highest;
    return rescale;
  }

  void normalise(T* row, T sum) const {
    const T factor = sum == T{0} ? T{0} : T{1} / sum;
    for (int c = 0; c < dv_; c += kLanes<T>) store(row + c, load(row + c) * factor);
  }

  const AttentionParams& p_;
  const int d_, dv_;
};

}  // namespace
