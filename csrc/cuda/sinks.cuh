// Where the results of a row go: a slot, the states of the rows, or the tensors.
#pragma once

#include "cuda/scalar.cuh"
#include "cuda/tiles.cuh"

namespace sparse_attn::cuda {

/// Takes the softmax state of a row: as it is, or as output and log-sum-exp.
template <class S>
class RowSink {
  using T = Real<S>;

 public:
  /// Of a task.
  __device__ RowSink(const Arguments& a, const Work& work, int g, int row) {
    if (work.task->slot >= 0) {
      keep_state(state_row<T>(a.slots, work.slot_row(a, g, row), a.call.value_dim));
    } else {
      set_row(a, work.batch, work.head, work.own_token(g, row), a.rows.output == nullptr);
    }
  }
  /// Of a row of the tensors: the end of it, or what the next sweep goes on from.
  __device__ RowSink(const Arguments& a, std::int64_t batch, std::int64_t head, std::int64_t token,
                     bool is_final) {
    set_row(a, batch, head, token, is_final);
  }

  __device__ void put_sums(T maximum, T sum) const {
    if (output_ == nullptr) {
      *state_.maximum = maximum;
      *state_.sum = sum;
    } else {
      *lse_ = sum == T{0} ? static_cast<T>(-kInfinity) : maximum + logarithm(sum);
    }
  }
  /// What the sums of a row with this sum of probabilities are to be multiplied with.
  __device__ T factor(T sum) const {
    return output_ == nullptr ? T{1} : sum == T{0} ? T{0} : T{1} / sum;
  }
  __device__ void put(int column, T x) const {
    if (output_ == nullptr) {
      state_.output[column] = x;
    } else {
      output_[column] = narrow<S>(x);
    }
  }
  /// Calls write(store), where store(column, x, next) takes two columns, of which the first is
  /// even. What happens to them is decided once for all.
  template <class Write>
  __device__ void put_pairs(Write write) const {
    if (output_ == nullptr) {
      write([&](int column, T x, T next) { store_pair(state_.output + column, x, next); });
    } else {
      write([&](int column, T x, T next) { store_pair(output_ + column, x, next); });
    }
  }

 private:
  __device__ void keep_state(StateRow<T> state) {
    state_ = state;
    output_ = nullptr;
    lse_ = nullptr;
  }
  __device__ void set_row(const Arguments& a, std::int64_t batch, std::int64_t head,
                          std::int64_t token, bool is_final) {
    const std::int64_t row = first_row_of(a.call, batch, head) + token;
    keep_state(state_row<T>(a.rows, row, a.call.value_dim));
    if (!is_final) return;
    output_ = head_of<S>(a.call.output, batch, head).row(token);
    lse_ = static_cast<T*>(a.call.lse) + row;
  }

  StateRow<T> state_;
  S* output_;  // null: the state is kept
  T* lse_;
};

/// Takes a row of a gradient.
template <class S>
class GradientSink {
  using T = Real<S>;

 public:
  /// Of a task. `slots` are of rows of `size` numbers.
  __device__ GradientSink(const Arguments& a, const Work& work, const Gradient& gradient,
                          void* slots, int g, int row, int size)
      : size_(size) {
    if (work.task->slot >= 0) {
      wide_ = static_cast<T*>(slots) + work.slot_row(a, g, row) * size;
    } else {
      set_row(a, work.side, work.place, gradient, work.own_token(g, row));
    }
  }
  /// Of a row of the tensor.
  __device__ GradientSink(const Arguments& a, Side side, const HeadWork& place,
                          const Gradient& gradient, std::int64_t token, int size)
      : size_(size) {
    set_row(a, side, place, gradient, token);
  }

  /// Nothing if there is no such column.
  __device__ void put(int column, T x) const {
    if (column >= size_) return;
    if (wide_ != nullptr) {
      wide_[column] = add_ ? wide_[column] + x : x;
    } else {
      narrow_[column] = narrow<S>(add_ ? widen(narrow_[column]) + x : x);
    }
  }
  /// As RowSink's. Columns that do not exist are not to be asked for.
  template <class Write>
  __device__ void put_pairs(Write write) const {
    if (wide_ != nullptr) {
      write([&](int column, T x, T next) { put_pair(wide_ + column, x, next); });
    } else {
      write([&](int column, T x, T next) { put_pair(narrow_ + column, x, next); });
    }
  }

 private:
  template <class Element>
  __device__ void put_pair(Element* to, T x, T next) const {
    if (add_) {
      x += widen(to[0]);
      next += widen(to[1]);
    }
    store_pair(to, x, next);
  }
  __device__ void set_row(const Arguments& a, Side side, const HeadWork& place,
                          const Gradient& gradient, std::int64_t token) {
    const std::int64_t head = side == Side::kRows ? place.head : place.key_head(a.call);
    if (gradient.wide) {
      wide_ = head_of<T>(gradient.view, place.batch, head).row(token);
    } else {
      narrow_ = head_of<S>(gradient.view, place.batch, head).row(token);
    }
    add_ = gradient.add;
  }

  const int size_;
  T* wide_ = nullptr;
  S* narrow_ = nullptr;
  bool add_ = false;
};

}  // namespace sparse_attn::cuda
