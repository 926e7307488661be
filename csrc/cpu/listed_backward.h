// Backward for the pairs that no tile holds, in two sweeps that each own what they add to: over the
// queries for dQ, over the keys, by the transposed lists, for dK and dV. Both recompute
// P = exp(S - lse) and dS = P ∘ (dP - delta).
#pragma once

#include "lists.h"
#include "scheduler.h"
#include "softmax.h"

namespace {

template <class S>
class ListedBackward {
 public:
  using T = Real<S>;

  struct Scratch {
    Scratch(Arena& arena, const AttentionParams& params)
        : Scratch(arena, static_cast<int>(params.head_dim), static_cast<int>(params.value_dim)) {}
    Scratch(Arena& arena, int d, int dv)
        : row(arena.take<T>(round_up(d, kLanes<T>))),
          other(arena.take<T>(round_up(dv, kLanes<T>))),
          sum(arena.take<T>(round_up(d, kLanes<T>))),
          other_sum(arena.take<T>(round_up(dv, kLanes<T>))),
          p(arena.take<T>(kListBlock)),
          ds(arena.take<T>(kListBlock)),
          lse(arena.take<T>(kListBlock)),
          delta(arena.take<T>(kListBlock)),
          modifiers(arena) {}

    T* row;        // a query or a key, scaled
    T* other;      // its output gradient or value
    T* sum;        // dQ or dK
    T* other_sum;  // dV
    T* p;          // [item of the list]
    T* ds;
    T* lse;
    T* delta;
    ListedModifiers<T> modifiers;
  };

  /// `delta` is room for (batch, heads, n_q).
  ListedBackward(const AttentionParams& params, T* delta)
      : p_(params),
        d_(static_cast<int>(params.head_dim)),
        dv_(static_cast<int>(params.value_dim)),
        delta_(delta) {}

  /// Adds to the rows of dQ, and leaves delta for the other sweep.
  void queries(Scratch& scratch, int64_t head, Head<T> grad_query, const Share& share) const {
    const auto& lists = p_.plans[head]->keys_of_query;
    if (!lists.starts) return;
    const Operands of(*this, head);
    scratch.modifiers.start(p_, head);
    for_each_part(lists, share, of.padding, [&](const ListPart& part) {
      const int64_t i = part.row;
      const T lse = of.lse[i];
      if (part.first) of.delta[i] = T{0};
      if (lse == -kInfinity<T>) return;
      load_row(scratch.other, of.grad_output, i, dv_, T{1});
      if (part.first) of.delta[i] = delta_of(scratch.other, of, i);
      if (part.count == 0) return;
      load_row(scratch.row, of.query, i, d_, static_cast<T>(p_.scale));
      fill_zero(scratch.sum, round_up(d_, kLanes<T>));
      for (int k = 0; k < part.count; ++k) {
        scratch.lse[k] = lse;
        scratch.delta[k] = of.delta[i];
      }
      logit_gradients(scratch, of.key, of.value, part.items, part.count,
                      [&](int k) { return ListedPair{i, part.items[k]}; });
      combine<S>(scratch.sum, T{1}, scratch.ds, of.key, part.items, part.count, d_);
      add(grad_query.data + i * grad_query.stride, scratch.sum, d_);
    });
  }

  /// Adds to the rows of dK and dV what one query head contributes.
  void keys(Scratch& scratch, int64_t head, Head<T> grad_key, Head<T> grad_value,
            const Share& share) const {
    const auto& lists = p_.plans[head]->queries_of_key;
    if (!lists.starts) return;
    const Operands of(*this, head);
    scratch.modifiers.start(p_, head);
    for_each_part(lists, share, nullptr, [&](const ListPart& part) {
      const int64_t j = part.row;
      if (of.padding && of.padding[j]) return;
      int32_t list[kListBlock];  // without queries that see no key, whatever they hold
      int count = 0;
      for (int i = 0; i < part.count; ++i) {
        const int32_t query = part.items[i];
        if (of.lse[query] == -kInfinity<T>) continue;
        list[count] = query;
        scratch.lse[count] = of.lse[query];
        scratch.delta[count++] = of.delta[query];
      }
      if (count == 0) return;
      load_row(scratch.row, of.key, j, d_, static_cast<T>(p_.scale));
      load_row(scratch.other, of.value, j, dv_, T{1});
      fill_zero(scratch.sum, round_up(d_, kLanes<T>));
      fill_zero(scratch.other_sum, round_up(dv_, kLanes<T>));
      logit_gradients(scratch, of.query, of.grad_output, list, count,
                      [&](int k) { return ListedPair{list[k], j}; });
      combine<S>(scratch.sum, T{1}, scratch.ds, of.query, list, count, d_);
      combine<S>(scratch.other_sum, T{1}, scratch.p, of.grad_output, list, count, dv_);
      add(grad_key.data + j * grad_key.stride, scratch.sum, d_);
      add(grad_value.data + j * grad_value.stride, scratch.other_sum, dv_);
    });
  }

