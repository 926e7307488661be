// Forward for the pairs that no tile holds: each query takes its own list of keys and goes on from
// the softmax state that the tiles left.
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

/// The rows of one head between sweeps: normalised outputs (unnormalised between the parts of a
/// list), and the softmax states they came from.
template <class T>
struct RowSweep {
  Head<T> output;
  T* maxima;
  T* sums;
};

template <class S>
class ListedForward {
 public:
  using T = Real<S>;

  struct Scratch {
    Scratch(Arena& arena, int d, int dv)
        : query(arena.take<T>(round_up(d, kLanes<T>))),
          output(arena.take<T>(round_up(dv, kLanes<T>))),
          logits(arena.take<T>(kListBlock)),
          modifiers(arena) {}

    T* query;   // scaled
    T* output;  // unnormalised
    T* logits;  // then the probabilities
    ListedModifiers<T> modifiers;
  };

  explicit ListedForward(const AttentionParams& params)
      : p_(params),
        d_(static_cast<int>(params.head_dim)),
        dv_(static_cast<int>(params.value_dim)) {}

  /// The queries of one share.
  void run(Scratch& scratch, int64_t head, const RowSweep<T>& rows, const Share& share) const {
    const auto& lists = p_.plans[head]->keys_of_query;
    if (!lists.starts) return;
    const int64_t head_kv = head / (p_.heads / p_.heads_kv);
    const Head<const S> query = head_of<const S>(p_.query, p_.heads, head),
                        key = head_of<const S>(p_.key, p_.heads_kv, head_kv),
                        value = head_of<const S>(p_.value, p_.heads_kv, head_kv);
    const uint8_t* padding = p_.key_padding ? p_.key_padding + head / p_.heads * p_.n_k : nullptr;
    const int padded = round_up(dv_, kLanes<T>);
    scratch.modifiers.start(p_, head);
    for_each_part(lists, share, padding, [&](const ListPart& part) {
      load_query(scratch, query.data + part.row * query.stride);
      T* output = rows.output.data + part.row * rows.output.stride;
      T &maximum = rows.maxima[part.row], &sum = rows.sums[part.row];
      pack_row<T>(scratch.output, output, dv_, padded);
      if (part.first) scale_row(scratch.output, sum, padded);
      if (part.count > 0) {
        dots<S>(scratch.query, key, part.items, part.count, d_, scratch.logits);
        if (scratch.modifiers.exist) shape(scratch, part);
        const T rescale = update(scratch.logits, part.count, maximum, sum);
        for (int k = 0; scratch.modifiers.exist && k < part.count; ++k)
          scratch.logits[k] *= scratch.modifiers.kept[k];
        combine<S>(scratch.output, rescale, scratch.logits, value, part.items, part.count, dv_);
      }
      if (part.last) normalise_row(scratch.output, sum, padded);
      unpack_row<T>(output, scratch.output, dv_);
    });
  }

 private:
  void load_query(const Scratch& scratch, const S* row) const {
    const int padded = round_up(d_, kLanes<T>);
    pack_row<S>(scratch.query, row, d_, padded);
    scale_row(scratch.query, static_cast<T>(p_.scale), padded);
  }

  /// Scores of a part -> logits.
  static void shape(Scratch& scratch, const ListPart& part) {
    scratch.modifiers.load(part.count, [&](int k) { return ListedPair{part.row, part.items[k]}; });
    for (int k = 0; k < part.count; k += kLanes<T>)
      store(scratch.logits + k, scratch.modifiers.logits(k, load(scratch.logits + k)).value);
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

  const AttentionParams& p_;
  const int d_, dv_;
};

}  // namespace
