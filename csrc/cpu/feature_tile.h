// A tile of 64 rows that makes positive features, uses them and goes on: they are never kept.
//
// Rows are in the SIMD lanes, features run down, as keys do in the softmax: no sum of a row is
// horizontal, and features are the right-hand side of every product of rows. What eps adds is the
// same for all features, so it is left out of them and added to sums as a whole.
#pragma once

#include "gemm.h"
#include "linear_params.h"
#include "scheduler.h"
#include "softmax.h"
#include "tile.h"

namespace {

using sparse_attn::FeatureProductParams;

/// sum + base[m].
template <class T>
struct SetAbove {
  T* c;
  const T* base;
  SPARSE_ATTN_INLINE void operator()(int m, int n, Vec<T> sum) const {
    store(c + m * kMaxTile + n * kLanes<T>, sum + base[m]);
  }
};

/// sum by[m][n].
template <class T>
struct SetTimes {
  T* c;
  const T* by;
  SPARSE_ATTN_INLINE void operator()(int m, int n, Vec<T> sum) const {
    const int at = m * kMaxTile + n * kLanes<T>;
    store(c + at, sum * load(by + at));
  }
};

/// sum - x[m][n] factor[n].
template <class T>
struct SetLess {
  T* c;
  const T *x, *factor;
  SPARSE_ATTN_INLINE void operator()(int m, int n, Vec<T> sum) const {
    const int at = m * kMaxTile + n * kLanes<T>;
    store(c + at, sum - load(x + at) * load(factor + n * kLanes<T>));
  }
};

/// What the rows of a tile and the sums over all rows share.
template <class T>
struct FeatureSizes {
  explicit FeatureSizes(const FeatureProductParams& params)
      : count(static_cast<int>(params.count)),
        size(static_cast<int>(params.head_dim)),
        value_dim(static_cast<int>(params.value_dim)),
        padded_size(round_up(size, kLanes<T>)),
        padded_value(round_up(value_dim, kLanes<T>)),
        root(static_cast<T>(__builtin_sqrt(params.scale))),
        factor(static_cast<T>(params.factor)),
        eps(static_cast<T>(params.eps)) {}

  int count, size, value_dim, padded_size, padded_value;
  T root, factor, eps;  // root is that of the scale
};

/// The projection of a head.
template <class T>
SPARSE_ATTN_INLINE const T* projection_of(const FeatureProductParams& params, int64_t head) {
  return static_cast<const T*>(params.projection) + head % params.heads * params.projection_stride;
}

template <class T>
class FeatureTile {
 public:
  FeatureTile(const FeatureProductParams& params, Arena& arena) : p_(params), z_(params) {
    const int widest = z_.padded_size > z_.padded_value ? z_.padded_size : z_.padded_value;
    features_ = arena.take<T>(int64_t{z_.count} * kMaxTile);
    grads_ = arena.take<T>(int64_t{z_.count} * kMaxTile);
    inputs_by_row_ = arena.take<T>(kMaxTile * z_.padded_size);
    inputs_ = arena.take<T>(kMaxTile * z_.padded_size);
    values_by_row_ = arena.take<T>(kMaxTile * z_.padded_value);
    values_ = arena.take<T>(kMaxTile * z_.padded_value);
    result_by_row_ = arena.take<T>(kMaxTile * widest);
    result_ = arena.take<T>(kMaxTile * widest);
    of_eps_ = arena.take<T>(z_.padded_value);
    norms_ = arena.take<T>(kMaxTile);
    maximum_ = arena.take<T>(kMaxTile);
    place_ = arena.take<T>(kMaxTile);
  }

