// How the gradients of query, key and value change along a tangent of the inputs, with those of
// output and log-sum-exp held fixed: the second derivative times a vector.
//
//   dZ = dS ∘ slope, dZ_dot = dS_dot ∘ slope + dS ∘ slope_dot, slope = ∂logit / ∂score
//   dQ += dZ_dotᵀ K + dZᵀ K_dot, dK += dZ_dot Q + dZ Q_dot, dV += (kept ∘ P_dot) dO
#pragma once

#include "gradient_sweep.h"
#include "pair_tile.h"

namespace {

template <class S>
class PairGradientsAlong {
 public:
  using T = Real<S>;

  PairGradientsAlong(Arena& arena, const AttentionParams& params)
      : scale_(static_cast<T>(params.scale)),
        pairs_(arena, params),
        dz_(arena.take<T>(kMaxTile * kMaxTile)),
        dz_dot_(arena.take<T>(kMaxTile * kMaxTile)),
        p_dot_(arena.take<T>(kMaxTile * kMaxTile)) {}

  void start(const PlanView& plan, const PassView& pass, int64_t head) {
    pairs_.start(plan, pass, head);
  }
  void load_rows(const RowTile& tile, const int64_t* list) { pairs_.load_rows(tile, list); }
  bool get(int32_t key_tile, int32_t mask) { return pairs_.get(key_tile, mask); }
  bool gather(const Tile& tile, const int64_t* list) { return pairs_.gather(tile, list); }

  void add(T* grad_query, AddTo<T> to_key, AddTo<T> to_value, FetchStack&) {
    pairs_.multiply_inputs();
    pairs_.multiply_gradients();
    pairs_.for_each_gradient([&](int at, int, const PairValues<T>& pair) {
      const Vec<T> slope = pair.logit.at.by_score, slope_dot = pair.logit.along.by_score;
      store(dz_ + at, pair.ds * slope * scale_);
      store(dz_dot_ + at, (pair.ds_dot * slope + pair.ds * slope_dot) * scale_);
      store(p_dot_ + at, pair.p_dot * pair.kept);
    });
    const GradientRows<S>& rows = pairs_.rows();
    add_queries(grad_query, pairs_.keys().key, dz_dot_);
    add_queries(grad_query, pairs_.keys_dot().key, dz_);
    add_keys(to_key, dz_dot_, rows.query);
    add_keys(to_key, dz_, pairs_.query_dot());
    add_keys(to_value, p_dot_, rows.grad_output);
  }

 private:
  void add_queries(T* grad_query, const Rows<T>& keys, const T* factors) const {
    gemm(pairs_.rows().query.size(), pairs_.rows().vectors, pairs_.keys().count,
         Operand<T, false>{keys.data, keys.stride}, factors, kMaxTile,
         AddTo<T>{grad_query, kMaxTile});
  }
  void add_keys(const AddTo<T>& sums, const T* factors, const TileRows<S>& rows) const {
    gemm(pairs_.keys().count, rows.vectors(), pairs_.rows().count,
         Operand<T, true>{factors, kMaxTile}, rows.rows().data, rows.rows().stride, sums);
  }

  const T scale_;
  PairTile<S, true> pairs_;
  T *dz_, *dz_dot_, *p_dot_;  // [key][query]
};

template <class S>
class BackwardAlong {
 public:
  explicit BackwardAlong(const AttentionParams& params) : p_(params), sweep_(params) {}

  int64_t layout(void* base, int threads) { return sweep_.layout(base, threads); }

  void run(const Parallel& parallel) {
    layout(p_.workspace, parallel.threads);
    sweep_.passes(parallel);
    if (has_lists(p_)) sweep_.listed(parallel);
    sweep_.finish(parallel);
  }

 private:
  const AttentionParams& p_;
  GradientSweep<S, PairGradientsAlong<S>> sweep_;
};

}  // namespace
