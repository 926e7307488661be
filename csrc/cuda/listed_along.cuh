// Single pairs of lists, as in listed.cuh: along a tangent of the inputs, and for gradients of
// tables.
#pragma once

#include "cuda/listed.cuh"
#include "cuda/simt_tables.cuh"
#include "cuda/simt_tangent.cuh"

namespace sparse_attn::cuda {

/// A row of a tensor, zero where the call has no such tensor.
template <class S>
__device__ inline void load_row(LaneRow<Real<S>>& row, const TensorView& tensor, std::int64_t batch,
                                std::int64_t head, std::int64_t token, std::int64_t size) {
  row.clear();
  if (tensor.data != nullptr)
    row.load(head_of<const S>(tensor, batch, head).row(token), static_cast<int>(size));
}

/// A query, in the lanes of a warp.
template <class S>
struct ListedQuery {
  using T = Real<S>;
  LaneRow<T> query, query_dot, grad_output;
  RowAlong<T> numbers;

  /// Of one without keys nothing but that is read.
  __device__ ListedQuery(const Arguments& a, std::int64_t batch, std::int64_t head, std::int64_t i)
      : numbers(RowAlong<T>::load(a, first_row_of(a.call, batch, head) + i)) {
    if (numbers.is_none()) return;
    load_row<S>(query, a.call.query, batch, head, i, a.call.head_dim);
    load_row<S>(query_dot, a.call.query_tangent, batch, head, i, a.call.head_dim);
    load_row<S>(grad_output, a.call.grad_output, batch, head, i, a.call.value_dim);
  }
};

template <class S>
struct ListedKey {
  using T = Real<S>;
  LaneRow<T> key, key_dot, value, value_dot;

  /// `head` is that of the keys.
  __device__ ListedKey(const Arguments& a, std::int64_t batch, std::int64_t head, std::int64_t j) {
    load_row<S>(key, a.call.key, batch, head, j, a.call.head_dim);
    load_row<S>(key_dot, a.call.key_tangent, batch, head, j, a.call.head_dim);
    load_row<S>(value, a.call.value, batch, head, j, a.call.value_dim);
    load_row<S>(value_dot, a.call.value_tangent, batch, head, j, a.call.value_dim);
  }
};

template <class S>
__device__ inline PairAlong<Real<S>> logit_of_pair(const HeadAlong<Real<S>>& modifiers,
                                                   const PairPlace& at, const ListedQuery<S>& row,
                                                   const ListedKey<S>& key) {
  return modifiers.logit(at, row.query.dot(key.key),
                         row.query_dot.dot(key.key) + row.query.dot(key.key_dot));
}
template <class S>
__device__ inline GradientAlong<Real<S>> gradient_of_pair(const HeadAlong<Real<S>>& modifiers,
                                                          const PairPlace& at,
                                                          const ListedQuery<S>& row,
                                                          const ListedKey<S>& key) {
  return {logit_of_pair(modifiers, at, row, key), row.numbers, row.grad_output.dot(key.value),
          row.grad_output.dot(key.value_dot)};
}

/// Calls visit(place, key) for the keys of a query's list, without padded ones.
template <class S, class Visit>
__device__ inline void for_each_key(const Arguments& a, const ListWork& work,
                                    const HeadAlong<Real<S>>& modifiers, Visit visit) {
  const HeadWork& at = work.place;
  const std::uint8_t* padding = padding_of(a.call, at.batch);
  work.for_each([&](std::int64_t j) {
    if (padding != nullptr && padding[j] != 0) return;
    visit(modifiers.place(at.number, j), ListedKey<S>(a, at.batch, at.key_head(a.call), j));
  });
}

template <class S>
struct ListedTangent : RowKernel {
  using T = Real<S>;

  static __device__ void run(const Arguments& a) {
    const ListWork work(a, Side::kRows);
    if (!work.found() || (!a.first && work.is_empty())) return;
    const HeadWork& at = work.place;
    const int size = static_cast<int>(a.call.value_dim);
    const TangentRow<T> to(a.rows, row_number(), size);
    const ListedQuery<S> row(a, at.batch, at.head, at.number);
    LaneRow<T> sum;
    sum.clear();
    if (!a.first) sum.load(to.output, size);
    T lse = a.first ? T{0} : *to.lse;
    const HeadAlong<T> modifiers(a.call, at.batch, at.head);
    if (!row.numbers.is_none()) {
      for_each_key<S>(a, work, modifiers, [&](const PairPlace& place, const ListedKey<S>& key) {
        const PairAlong<T> pair = logit_of_pair(modifiers, place, row, key);
        const T p = probability(pair.logit.at.value, row.numbers.lse);
        lse += p * pair.logit.along.value;
        sum.add(p * pair.kept * pair.logit.along.value, key.value);
        sum.add(p * pair.kept, key.value_dot);
      });
    }
    sync_warp();  // all lanes have read the sums
    sum.put(to, size);
    if (lane_number() == 0) *to.lse = lse;
  }
};

template <class S>
struct ListedGradQueryAlong : RowKernel {
  using T = Real<S>;

