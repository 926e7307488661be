// Products with positive features that are never kept: tiles of rows make theirs, use them and go
// on (feature_tile.h); backward makes them again. Here is what goes beyond a tile: sums over all
// rows, and the largest product of a head. That is not known before the last row, so that sums
// shrink as it grows, as those of a softmax do.
#pragma once

#include "feature_tile.h"

namespace {

template <class T>
class FeatureProducts {
 public:
  explicit FeatureProducts(const FeatureProductParams& params)
      : p_(params),
        z_(params),
        heads_(params.batch * params.heads),
        tiles_((params.n + kMaxTile - 1) / kMaxTile) {
    const int64_t wanted = (kItems + heads_ - 1) / heads_, most = tiles_ / kLeastTiles;
    parts_ = wanted < most ? wanted : most;
    if (parts_ < 1) parts_ = 1;
    Arena counting(nullptr);
    FeatureTile<T>(p_, counting);
    scratch_size_ = counting.used();
  }

  int64_t layout(void* base, int threads) {
    Arena arena(base);
    const int64_t items = heads_ * parts_;
    sums_ = arena.take<T>(p_.to_sums ? items * sums_size() : 0);
    projections_ = arena.take<T>(p_.grad_projection ? items * projection_size() : 0);
    states_ = arena.take<State>(items);
    scratch_ = arena.take<char>(threads * scratch_size_);
    return arena.used();
  }

  void run(const Parallel& parallel) {
    layout(p_.workspace, parallel.threads);
    for_each_item(parallel, heads_ * parts_, [&](int thread, int64_t item) {
      const FlushToZero flush;
      Arena arena(scratch_ + thread * scratch_size_);
      FeatureTile<T> tile(p_, arena);
      run_part(item, tile);
    });
    for_each_item(parallel, heads_, [&](int, int64_t head) { finish(head); });
  }

 private:
  // Heads and parts that are enough to share among threads, and tiles that are worth a part.
  static constexpr int64_t kItems = 16;
  static constexpr int64_t kLeastTiles = 8;

  /// Of a part: the largest product so far, where it is, and what goes back to it.
  struct State {
    T maximum;
    int64_t index;
    T grad;
  };

  static T* at(void* numbers) { return static_cast<T*>(numbers); }
  /// With a row for what eps multiplies.
  int64_t sums_size() const { return (int64_t{z_.count} + 1) * z_.padded_value; }
  int64_t projection_size() const { return int64_t{z_.count} * z_.padded_size; }

  void run_part(int64_t item, FeatureTile<T>& tile) {
    const int64_t head = item / parts_, part = item % parts_;
    T *const sums = sums_ + item * sums_size(), *const projection =
                                                    projections_ + item * projection_size();
    states_[item] = {-kInfinity<T>, -1, T{0}};
    if (p_.to_sums) fill_zero(sums, sums_size());
    if (p_.grad_projection) fill_zero(projection, projection_size());
    if (p_.to_values) tile.set_eps(head);
    for (int64_t t = tiles_ * part / parts_; t < tiles_ * (part + 1) / parts_; ++t) {
      tile.load_rows(head, t * kMaxTile);
      tile.make_products();
      set_maxima(head, item, tile);
      tile.make_features();
      if (p_.to_sums) tile.add_to_sums(sums, sums + int64_t{z_.count} * z_.padded_value);
      if (p_.to_values) tile.make_values();
      if (!p_.grad_input && !p_.grad_projection) continue;
      tile.make_gradients();
      differentiate_maxima(head, states_[item], tile);
      if (p_.grad_projection) tile.add_to_projection(projection);
      if (p_.grad_input) tile.make_input_gradient();
    }
  }

  /// What the products of a tile are relative to.
  void set_maxima(int64_t head, int64_t item, FeatureTile<T>& tile) {
    T* const maximum = at(p_.maximum) + head * p_.n;
    int64_t* const index = p_.index + head * p_.n;
    if (p_.backward) {
      for (int i = 0; i < tile.count(); ++i) tile.maximum()[i] = maximum[tile.row(i)];
      return;
    }
    tile.find_maxima();
    if (p_.transposed) {
      raise_maximum(item, tile);
      return;
    }
    for (int i = 0; i < tile.count(); ++i) {
      maximum[tile.row(i)] = tile.maximum()[i];
      index[tile.row(i)] = tile.place(i);
    }
  }

