// Products with positive features that are never kept: a tile of 64 rows makes its features, uses
// them and goes on; backward makes them again.
//
// The rows of a tile are in the SIMD lanes, features run down, as keys do in the softmax: no sum of
// a row is horizontal, and features are the right-hand side of every product of rows. What eps adds
// is the same for all features, so it is left out of them and added to sums as a whole.
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

template <class T>
class FeatureProducts {
 public:
  explicit FeatureProducts(const FeatureProductParams& params)
      : p_(params),
        heads_(params.batch * params.heads),
        tiles_((params.n + kMaxTile - 1) / kMaxTile),
        count_(static_cast<int>(params.count)),
        size_(static_cast<int>(params.head_dim)),
        value_dim_(static_cast<int>(params.value_dim)),
        padded_size_(round_up(size_, kLanes<T>)),
        padded_value_(round_up(value_dim_, kLanes<T>)),
        root_(static_cast<T>(__builtin_sqrt(params.scale))),
        factor_(static_cast<T>(params.factor)),
        eps_(static_cast<T>(params.eps)) {
    const int64_t wanted = (kItems + heads_ - 1) / heads_, most = tiles_ / kLeastTiles;
    parts_ = wanted < most ? wanted : most;
    if (parts_ < 1) parts_ = 1;
  }

  int64_t layout(void* base, int threads) {
    Arena arena(base);
    const int64_t items = heads_ * parts_;
    sums_ = arena.take<T>(p_.to_sums ? items * sums_size() : 0);
    projections_ = arena.take<T>(p_.grad_projection ? items * projection_size() : 0);
    states_ = arena.take<State>(items);
    scratch_ = arena.take<T>(threads * scratch_size());
    return arena.used();
  }

  void run(const Parallel& parallel) {
    layout(p_.workspace, parallel.threads);
    for_each_item(parallel, heads_ * parts_, [&](int thread, int64_t item) {
      const FlushToZero flush;
      run_part(item, Scratch(*this, thread));
    });
    for_each_item(parallel, heads_, [&](int, int64_t head) { finish(head); });
  }

 private:
  // Heads and parts that are enough to share among threads, and tiles that are worth a part.
  static constexpr int64_t kItems = 16;
  static constexpr int64_t kLeastTiles = 8;
  static constexpr int kTileVectors = kMaxTile / kLanes<T>;

  /// Of a part: the largest product so far, where it is, and what goes back to it.
  struct State {
    T maximum;
    int64_t index;
    T grad;
  };

  /// Of a thread. What is by row has rows of whole vectors, the rest lanes of rows.
  struct Scratch {
    Scratch(const FeatureProducts& of, int thread) {
      T* next = of.scratch_ + thread * of.scratch_size();
      const auto take = [&](int64_t count) { return next += count, next - count; };
      features = take(int64_t{of.count_} * kMaxTile);
      grads = take(int64_t{of.count_} * kMaxTile);
      inputs_by_row = take(kMaxTile * of.padded_size_);
      inputs = take(kMaxTile * of.padded_size_);
      values_by_row = take(kMaxTile * of.padded_value_);
      values = take(kMaxTile * of.padded_value_);
      result_by_row = take(kMaxTile * of.widest());
      result = take(kMaxTile * of.widest());
      of_eps = take(of.padded_value_);
      norms = take(kMaxTile);
      maximum = take(kMaxTile);
      place = take(kMaxTile);
    }
    T *features, *grads, *inputs_by_row, *inputs, *values_by_row, *values, *result_by_row, *result;
    T *of_eps, *norms, *maximum, *place;
  };
  int widest() const { return padded_size_ > padded_value_ ? padded_size_ : padded_value_; }
  int64_t scratch_size() const {
    return kMaxTile * (2 * int64_t{count_} + 2 * (padded_size_ + padded_value_ + widest()) + 3) +
           padded_value_;
  }
  /// With a row for what eps multiplies.
  int64_t sums_size() const { return (int64_t{count_} + 1) * padded_value_; }
  int64_t projection_size() const { return int64_t{count_} * padded_size_; }

  /// A tile of rows at work.
  struct Rows64 {
    int64_t head;
    Tile tile;
    uint64_t live;  // rows that are not padded
    int vectors;
    Rows<T> inputs, values;

    bool is_full() const { return live == ~uint64_t{0}; }
    int64_t row(int i) const { return tile.start + i; }
  };

  static T* at(const void* numbers) { return static_cast<T*>(const_cast<void*>(numbers)); }
  const T* projection(int64_t head) const {
    return at(p_.projection) + head % p_.heads * p_.projection_stride;
  }
  const T* sums_of(int64_t head) const { return at(p_.sums) + head * count_ * value_dim_; }
  bool wants_gradients() const { return p_.grad_input || p_.grad_projection; }

