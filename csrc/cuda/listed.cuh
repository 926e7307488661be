// The pairs that no tile holds: each query (or key) has its own list of the others, and a warp.
#pragma once

#include "cuda/logits.cuh"
#include "cuda/rows.cuh"
#include "cuda/sinks.cuh"

namespace sparse_attn::cuda {

/// The warp's query or key and its list.
class ListWork {
 public:
  __device__ ListWork(const Arguments& a, Side side)
      : place(HeadWork::heads_first(a.call, side, row_number())) {
    const std::int64_t tokens = side == Side::kRows ? a.call.n_q : a.call.n_k;
    const std::int64_t heads = side == Side::kRows ? a.call.heads : a.call.heads_kv;
    found_ = row_number() < a.call.batch * heads * tokens;
    if (found_) find_list(a);
  }
  __device__ ListWork(const Arguments& a, const HeadWork& place_) : place(place_), found_(true) {
    find_list(a);
  }

  __device__ bool found() const { return found_; }
  __device__ bool is_empty() const { return begin_ == end_; }

  /// Calls visit(token) for each item of the list.
  template <class Visit>
  __device__ void for_each(Visit visit) const {
    for (const std::int32_t* item = begin_; item != end_; ++item) {
      if (*item >= 0) visit(std::int64_t{*item});
    }
  }

  const HeadWork place;

 private:
  __device__ void find_list(const Arguments& a) {
    const ListsView& lists = a.lists[place.plan(a)];
    if (lists.starts == nullptr) return;
    begin_ = lists.items + lists.starts[place.number];
    end_ = lists.items + lists.starts[place.number + 1];
  }

  bool found_;
  const std::int32_t* begin_ = nullptr;
  const std::int32_t* end_ = nullptr;
};

/// A logit, its derivative in the scaled product, and what dropout multiplies the probability with.
template <class T>
struct Pair {
  T logit, slope, keep;
};

/// What a call does to the pairs of one head of queries, one by one. `kModified`: it has modifiers.
template <class T, bool kModified>
class PairModifiers {
 public:
  __device__ PairModifiers(const AttentionParams& call, std::int64_t batch, std::int64_t head)
      : call_(call), batch_(batch), head_(head) {}

  /// From q · k.
  __device__ Pair<T> operator()(T product, std::int64_t query, std::int64_t key) const {
    if constexpr (!kModified) return {product * static_cast<T>(call_.scale), T{1}, T{1}};
    const HeadLogits<T> logits(call_, batch_, head_);
    const PairPlace at[1] = {logits.pair(query, key)};
    T logit[1] = {product}, slope[1];
    logits.shape_row(logit, slope, at);
    return {logit[0], slope[0], keep(query, key)};
  }

 private:
  __device__ T keep(std::int64_t query, std::int64_t key) const {
    if (call_.modifiers.dropout_p == 0.0) return T{1};
    const bool kept = HeadDropout(call_, batch_, head_).keeps(query, key);
    return kept ? keep_factor<T>(call_.modifiers) : T{0};
  }

  const AttentionParams& call_;
  const std::int64_t batch_, head_;
};

/// Goes on from the states of the rows.
template <class S, bool kModified>
struct ListedForward : RowKernel {
  using T = Real<S>;

  static __device__ void run(const Arguments& a) {
    const ListWork work(a, Side::kRows);
    if (!work.found() || (!a.first && work.is_empty())) return;
    const HeadWork& at = work.place;
    const int head_dim = static_cast<int>(a.call.head_dim);
    const int value_dim = static_cast<int>(a.call.value_dim);
    const HeadView<const S> keys = key_head<S>(a.call, at.batch, at.head),
                            values = value_head<S>(a.call, at.batch, at.head);
    const std::uint8_t* padding = padding_of(a.call, at.batch);
    LaneState<T> state;
    state.clear();
    if (!a.first) state.load(state_row<T>(a.rows, row_number(), value_dim), value_dim);
    LaneRow<T> query, key, value;
    query.load(query_head<S>(a.call, at.batch, at.head).row(at.number), head_dim);
    const PairModifiers<T, kModified> modifiers(a.call, at.batch, at.head);
    work.for_each([&](std::int64_t j) {
      if (padding != nullptr && padding[j] != 0) return;
      key.load(keys.row(j), head_dim);
      value.load(values.row(j), value_dim);
      const Pair<T> pair = modifiers(query.dot(key), at.number, j);
      if (pair.logit == static_cast<T>(-kInfinity)) return;
      if (pair.keep != T{1}) value.scale(pair.keep);
      state.merge(pair.logit, T{1}, value);
    });
    state.put(RowSink<S>(a, at.batch, at.head, at.number, false), value_dim);
  }
};

/// One pair of the backward pass: P with dropout, and dS.
template <class T>
struct PairGradient {
  T p, ds;