  /// Sums so far shrink as the maximum of the part grows.
  void raise_maximum(int64_t item, FeatureTile<T>& tile) {
    State& state = states_[item];
    const T before = state.maximum;
    for (int i = 0; i < tile.count(); ++i) {
      if (!tile.is_live(i) || !(tile.maximum()[i] > state.maximum)) continue;
      state.maximum = tile.maximum()[i];
      state.index = tile.place(i);
    }
    if (state.maximum > before && before > -kInfinity<T>) {
      scale_row(sums_ + item * sums_size(), exp<T>(broadcast(before - state.maximum))[0],
                z_.count * z_.padded_value);
    }
    const Vec<T> maximum = finite_maximum<T>(broadcast(state.maximum));
    for (int v = 0; v < kMaxTile; v += kLanes<T>) store(tile.maximum() + v, maximum);
  }

  void differentiate_maxima(int64_t head, State& state, FeatureTile<T>& tile) const {
    for (int i = 0; i < tile.count(); ++i) {
      if (p_.transposed) {
        state.grad += tile.norm_gradient(i);
      } else if (tile.is_live(i)) {
        const int64_t feature = p_.index[head * p_.n + tile.row(i)] % z_.count;
        tile.add_to_maximum(i, feature, -tile.norm_gradient(i));
      }
    }
  }

  /// Joins the parts of a head, in order.
  void finish(int64_t head) {
    const State* const states = states_ + head * parts_;
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
      differentiate_maximum(head, all.grad * z_.root);
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
    const int64_t last = int64_t{z_.count} * z_.padded_value;
    for (int64_t part = 0; part < parts_; ++part) {
      // Features relative to the row's own maximum are alike in all parts.
      const T own = states_[head * parts_ + part].maximum;
      const T shrunk = p_.transposed ? exp<T>(broadcast(own) - top)[0] : T{1};
      const T* const from = sums + part * sums_size();
      for (int64_t i = 0; i < last; i += kLanes<T>)
        store(sums + i, (part > 0 ? load(sums + i) : Vec<T>{}) + load(from + i) * shrunk);
      if (part > 0) add_row(sums + last, from + last, z_.padded_value);
    }
    T* const to = at(p_.to_sums) + head * z_.count * z_.value_dim;
    scale_row(sums + last, z_.factor * z_.eps, z_.padded_value);
    for (int64_t f = 0; f < z_.count; ++f) {
      add_row(sums + f * z_.padded_value, sums + last, z_.padded_value);
      unpack_row(to + f * z_.value_dim, sums + f * z_.padded_value, z_.value_dim);
    }
  }

  void join_projections(int64_t head) const {
    T* const sum = projections_ + head * parts_ * projection_size();
    for (int64_t part = 1; part < parts_; ++part) {
      for (int64_t i = 0; i < projection_size(); i += kLanes<T>)
        store(sum + i, load(sum + i) + load(sum + part * projection_size() + i));
    }
    T* const to = at(p_.grad_projection) + head * z_.count * z_.size;
    for (int64_t f = 0; f < z_.count; ++f) {
      T* const row = sum + f * z_.padded_size;
      scale_row(row, z_.root, z_.padded_size);
      unpack_row(to + f * z_.size, row, z_.size);
    }
  }

  /// What goes back to the head's maximum, at the product that it was.
  void differentiate_maximum(int64_t head, T grad) const {
    const int64_t index = p_.index[head * p_.n], row = index / z_.count, feature = index % z_.count;
    const Head<const T> input = head_of<const T>(p_.input, p_.heads, head);
    const T* const from = input.data + row * input.stride;
    const T* const weights = projection_of<T>(p_, head) + feature * z_.size;
    for (int d = 0; d < z_.size; ++d) {
      if (p_.grad_input) at(p_.grad_input)[(head * p_.n + row) * z_.size + d] -= grad * weights[d];
      if (p_.grad_projection)
        at(p_.grad_projection)[(head * z_.count + feature) * z_.size + d] -= grad * from[d];
    }
  }

  const FeatureProductParams& p_;
  FeatureSizes<T> z_;
  int64_t heads_, tiles_, scratch_size_;
  int64_t parts_ = 1;
  T* sums_ = nullptr;         // (heads, parts, count + 1, padded value)
  T* projections_ = nullptr;  // (heads, parts, count, padded size)
  State* states_ = nullptr;
  char* scratch_ = nullptr;
};

}  // namespace