  /// Takes the rows of a head from `begin` on.
  void load_rows(int64_t head, int64_t begin) {
    const int64_t left = p_.n - begin;
    head_ = head;
    rows_ = {begin, 1, static_cast<int>(left < kMaxTile ? left : kMaxTile), -1};
    vectors_ = round_up(rows_.count, kLanes<T>) / kLanes<T>;
    live_ = all_rows(rows_.count);
    for (int i = 0; p_.padding && i < rows_.count; ++i) {
      if (p_.padding[head / p_.heads * p_.n + begin + i]) live_ &= ~(uint64_t{1} << i);
    }
    input_rows_ = whole_vector_rows(head_of<const T>(p_.input, p_.heads, head), rows_, nullptr,
                                    z_.size, live_, inputs_by_row_);
    transpose_rows<T>(inputs_, kMaxTile, input_rows_, rows_.count, z_.padded_size, z_.root);
    if (p_.values.data == nullptr) return;
    value_rows_ = whole_vector_rows(head_of<const T>(p_.values, p_.heads, head), rows_, nullptr,
                                    z_.value_dim, live_, values_by_row_);
    if (p_.grad_input || p_.grad_projection)
      transpose_rows<T>(values_, kMaxTile, value_rows_, rows_.count, z_.padded_value, T{1});
  }

  int count() const { return rows_.count; }
  int64_t row(int i) const { return rows_.start + i; }
  bool is_live(int i) const { return live_ >> i & 1; }
  /// The largest product of a row, the first where it comes more than once.
  T* maximum() const { return maximum_; }
  int64_t place(int i) const { return row(i) * z_.count + static_cast<int64_t>(place_[i]); }
  /// The sum of a row's gradients of products.
  T norm_gradient(int i) const { return norms_[i]; }

  void make_products() {
    gemm(z_.count, vectors_, z_.size, Operand<T, true>{projection(), z_.size}, inputs_, kMaxTile,
         SetTo<T>{features_, kMaxTile});
    if (live_ == ~uint64_t{0}) return;
    for (int f = 0; f < z_.count; ++f) {
      for (int v = 0; v < kVectors; ++v) {
        T* const to = features_ + f * kMaxTile + v * kLanes<T>;
        store(to, keep_lanes<T>(load(to), live_, v, -kInfinity<T>));
      }
    }
  }

  void find_maxima() {
    Vec<T> top[kVectors], place[kVectors] = {};
    for (Vec<T>& x : top) x = broadcast(-kInfinity<T>);
    for (int f = 0; f < z_.count; ++f) {
      const Vec<T> now = broadcast(static_cast<T>(f));
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        const Vec<T> x = load(features_ + f * kMaxTile + v * kLanes<T>);
        const auto larger = x > top[v];
        top[v] = larger ? x : top[v];
        place[v] = larger ? now : place[v];
      }
    }
    for (int v = 0; v < kVectors; ++v) {
      store(maximum_ + v * kLanes<T>, finite_maximum<T>(top[v]));
      store(place_ + v * kLanes<T>, place[v]);
    }
  }

  /// Products -> factor exp(product - scale |input|^2 / 2 - maximum); 0 for padded rows.
  void make_features() {
    for (int v = 0; v < kMaxTile; v += kLanes<T>) {
      Vec<T> sum{};
      for (int d = 0; d < z_.size; ++d) {
        const Vec<T> x = load(inputs_ + d * kMaxTile + v);
        sum += x * x;
      }
      store(norms_ + v, sum * T{0.5} + load(maximum_ + v));
    }
    for (int f = 0; f < z_.count; ++f) {
      T* const row = features_ + f * kMaxTile;
#pragma GCC unroll 4
      for (int v = 0; v < kMaxTile; v += kLanes<T>)
        store(row + v, z_.factor * exp<T>(load(row + v) - load(norms_ + v)));
    }
  }

  /// sums += featuresᵀ values; of_eps += values.
  void add_to_sums(T* sums, T* of_eps) const {
    gemm(z_.count, z_.padded_value / kLanes<T>, rows_.count, Operand<T, true>{features_, kMaxTile},
         value_rows_.data, value_rows_.stride, AddTo<T>{sums, z_.padded_value});
    for (int i = 0; i < rows_.count; ++i) add_row(of_eps, value_rows_.row(i), z_.padded_value);
  }