  void run_part(int64_t item, const Scratch& s) {
    const int64_t head = item / parts_, part = item % parts_;
    State& state = states_[item];
    state = {-kInfinity<T>, -1, T{0}};
    if (p_.to_sums) fill_zero(sums_ + item * sums_size(), sums_size());
    if (p_.grad_projection) fill_zero(projections_ + item * projection_size(), projection_size());
    if (p_.to_values) sum_for_eps(head, s);
    for (int64_t t = tiles_ * part / parts_; t < tiles_ * (part + 1) / parts_; ++t) {
      const Rows64 rows = load_rows(head, t * kMaxTile, s);
      make_features(rows, item, s);
      if (p_.to_sums) add_to_sums(rows, sums_ + item * sums_size(), s);
      if (p_.to_values) make_values(rows, s);
      if (wants_gradients()) differentiate(rows, item, s);
    }
  }

  Rows64 load_rows(int64_t head, int64_t begin, const Scratch& s) const {
    const int64_t left = p_.n - begin;
    Rows64 rows{head, {begin, 1, static_cast<int>(left < kMaxTile ? left : kMaxTile), -1}, 0, 0, {},
                {}};
    rows.live = all_rows(rows.tile.count);
    rows.vectors = round_up(rows.tile.count, kLanes<T>) / kLanes<T>;
    for (int i = 0; p_.padding && i < rows.tile.count; ++i) {
      if (p_.padding[head / p_.heads * p_.n + begin + i]) rows.live &= ~(uint64_t{1} << i);
    }
    rows.inputs = whole_vector_rows(head_of<const T>(p_.input, p_.heads, head), rows.tile, nullptr,
                                    size_, rows.live, s.inputs_by_row);
    transpose_rows<T>(s.inputs, kMaxTile, rows.inputs, rows.tile.count, padded_size_, root_);
    if (p_.values.data == nullptr) return rows;
    rows.values = whole_vector_rows(head_of<const T>(p_.values, p_.heads, head), rows.tile, nullptr,
                                    value_dim_, rows.live, s.values_by_row);
    if (wants_gradients())
      transpose_rows<T>(s.values, kMaxTile, rows.values, rows.tile.count, padded_value_, T{1});
    return rows;
  }

  /// factor exp(product - scale |input|^2 / 2 - maximum); 0 for padded rows.
  void make_features(const Rows64& rows, int64_t item, const Scratch& s) {
    gemm(count_, rows.vectors, size_, Operand<T, true>{projection(rows.head), size_}, s.inputs,
         kMaxTile, SetTo<T>{s.features, kMaxTile});
    if (!rows.is_full()) hide(rows, s.features);
    if (p_.backward) {
      read_maxima(rows, s);
    } else {
      find_maxima(s);
      p_.transposed ? raise_maximum(rows, item, s) : write_maxima(rows, s);
    }
    for (int v = 0; v < kMaxTile; v += kLanes<T>) {
      Vec<T> sum{};
      for (int d = 0; d < size_; ++d) {
        const Vec<T> x = load(s.inputs + d * kMaxTile + v);
        sum += x * x;
      }
      store(s.norms + v, sum * T{0.5} + load(s.maximum + v));
    }
    for (int f = 0; f < count_; ++f) {
      T* const row = s.features + f * kMaxTile;
#pragma GCC unroll 4
      for (int v = 0; v < kMaxTile; v += kLanes<T>)
        store(row + v, factor_ * exp<T>(load(row + v) - load(s.norms + v)));
    }
  }

  void hide(const Rows64& rows, T* products) const {
    for (int f = 0; f < count_; ++f) {
      for (int v = 0; v < kTileVectors; ++v) {
        T* const to = products + f * kMaxTile + v * kLanes<T>;
        store(to, keep_lanes<T>(load(to), rows.live, v, -kInfinity<T>));
      }
    }
  }

  /// Of each row, the first where it comes more than once.
  void find_maxima(const Scratch& s) const {
    Vec<T> top[kTileVectors], place[kTileVectors] = {};
    for (Vec<T>& x : top) x = broadcast(-kInfinity<T>);
    for (int f = 0; f < count_; ++f) {
      const Vec<T> now = broadcast(static_cast<T>(f));
#pragma GCC unroll 4
      for (int v = 0; v < kTileVectors; ++v) {
        const Vec<T> x = load(s.features + f * kMaxTile + v * kLanes<T>);
        const auto larger = x > top[v];
        top[v] = larger ? x : top[v];
        place[v] = larger ? now : place[v];
      }
    }
    for (int v = 0; v < kTileVectors; ++v) {
      store(s.maximum + v * kLanes<T>, finite_maximum<T>(top[v]));
      store(s.place + v * kLanes<T>, place[v]);
    }
  }

