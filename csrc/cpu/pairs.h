// Products and sums over listed pairs: what attention weights that are kept as a sparse matrix, and
// their derivatives, are made of.
//
// A thread owns the rows that it writes and adds in the order of the list, so results are bitwise
// the same for any number of threads.
#pragma once

#include "lists.h"
#include "pair_params.h"
#include "scheduler.h"

namespace {

using sparse_attn::PairParams;

template <class S>
class Pairs {
 public:
  using T = Real<S>;

  explicit Pairs(const PairParams& params)
      : p_(params),
        size_(static_cast<int>(params.size)),
        padded_(round_up(size_, kLanes<T>)),
        heads_(params.batch * params.heads) {}

  static int64_t workspace(const PairParams& params, int threads) {
    Arena arena(nullptr);
    arena.take<T>(threads * Pairs(params).scratch_size());
    return arena.used();
  }

  /// values[e] = rows[i] · columns[col[e]].
  void products(const Parallel& parallel) const {
    for_each_row(parallel, heads_, p_.n_q, [&](T* scratch, int64_t head, int64_t i) {
      const Head<const S> rows = head_of<const S>(p_.rows, p_.heads, head),
                          columns = columns_of(head);
      const int64_t* const crow = p_.crow + head * (p_.n_q + 1) + i;
      T* const row = scratch + kListBlock;
      pack_row<S>(row, rows.data + i * rows.stride, size_, padded_);
      for_each_block(crow[0], crow[1], [&](int64_t first, int count) {
        int32_t list[kListBlock];
        copy(list, p_.col + first, count);
        if (size_ == 1) {
          for (int e = 0; e < count; ++e) scratch[e] = row[0] * number_of(columns, list[e]);
        } else {
          dots<S>(row, columns, list, count, size_, scratch);
        }
        copy(static_cast<T*>(p_.values) + first, scratch, count);
      });
    });
  }

  /// rows[i] = Σ_e values[e] · columns[col[e]].
  void sums(const Parallel& parallel) const {
    for_each_row(parallel, heads_, p_.n_q, [&](T* scratch, int64_t head, int64_t i) {
      const Head<S> rows = head_of<S>(p_.rows, p_.heads, head);
      const Head<const S> columns = columns_of(head);
      const int64_t* const crow = p_.crow + head * (p_.n_q + 1) + i;
      T* const sum = scratch + kListBlock;
      fill_zero(sum, padded_);
      for_each_block(crow[0], crow[1], [&](int64_t first, int count) {
        int32_t list[kListBlock];
        copy(list, p_.col + first, count);
        add(sum, values() + first, columns, list, count);
      });
      unpack_row<S>(rows.data + i * rows.stride, sum, size_);
    });
  }

  /// columns[j] = Σ_e values[e] · rows[i] over the pairs e = (i, j) of all heads that share j.
  void column_sums(const Parallel& parallel) const {
    const int64_t group = p_.heads / p_.heads_kv;
    for_each_row(parallel, p_.batch * p_.heads_kv, p_.n_k,
                 [&](T* scratch, int64_t head_kv, int64_t j) {
                   const Head<S> columns = head_of<S>(p_.columns, p_.heads_kv, head_kv);
                   T* const sum = scratch + kListBlock;
                   fill_zero(sum, padded_);
                   for (int64_t head = head_kv * group; head < (head_kv + 1) * group; ++head) {
                     const Head<const S> rows = head_of<const S>(p_.rows, p_.heads, head);
                     const int64_t* const starts = p_.starts + head * (p_.n_k + 1) + j;
                     for_each_block(starts[0], starts[1], [&](int64_t first, int count) {
                       for (int e = 0; e < count; ++e) scratch[e] = values()[p_.entries[first + e]];
                       add(sum, scratch, rows, p_.queries + first, count);
                     });
                   }
                   unpack_row<S>(columns.data + j * columns.stride, sum, size_);
                 });
  }

 private:
  /// sum += Σ_e weights[e] · rows[list[e]].
  void add(T* sum, const T* weights, Head<const S> rows, const int32_t* list, int count) const {
    if (size_ != 1) return combine<S>(sum, T{1}, weights, rows, list, count, size_);
    T part{0};
    for (int e = 0; e < count; ++e) part += weights[e] * number_of(rows, list[e]);
    sum[0] += part;
  }

  /// Of rows of a single number, which whole vectors take three times as long for.
  static T number_of(Head<const S> rows, int64_t i) {
    return load_real_part(rows.data + i * rows.stride, 1)[0];
  }

  /// A block of values, then a row.
  int64_t scratch_size() const { return kListBlock + padded_; }

  const T* values() const { return static_cast<const T*>(p_.values); }

  Head<const S> columns_of(int64_t head) const {
    return head_of<const S>(p_.columns, p_.heads_kv, head / (p_.heads / p_.heads_kv));
  }

  template <class To, class From>
  static void copy(To* to, const From* from, int count) {
    for (int i = 0; i < count; ++i) to[i] = static_cast<To>(from[i]);
  }

  /// Calls body(scratch, head, row) for each row of each head.
  template <class Body>
  void for_each_row(const Parallel& parallel, int64_t heads, int64_t rows, const Body& body) const {
    const int64_t shares = list_shares(heads, rows);
    for_each_item(parallel, heads * shares, [&](int thread, int64_t item) {
      T* const scratch = static_cast<T*>(p_.workspace) + thread * scratch_size();
      const Share share(rows, item % shares, shares);
      for (int64_t i = share.begin; i < share.end; ++i) body(scratch, item / shares, i);
    });
  }

  /// Calls body(first, count) for at most kListBlock of [begin, end) at a time.
  template <class Body>
  static void for_each_block(int64_t begin, int64_t end, const Body& body) {
    for (; begin < end; begin += kListBlock)
      body(begin, static_cast<int>(end - begin < kListBlock ? end - begin : kListBlock));
  }

  const PairParams& p_;
  const int size_, padded_;
  const int64_t heads_;
};

}  // namespace