 private:
  /// What one query head reads.
  struct Operands {
    Operands(const ListedBackward& b, int64_t head)
        : query(head_of<const S>(b.p_.query, b.p_.heads, head)),
          grad_output(head_of<const S>(b.p_.grad_output, b.p_.heads, head)),
          output(head_of<const S>(b.p_.output, b.p_.heads, head)),
          key(head_of<const S>(b.p_.key, b.p_.heads_kv, head / (b.p_.heads / b.p_.heads_kv))),
          value(head_of<const S>(b.p_.value, b.p_.heads_kv, head / (b.p_.heads / b.p_.heads_kv))),
          padding(b.p_.key_padding ? b.p_.key_padding + head / b.p_.heads * b.p_.n_k : nullptr),
          lse(static_cast<const T*>(b.p_.lse) + head * b.p_.n_q),
          grad_lse(b.p_.grad_lse ? static_cast<const T*>(b.p_.grad_lse) + head * b.p_.n_q
                                 : nullptr),
          delta(b.delta_ + head * b.p_.n_q) {}

    Head<const S> query, grad_output, output, key, value;
    const uint8_t* padding;
    const T* lse;
    const T* grad_lse;
    T* delta;
  };

  static void load_row(T* to, Head<const S> rows, int64_t i, int size, T factor) {
    const int padded = round_up(size, kLanes<T>);
    pack_row<S>(to, rows.data + i * rows.stride, size, padded);
    scale_row(to, factor, padded);
  }

  /// rowsum(dO ∘ O) less the gradient of the log-sum-exp.
  T delta_of(const T* grad_output, const Operands& of, int64_t i) const {
    Vec<T> products[1] = {};
    add_products<S>(products, grad_output, {of.output.data + i * of.output.stride}, dv_);
    T total{0};
    for (int l = 0; l < kLanes<T>; ++l) total += products[0][l];
    return of.grad_lse ? total - of.grad_lse[i] : total;
  }

  /// P and dS of the row at hand with the listed ones: `rows` are on the side of keys or queries,
  /// `others` on that of values or output gradients.
  template <class Pair>
  void logit_gradients(Scratch& scratch, Head<const S> rows, Head<const S> others,
                       const int32_t* list, int count, const Pair& pair) const {
    dots<S>(scratch.row, rows, list, count, d_, scratch.p);
    dots<S>(scratch.other, others, list, count, dv_, scratch.ds);
    const ListedModifiers<T>& modifiers = scratch.modifiers;
    if (modifiers.exist) scratch.modifiers.load(count, pair);
    for (int i = 0; i < count; i += kLanes<T>) {
      sparse_attn::Logit<Vec<T>> s{load(scratch.p + i), broadcast(T{1}), {}};
      Vec<T> kept = broadcast(T{1});
      if (modifiers.exist) {
        s = modifiers.logits(i, s.value);
        kept = load(modifiers.kept + i);
      }
      const Vec<T> p = probability<T>(s.value, load(scratch.lse + i));
      const Vec<T> ds = p * (load(scratch.ds + i) * kept - load(scratch.delta + i));
      store(scratch.p + i, p * kept);
      store(scratch.ds + i, ds * s.by_score * static_cast<T>(p_.scale));
    }
  }

  static void add(T* to, const T* row, int size) {
    for (int c = 0; c < size; ++c) to[c] += row[c];
  }

  const AttentionParams& p_;
  const int d_, dv_;
  T* delta_;
};

}  // namespace