  static __device__ void run(const Arguments& a) {
    const ListWork work(a, Side::kRows);
    if (!work.found() || (a.grad_query.add && work.is_empty())) return;
    const HeadWork& at = work.place;
    const int head_dim = static_cast<int>(a.call.head_dim);
    const T scale = static_cast<T>(a.call.scale);
    const ListedQuery<S> row(a, at.batch, at.head, at.number);
    const HeadAlong<T> modifiers(a.call, at.batch, at.head);
    LaneRow<T> sum;
    sum.clear();
    if (!row.numbers.is_none()) {
      for_each_key<S>(a, work, modifiers, [&](const PairPlace& place, const ListedKey<S>& key) {
        const GradientAlong<T> pair = gradient_of_pair(modifiers, place, row, key);
        sum.add(pair.score_dot * scale, key.key);
        sum.add(pair.score * scale, key.key_dot);
      });
    }
    sum.put(GradientSink<S>(a, Side::kRows, at, a.grad_query, at.number, head_dim), head_dim);
  }
};

template <class S>
struct ListedGradKeyValueAlong : RowKernel {
  using T = Real<S>;

  static __device__ void run(const Arguments& a) {
    const ListWork work(a, Side::kKeys);
    if (!work.found() || (a.grad_key.add && a.grad_value.add && work.is_empty())) return;
    const HeadWork& at = work.place;
    const int head_dim = static_cast<int>(a.call.head_dim);
    const int value_dim = static_cast<int>(a.call.value_dim);
    const std::uint8_t* padding = padding_of(a.call, at.batch);
    LaneRow<T> sum_key, sum_value;
    sum_key.clear();
    sum_value.clear();
    // A padded key is not read.
    if (padding == nullptr || padding[at.number] == 0) add(a, work, sum_key, sum_value);
    sum_key.put(GradientSink<S>(a, Side::kKeys, at, a.grad_key, at.number, head_dim), head_dim);
    sum_value.put(GradientSink<S>(a, Side::kKeys, at, a.grad_value, at.number, value_dim),
                  value_dim);
  }

 private:
  static __device__ void add(const Arguments& a, const ListWork& work, LaneRow<T>& sum_key,
                             LaneRow<T>& sum_value) {
    const HeadWork& at = work.place;
    const T scale = static_cast<T>(a.call.scale);
    const ListedKey<S> key(a, at.batch, at.key_head(a.call), at.number);
    const std::int64_t end_head = at.head + a.call.heads / a.call.heads_kv;
    for (std::int64_t head = at.head; head < end_head; ++head) {
      const HeadAlong<T> modifiers(a.call, at.batch, head);
      work.for_each([&](std::int64_t i) {
        const ListedQuery<S> row(a, at.batch, head, i);
        if (row.numbers.is_none()) return;
        const GradientAlong<T> pair =
            gradient_of_pair(modifiers, modifiers.place(i, at.number), row, key);
        sum_key.add(pair.score_dot * scale, row.query);
        sum_key.add(pair.score * scale, row.query_dot);
        sum_value.add(pair.kept_p_dot, row.grad_output);
      });
    }
  }
};

/// Calls add(window, place, term) for the pairs of a query's list, in every lane.
template <class S, class Add>
__device__ inline void for_each_term(const TableArguments& a, const HeadWork& at, Add add) {
  const ListWork work(a.sweep, at);
  if (work.is_empty()) return;
  const ListedQuery<S> row(a.sweep, at.batch, at.head, at.number);
  if (row.numbers.is_none()) return;
  const HeadAlong<Real<S>> modifiers(a.sweep.call, at.batch, at.head);
  for_each_key<S>(a.sweep, work, modifiers, [&](const PairPlace& place, const ListedKey<S>& key) {
    add(modifiers.window(), place, table_term(a, gradient_of_pair(modifiers, place, row, key)));
  });
}

/// A warp for each query, as SimtTableEntries.
template <class S>
struct ListedTableEntries : RowKernel {
  using T = Real<S>;

  static __device__ void run(const TableArguments& a) {
    const std::int64_t row = row_number(), number = row / a.tasks;
    if (number >= a.gradient.tables()) return;
    const HeadWork at = HeadWork::of_head(a.sweep.call, Side::kRows, row % a.tasks,
                                          a.gradient.head(number, a.sharer));
    const LogitTable& table = a.gradient.table;
    T* const entries = static_cast<T*>(table.data) + a.gradient.offset(number);
    for_each_term<S>(a, at, [&](const SlotWindow& window, const PairPlace& place, T term) {
      const std::int64_t offset = table_offset(table, window, place);
      if (lane_number() == 0 && offset >= 0) entries[offset] += term;
    });
  }
};

/// As SimtTableSums, with one warp for the rows of each strip or owner.
template <class S>
struct ListedTableSums : RowKernel {
  using T = Real<S>;
  static constexpr int kThreads = kWarp;

  static __device__ void run(const TableArguments& a) {
    const PartialTable partial(a);
    for (std::int64_t item = partial.begin; item < partial.end; ++item) {
      const HeadWork at = partial.place(a, item);
      if (!partial.has(a.sweep.call, at.number, at.number)) continue;
      for_each_term<S>(a, at, [&](const SlotWindow& window, const PairPlace& place, T term) {
        const std::int64_t offset = table_offset(partial.layout, window, place);
        if (lane_number() != 0 || offset < 0) return;
        partial.sums[offset] +=
            static_cast<double>(term) * static_cast<double>(table_factor(partial.layout, place));
      });
    }
  }
};

}  // namespace sparse_attn::cuda