  /// factor eps times the sums of a head over all features, which make_values adds.
  void set_eps(int64_t head) {
    head_ = head;
    for (int v = 0; v < z_.value_dim; ++v) of_eps_[v] = T{0};
    for (int f = 0; f < z_.count; ++f) {
      for (int v = 0; v < z_.value_dim; ++v) of_eps_[v] += sums()[int64_t{f} * z_.value_dim + v];
    }
    for (int v = 0; v < z_.value_dim; ++v) of_eps_[v] *= z_.factor * z_.eps;
  }

  /// to = features sums.
  void make_values() {
    gemm(z_.value_dim, vectors_, z_.count, Operand<T, false>{sums(), z_.value_dim}, features_,
         kMaxTile, SetAbove<T>{result_, of_eps_});
    write_rows(static_cast<T*>(p_.to_values), z_.value_dim, T{1});
  }

  /// Gradients of the products, but for those through the maxima, and of -scale |input|^2 / 2.
  void make_gradients() {
    gemm(z_.count, vectors_, z_.value_dim, Operand<T, true>{sums(), z_.value_dim}, values_,
         kMaxTile, SetTimes<T>{grads_, features_});
    for (int v = 0; v < vectors_ * kLanes<T>; v += kLanes<T>) {
      Vec<T> sum{};
      for (int f = 0; f < z_.count; ++f) sum += load(grads_ + f * kMaxTile + v);
      store(norms_ + v, sum);
    }
  }

  /// Adds to the gradient of the product of row i that is its maximum.
  void add_to_maximum(int i, int64_t feature, T grad) { grads_[feature * kMaxTile + i] += grad; }

  /// sum += gradientsᵀ inputs.
  void add_to_projection(T* sum) const {
    gemm(z_.count, z_.padded_size / kLanes<T>, rows_.count, Operand<T, true>{grads_, kMaxTile},
         input_rows_.data, input_rows_.stride, AddTo<T>{sum, z_.padded_size});
  }

  void make_input_gradient() {
    gemm(z_.size, vectors_, z_.count, Operand<T, false>{projection(), z_.size}, grads_, kMaxTile,
         SetLess<T>{result_, inputs_, norms_});
    write_rows(static_cast<T*>(p_.grad_input), z_.size, z_.root);
  }

 private:
  static constexpr int kVectors = kMaxTile / kLanes<T>;

  const T* projection() const { return projection_of<T>(p_, head_); }
  const T* sums() const { return static_cast<const T*>(p_.sums) + head_ * z_.count * z_.value_dim; }

  /// The result, transposed; rows that are padded become 0.
  void write_rows(T* to, int size, T factor) {
    const int padded = round_up(size, kLanes<T>);
    transpose_rows<T>(result_by_row_, padded, {result_, kMaxTile}, size, vectors_ * kLanes<T>,
                      factor);
    to += (head_ * p_.n + rows_.start) * size;
    for (int i = 0; i < rows_.count; ++i) {
      T* const row = result_by_row_ + i * padded;
      if (!is_live(i)) fill_zero(row, padded);
      unpack_row(to + i * size, row, size);
    }
  }

  const FeatureProductParams& p_;
  FeatureSizes<T> z_;
  int64_t head_ = 0;
  Tile rows_{};
  uint64_t live_ = 0;  // rows that are not padded
  int vectors_ = 0;
  Rows<T> input_rows_{}, value_rows_{};
  // What is by row has rows of whole vectors, the rest lanes of rows.
  T *features_, *grads_, *inputs_by_row_, *inputs_, *values_by_row_, *values_, *result_by_row_,
      *result_, *of_eps_, *norms_, *maximum_, *place_;
};

}  // namespace
