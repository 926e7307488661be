// Positive features of the softmax kernel: exponentials of products, row by row, and their
// gradients. Everything of a row happens while it is in cache.
#pragma once

#include "linear_params.h"
#include "scalar.h"
#include "scheduler.h"
#include "softmax.h"

namespace {

using sparse_attn::FeatureParams;
using sparse_attn::Reference;

template <class T>
class Features {
 public:
  explicit Features(const FeatureParams& params)
      : p_(params),
        heads_(params.batch * params.heads),
        blocks_((params.n + kRows - 1) / kRows),
        count_(static_cast<int>(params.count)),
        factor_(static_cast<T>(params.factor)),
        eps_(static_cast<T>(params.eps)) {}

  void run(const Parallel& parallel) const {
    const bool by_row = p_.reference == Reference::kRow;
    for_each_row(parallel, [&](int64_t, int64_t row) {
      find_maximum(row);
      if (by_row) exponentials(row, at(p_.maximum)[row]);
    });
    if (by_row) return;
    for_each_item(parallel, heads_, [&](int, int64_t head) {
      p_.reference == Reference::kHead ? share_maximum(head) : run_maximum(head);
    });
    const bool running = p_.reference == Reference::kRunning;
    for_each_row(parallel, [&](int64_t head, int64_t row) {
      exponentials(row, running ? at(p_.constant)[head] : at(p_.maximum)[row]);
    });
  }

  void backward(const Parallel& parallel) const {
    for_each_row(parallel, [&](int64_t, int64_t row) { differentiate(row); });
    for_each_item(parallel, heads_, [&](int, int64_t head) { add_maxima(head); });
  }

 private:
  static constexpr int64_t kRows = 64;  // of an item
  static constexpr T kLargestPower = sizeof(T) == 4 ? 60 : 600;

  static T* at(const void* numbers) { return static_cast<T*>(const_cast<void*>(numbers)); }
  bool is_padded(int64_t row) const {
    const int64_t head = row / p_.n;
    return p_.padding != nullptr && p_.padding[head / p_.heads * p_.n + row % p_.n] != 0;
  }

  template <class Body>
  void for_each_row(const Parallel& parallel, const Body& body) const {
    for_each_item(parallel, heads_ * blocks_, [&](int, int64_t item) {
      const int64_t head = item / blocks_, begin = item % blocks_ * kRows;
      for (int64_t i = begin; i < begin + kRows && i < p_.n; ++i) body(head, head * p_.n + i);
    });
  }

  /// A row's vectors in turn, the last filled up with zeros: body(column, elements in it).
  template <class Body>
  SPARSE_ATTN_INLINE static void for_each_vector(int count, const Body& body) {
    int i = 0;
    for (; i + kLanes<T> <= count; i += kLanes<T>) body(i, kLanes<T>);
    if (i < count) body(i, count - i);
  }
  static SPARSE_ATTN_INLINE Vec<T> load_some(const T* from, int count) {
    return count == kLanes<T> ? load(from) : load_real_part(from, count);
  }
  static SPARSE_ATTN_INLINE void store_some(T* to, Vec<T> x, int count) {
    if (count == kLanes<T>) {
      store(to, x);
    } else {
      store_real_part(to, x, count);
    }
  }

  static T sum_of(Vec<T> x) {
    T sum{0};
    for (int i = 0; i < kLanes<T>; ++i) sum += x[i];
    return sum;
  }

  /// scale |input|^2 / 2.
  T norm(int64_t row) const {
    const int size = static_cast<int>(p_.head_dim);
    const T* const input = at(p_.input) + row * size;
    Vec<T> sum{};
    for_each_vector(size, [&](int i, int count) {
      const Vec<T> x = load_some(input + i, count);
      sum += x * x;
    });
    return sum_of(sum) * static_cast<T>(p_.scale / 2);
  }

  /// The row's own, the first where it comes more than once.
  void find_maximum(int64_t row) const {
    const T* const products = at(p_.features) + row * count_;
    const auto step = static_cast<typename VecTypes<T>::IntLane>(kLanes<T>);
    Vec<T> top = broadcast(-kInfinity<T>);
    IntVec<T> place{}, now{};
    int i = 0;
    for (; i + kLanes<T> <= count_; i += kLanes<T>, now += step) {
      const Vec<T> x = load(products + i);
      const auto larger = x > top;
      top = larger ? x : top;
      place = larger ? now : place;
    }
    T best = -kInfinity<T>;
    int64_t index = 0;
    for (int lane = 0; lane < kLanes<T>; ++lane) {
      const int64_t column = place[lane] + lane;
      if (top[lane] > best || (top[lane] == best && column < index)) {
        best = top[lane];
        index = column;
      }
    }
    for (; i < count_; ++i) {
      if (products[i] > best) {
        best = products[i];
        index = i;
      }
    }
    at(p_.maximum)[row] = best;
    p_.index[row] = row % p_.n * count_ + index;
  }