  void write_maxima(const Rows64& rows, const Scratch& s) const {
    const int64_t first = rows.head * p_.n;
    for (int i = 0; i < rows.tile.count; ++i) {
      at(p_.maximum)[first + rows.row(i)] = s.maximum[i];
      p_.index[first + rows.row(i)] = rows.row(i) * count_ + static_cast<int64_t>(s.place[i]);
    }
  }

  /// Sums so far shrink as the maximum of the part grows.
  void raise_maximum(const Rows64& rows, int64_t item, const Scratch& s) {
    State& state = states_[item];
    const T before = state.maximum;
    for (int i = 0; i < rows.tile.count; ++i) {
      if (!(rows.live >> i & 1) || !(s.maximum[i] > state.maximum)) continue;
      state.maximum = s.maximum[i];
      state.index = rows.row(i) * count_ + static_cast<int64_t>(s.place[i]);
    }
    if (state.maximum > before && before > -kInfinity<T>) {
      scale_row(sums_ + item * sums_size(), exp<T>(broadcast(before - state.maximum))[0],
                count_ * padded_value_);
    }
    const Vec<T> maximum = finite_maximum<T>(broadcast(state.maximum));
    for (int v = 0; v < kMaxTile; v += kLanes<T>) store(s.maximum + v, maximum);
  }

  void read_maxima(const Rows64& rows, const Scratch& s) const {
    const T* const maximum = at(p_.maximum) + rows.head * p_.n + rows.tile.start;
    for (int i = 0; i < rows.tile.count; ++i) s.maximum[i] = maximum[i];
  }

  /// sums += featuresᵀ values; the last row is that of eps.
  void add_to_sums(const Rows64& rows, T* sums, const Scratch& s) const {
    gemm(count_, padded_value_ / kLanes<T>, rows.tile.count, Operand<T, true>{s.features, kMaxTile},
         rows.values.data, rows.values.stride, AddTo<T>{sums, padded_value_});
    T* const of_eps = sums + int64_t{count_} * padded_value_;
    for (int i = 0; i < rows.tile.count; ++i) add_row(of_eps, rows.values.row(i), padded_value_);
  }

  /// factor eps times the sum over all features.
  void sum_for_eps(int64_t head, const Scratch& s) const {
    const T* const sums = sums_of(head);
    for (int v = 0; v < value_dim_; ++v) s.of_eps[v] = T{0};
    for (int f = 0; f < count_; ++f) {
      for (int v = 0; v < value_dim_; ++v) s.of_eps[v] += sums[int64_t{f} * value_dim_ + v];
    }
    for (int v = 0; v < value_dim_; ++v) s.of_eps[v] *= factor_ * eps_;
  }

  /// features sums.
  void make_values(const Rows64& rows, const Scratch& s) const {
    gemm(value_dim_, rows.vectors, count_, Operand<T, false>{sums_of(rows.head), value_dim_},
         s.features, kMaxTile, SetAbove<T>{s.result, s.of_eps});
    write_rows(rows, value_dim_, at(p_.to_values), T{1}, s);
  }

  /// Transposed, of all rows that are not padded; the others become 0.
  void write_rows(const Rows64& rows, int size, T* to, T factor, const Scratch& s) const {
    const int padded = round_up(size, kLanes<T>);
    transpose_rows<T>(s.result_by_row, padded, {s.result, kMaxTile}, size, rows.vectors * kLanes<T>,
                      factor);
    to += (rows.head * p_.n + rows.tile.start) * size;
    for (int i = 0; i < rows.tile.count; ++i) {
      T* const row = s.result_by_row + i * padded;
      if (!(rows.live >> i & 1)) fill_zero(row, padded);
      unpack_row(to + i * size, row, size);
    }
  }

  /// Gradients of the products, of the maxima, of the input and the projection.
  void differentiate(const Rows64& rows, int64_t item, const Scratch& s) {
    gemm(count_, rows.vectors, value_dim_, Operand<T, true>{sums_of(rows.head), value_dim_},
         s.values, kMaxTile, SetTimes<T>{s.grads, s.features});
    for (int v = 0; v < rows.vectors * kLanes<T>; v += kLanes<T>) {
      Vec<T> sum{};
      for (int f = 0; f < count_; ++f) sum += load(s.grads + f * kMaxTile + v);
      store(s.norms + v, sum);
    }
    for (int i = 0; i < rows.tile.count; ++i) {
      if (p_.transposed) {
        states_[item].grad += s.norms[i];
      } else if (rows.live >> i & 1) {
        const int64_t place = p_.index[rows.head * p_.n + rows.row(i)] % count_;
        s.grads[place * kMaxTile + i] -= s.norms[i];
      }
    }
    if (p_.grad_projection) {
      gemm(count_, padded_size_ / kLanes<T>, rows.tile.count, Operand<T, true>{s.grads, kMaxTile},
           rows.inputs.data, rows.inputs.stride,
           AddTo<T>{projections_ + item * projection_size(), padded_size_});
    }
    if (!p_.grad_input) return;
    gemm(size_, rows.vectors, count_, Operand<T, false>{projection(rows.head), size_}, s.grads,
         kMaxTile, SetLess<T>{s.result, s.inputs, s.norms});
    write_rows(rows, size_, at(p_.grad_input), root_, s);
  }