  __device__ PairGradient(const AttentionParams& call, const Pair<T>& pair,
                          const LaneRow<T>& grad_output, const LaneRow<T>& value, T lse, T delta) {
    p = probability(pair.logit, lse);
    const T dp = grad_output.dot(value);
    ds = p * pair.slope * ((pair.keep == T{0} ? T{0} : dp * pair.keep) - delta) *
         static_cast<T>(call.scale);
    p *= pair.keep;
  }
};

template <class S, bool kModified>
struct ListedGradQuery : RowKernel {
  using T = Real<S>;

  static __device__ void run(const Arguments& a) {
    const ListWork work(a, Side::kRows);
    if (!work.found() || (a.grad_query.add && work.is_empty())) return;
    const HeadWork& at = work.place;
    const int head_dim = static_cast<int>(a.call.head_dim);
    const T lse = static_cast<const T*>(a.call.lse)[row_number()];
    LaneRow<T> sum;
    sum.clear();
    // Of a query without keys nothing is read.
    if (lse != static_cast<T>(-kInfinity)) add(a, work, lse, sum);
    sum.put(GradientSink<S>(a, Side::kRows, at, a.grad_query, at.number, head_dim), head_dim);
  }

 private:
  static __device__ void add(const Arguments& a, const ListWork& work, T lse, LaneRow<T>& sum) {
    const HeadWork& at = work.place;
    const int head_dim = static_cast<int>(a.call.head_dim);
    const int value_dim = static_cast<int>(a.call.value_dim);
    const HeadView<const S> keys = key_head<S>(a.call, at.batch, at.head),
                            values = value_head<S>(a.call, at.batch, at.head);
    const std::uint8_t* padding = padding_of(a.call, at.batch);
    const T delta = static_cast<const T*>(a.delta)[row_number()];
    LaneRow<T> query, key, grad_output, value;
    query.load(query_head<S>(a.call, at.batch, at.head).row(at.number), head_dim);
    grad_output.load(grad_output_head<S>(a.call, at.batch, at.head).row(at.number), value_dim);
    const PairModifiers<T, kModified> modifiers(a.call, at.batch, at.head);
    work.for_each([&](std::int64_t j) {
      if (padding != nullptr && padding[j] != 0) return;
      key.load(keys.row(j), head_dim);
      value.load(values.row(j), value_dim);
      const Pair<T> pair = modifiers(query.dot(key), at.number, j);
      sum.add(PairGradient<T>(a.call, pair, grad_output, value, lse, delta).ds, key);
    });
  }
};

template <class S, bool kModified>
struct ListedGradKeyValue : RowKernel {
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
    const int head_dim = static_cast<int>(a.call.head_dim);
    const int value_dim = static_cast<int>(a.call.value_dim);
    LaneRow<T> query, key, grad_output, value;
    key.load(key_head<S>(a.call, at.batch, at.head).row(at.number), head_dim);
    value.load(value_head<S>(a.call, at.batch, at.head).row(at.number), value_dim);
    const std::int64_t end_head = at.head + a.call.heads / a.call.heads_kv;
    for (std::int64_t head = at.head; head < end_head; ++head) {
      const HeadView<const S> queries = query_head<S>(a.call, at.batch, head),
                              grads = grad_output_head<S>(a.call, at.batch, head);
      const PairModifiers<T, kModified> modifiers(a.call, at.batch, head);
      const std::int64_t first_row = first_row_of(a.call, at.batch, head);
      work.for_each([&](std::int64_t i) {
        const T lse = static_cast<const T*>(a.call.lse)[first_row + i];
        if (lse == static_cast<T>(-kInfinity)) return;
        query.load(queries.row(i), head_dim);
        grad_output.load(grads.row(i), value_dim);
        const PairGradient<T> pair(a.call, modifiers(query.dot(key), i, at.number), grad_output,
                                   value, lse, static_cast<const T*>(a.delta)[first_row + i]);
        sum_key.add(pair.ds, query);
        sum_value.add(pair.p, grad_output);
      });
    }
  }
};

}  // namespace sparse_attn::cuda