  /// Every row of the head gets the largest of those that are not padded; 0 if there are none.
  void share_maximum(int64_t head) const {
    T* const maximum = at(p_.maximum) + head * p_.n;
    int64_t* const index = p_.index + head * p_.n;
    T top = -kInfinity<T>;
    int64_t of_top = -1;
    for (int64_t i = 0; i < p_.n; ++i) {
      if (is_padded(head * p_.n + i) || !(maximum[i] > top)) continue;
      top = maximum[i];
      of_top = index[i];
    }
    for (int64_t i = 0; i < p_.n; ++i) {
      maximum[i] = of_top < 0 ? T{0} : top;
      index[i] = of_top;
    }
  }

  /// Every row gets the largest up to it, less the head's constant: 0 unless powers lie far off. So
  /// what comes later leaves earlier rows as they are, to the bit.
  void run_maximum(int64_t head) const {
    T* const maximum = at(p_.maximum) + head * p_.n;
    int64_t* const index = p_.index + head * p_.n;
    T power = -kInfinity<T>;
    for (int64_t i = 0; i < p_.n; ++i) {
      if (is_padded(head * p_.n + i)) continue;
      const T own = maximum[i] - norm(head * p_.n + i);
      if (own > power) power = own;
    }
    const bool finite = power - power == T{0};
    const T least = power < -kLargestPower ? power + kLargestPower : T{0};
    const T constant = !finite ? T{0} : power > kLargestPower ? power - kLargestPower : least;
    at(p_.constant)[head] = constant;
    T top = constant;
    int64_t of_top = -1;
    for (int64_t i = 0; i < p_.n; ++i) {
      if (!is_padded(head * p_.n + i) && (of_top < 0 || maximum[i] > top)) {
        top = maximum[i];
        of_top = index[i];
      }
      maximum[i] = top - constant;
      index[i] = of_top;
    }
  }

  void exponentials(int64_t row, T reference) const {
    T* const features = at(p_.features) + row * count_;
    if (is_padded(row)) {
      for_each_vector(count_, [&](int i, int n) { store_some(features + i, Vec<T>{}, n); });
      at(p_.sums)[row] = T{0};
      return;
    }
    const T shift = norm(row) + reference;
    Vec<T> sum{};
    for_each_vector(count_, [&](int i, int n) {
      const Vec<T> x = factor_ * (exp<T>(load_some(features + i, n) - shift) + eps_);
      sum += n == kLanes<T> ? x : first_lanes(x, n);
      store_some(features + i, x, n);
    });
    at(p_.sums)[row] = sum_of(sum);
  }

  static Vec<T> first_lanes(Vec<T> x, int count) {
    for (int i = count; i < kLanes<T>; ++i) x[i] = T{0};
    return x;
  }

  void differentiate(int64_t row) const {
    T* const grad = at(p_.grad_products) + row * count_;
    if (is_padded(row)) {
      for_each_vector(count_, [&](int i, int n) { store_some(grad + i, Vec<T>{}, n); });
      at(p_.grad_norms)[row] = T{0};
      return;
    }
    const T* const features = at(p_.features) + row * count_;
    const T* const given = at(p_.grad_features) + row * count_;
    const T of_sum = p_.grad_sums ? at(p_.grad_sums)[row] : T{0}, least = factor_ * eps_;
    Vec<T> sum{};
    for_each_vector(count_, [&](int i, int n) {
      Vec<T> x = (load_some(given + i, n) + of_sum) * (load_some(features + i, n) - least);
      if (n < kLanes<T>) x = first_lanes(x, n);
      sum += x;
      store_some(grad + i, x, n);
    });
    at(p_.grad_norms)[row] = sum_of(sum);
  }

  /// What goes to the references, at the product that each row has its own from.
  void add_maxima(int64_t head) const {
    T* const grad = at(p_.grad_products) + head * p_.n * count_;
    for (int64_t row = head * p_.n; row < (head + 1) * p_.n; ++row) {
      if (p_.index[row] < 0) continue;
      if (p_.reference != Reference::kRunning) grad[p_.index[row]] -= at(p_.grad_norms)[row];
      if (p_.grad_maximum) grad[p_.index[row]] += at(p_.grad_maximum)[row];
    }
  }

  const FeatureParams& p_;
  int64_t heads_;
  int64_t blocks_;  // of rows, of a head
  int count_;
  T factor_, eps_;
};

}  // namespace