  /// Joins the parts of a head, in order.
  void finish(int64_t head) {
    State* const states = states_ + head * parts_;
    State all = states[0];
    for (int64_t part = 1; part < parts_; ++part) {
      all.grad += states[part].grad;
      if (!(states[part].maximum > all.maximum)) continue;
      all.maximum = states[part].maximum;
      all.index = states[part].index;
    }
    if (p_.transposed && !p_.backward) share_maximum(head, all);
    if (p_.to_sums) join_sums(head, all.maximum);
    if (p_.grad_projection) join_projections(head);
    if (p_.transposed && p_.backward && p_.index[head * p_.n] >= 0)
      add_to_maximum(head, all.grad * root_);
  }

  void share_maximum(int64_t head, const State& all) const {
    for (int64_t row = head * p_.n; row < (head + 1) * p_.n; ++row) {
      at(p_.maximum)[row] = all.index < 0 ? T{0} : all.maximum;
      p_.index[row] = all.index;
    }
  }

  void join_sums(int64_t head, T maximum) const {
    T* const sums = sums_ + head * parts_ * sums_size();
    const Vec<T> top = finite_maximum<T>(broadcast(maximum));
    const int64_t last = int64_t{count_} * padded_value_;
    for (int64_t part = 0; part < parts_; ++part) {
      // Those of a backward pass or of queries have no maximum of their own.
      const T own = states_[head * parts_ + part].maximum;
      const T shrunk = p_.transposed ? exp<T>(broadcast(own) - top)[0] : T{1};
      const T* const from = sums + part * sums_size();
      for (int64_t i = 0; i < last; i += kLanes<T>)
        store(sums + i, (part > 0 ? load(sums + i) : Vec<T>{}) + load(from + i) * shrunk);
      if (part > 0) add_row(sums + last, from + last, padded_value_);
    }
    T* const to = at(p_.to_sums) + head * count_ * value_dim_;
    scale_row(sums + last, factor_ * eps_, padded_value_);
    for (int f = 0; f < count_; ++f) {
      add_row(sums + int64_t{f} * padded_value_, sums + last, padded_value_);
      unpack_row(to + int64_t{f} * value_dim_, sums + int64_t{f} * padded_value_, value_dim_);
    }
  }

  void join_projections(int64_t head) const {
    T* const sum = projections_ + head * parts_ * projection_size();
    for (int64_t part = 1; part < parts_; ++part) {
      for (int64_t i = 0; i < projection_size(); i += kLanes<T>)
        store(sum + i, load(sum + i) + load(sum + part * projection_size() + i));
    }
    T* const to = at(p_.grad_projection) + head * count_ * size_;
    for (int f = 0; f < count_; ++f) {
      T* const row = sum + int64_t{f} * padded_size_;
      scale_row(row, root_, padded_size_);
      unpack_row(to + int64_t{f} * size_, row, size_);
    }
  }

  /// What goes back to the head's maximum, at the product that it was.
  void add_to_maximum(int64_t head, T grad) const {
    const int64_t index = p_.index[head * p_.n], row = index / count_, feature = index % count_;
    const Head<const T> input = head_of<const T>(p_.input, p_.heads, head);
    const T* const from = input.data + row * input.stride;
    const T* const weights = projection(head) + feature * size_;
    for (int d = 0; d < size_; ++d) {
      if (p_.grad_input) at(p_.grad_input)[(head * p_.n + row) * size_ + d] -= grad * weights[d];
      if (p_.grad_projection)
        at(p_.grad_projection)[(head * count_ + feature) * size_ + d] -= grad * from[d];
    }
  }

  const FeatureProductParams& p_;
  int64_t heads_, tiles_;
  int count_, size_, value_dim_, padded_size_, padded_value_;
  T root_, factor_, eps_;
  int64_t parts_ = 1;
  T* sums_ = nullptr;         // (heads, parts, count + 1, padded value)
  T* projections_ = nullptr;  // (heads, parts, count, padded size)
  State* states_ = nullptr;
  T* scratch_ = nullptr;
};

}  // namespace
