// Backward on tensor cores. With P = exp(S - lse) and dS = P ∘ (dP - delta), by tiles of queries:
// dQ = dS K; by tiles of keys: dV = Pᵀ dO and dK = dSᵀ Q. Nothing is added by two blocks: no
// atomics, the same bits every time.
//
// Both are one text: a block has tiles of one side, `own`, and visits tiles of the `other`. With X
// for Q or K and Y for dO or V it makes own X · other Xᵀ = S (or Sᵀ) and own Y · other Yᵀ = dP (or
// dPᵀ), and sums products of P and dS with the other's X and Y.
#pragma once

#include "cuda/evaluate.cuh"
#include "cuda/fragments.cuh"
#include "cuda/mma_copy.cuh"
#include "cuda/mma_logits.cuh"
#include "cuda/mma_steps.cuh"
#include "cuda/states.cuh"

namespace sparse_attn::cuda {

template <class S, int kHeadSize, Grad kGrad>
constexpr Shape kBackwardShape = kGrad == Grad::kQuery ? kGradQueryShape<sizeof(S), kHeadSize>
                                                       : kGradKeyValueShape<sizeof(S), kHeadSize>;

/// `kGeneral`: visits may be left to the pass's program, and calls have modifiers.
template <class S, int kHeadSize, Grad kGrad, bool kGeneral>
class MmaBackward {
  static constexpr bool kByRows = kGrad == Grad::kQuery;
  static constexpr bool kNeedsX = kGrad != Grad::kValue;  // a sum of dS times X
  static constexpr bool kNeedsY = kGrad == Grad::kKeyValue || kGrad == Grad::kValue;
  static constexpr Shape kShape = kBackwardShape<S, kHeadSize, kGrad>;
  static constexpr int kGroup = kShape.group, kColumns = kShape.columns, kStages = kShape.stages;
  static constexpr int kTileBytes = kMaxTile * kRowBytes<S, kHeadSize>;
  static constexpr int kPartBytes = kColumns * kRowBytes<S, kHeadSize>;
  /// For each of two steps: words of the task's tiles, those that dropout keeps, log-sum-exp and
  /// delta of 64 rows.
  static constexpr int kWordsBytes = kGroup * kMaxTile * static_cast<int>(sizeof(std::uint64_t));
  static constexpr int kStatsBytes = 2 * kMaxTile * static_cast<int>(sizeof(float));
  using Products = WarpProducts<S, kHeadSize, kGroup>;
  using Steps = TaskSteps<kColumns>;
  using Logits = float[kGroup][kColumns / 8][4];
  using Sums = float[kGroup][kHeadSize / 8][4];

 public:
  static constexpr int kThreads = kMmaThreads;
  static constexpr int kBlocksPerSM = kShape.blocks;
  static constexpr int kSharedBytes = 2 * kGroup * kTileBytes + kStages * 2 * kPartBytes +
                                      2 * (kWordsBytes + (kByRows ? 0 : kStatsBytes)) +
                                      (kGeneral ? 2 * kWordsBytes + kMostCovers : 0);
  static_assert(kSharedBytes <= kMostShared);
  static constexpr int kTilesPerTask = kGroup;

  static __device__ void run(const Arguments& a) {
    const Work work(a, kByRows ? Side::kRows : Side::kKeys);
    if (!work.found()) return;
    if (a.grad_query.add && !work.has_visits()) return;
    MmaBackward(a, work).run();
  }

 private:
  /// One head's tensors, by their place in the products.
  struct Heads {
    __device__ Heads(const Arguments& a, const Work& work, std::int64_t head) : number(head) {
      const HeadView<const S> query = query_head<S>(a.call, work.batch, head),
                              grad = grad_output_head<S>(a.call, work.batch, head),
                              key = key_head<S>(a.call, work.batch, head),
                              value = value_head<S>(a.call, work.batch, head);
      own_x = kByRows ? query : key;
      own_y = kByRows ? grad : value;
      other_x = kByRows ? key : query;
      other_y = kByRows ? value : grad;
      const std::int64_t row = (work.batch * a.call.heads + head) * a.call.n_q;
      lse = static_cast<const float*>(a.call.lse) + row;
      delta = static_cast<const float*>(a.delta) + row;
    }
    const std::int64_t number;
    HeadView<const S> own_x, own_y, other_x, other_y;
    const float* lse;
    const float* delta;
  };

  __device__ MmaBackward(const Arguments& a, const Work& work)
      : a_(a),
        work_(work),
        list_(work.pass->token_list),
        warp_row_(static_cast<int>(threadIdx.x) / 32 * 16),
        own_x_(shared_memory()),
        own_y_(own_x_ + kGroup * kTileBytes),
        ring_(own_y_ + kGroup * kTileBytes),
        words_(ring_ + kStages * 2 * kPartBytes),
        stats_(words_ + 2 * kWordsBytes),
        keeps_(stats_ + (kByRows ? 0 : 2 * kStatsBytes)),
        covers_(kGeneral && work.pass->program != nullptr
                    ? reinterpret_cast<std::uint8_t*>(keeps_ + 2 * kWordsBytes)
                    : nullptr),
        drops_(kGeneral && a.call.modifiers.dropout_p > 0.0),
        keep_factor_(drops_ ? keep_factor<float>(a.call.modifiers) : 1.0f) {}

  __device__ void run() {
#pragma unroll
    for (int g = 0; g < kGroup; ++g) {
      clear(sum_x_[g]);
      clear(sum_y_[g]);
    }
    if (kGeneral && covers_ != nullptr) {
      load_covers(covers_, a_, work_, kThreads);
      sync_threads();
    }
    load_own();
    load_row_stats();
    for (std::int64_t head = work_.head; head < work_.end_head(); ++head) sweep(head);
    write();
  }

  /// All visits of the task, for one head of queries.
  __device__ void sweep(std::int64_t head) {
    const Heads heads(a_, work_, head);
    Steps coming(work_, covers_), now(work_, covers_);
    for (int i = 0; i < kStages - 1; ++i) copy_next(heads, coming, i);
    prepare(heads, now, 0);
    for (int i = 0; !now.done(); now.next(), ++i) {
      if (kStages == 1) {
        sync_threads();  // all are done with the only place
        copy_next(heads, coming, i);
      }
      cp_async_wait<(kStages > 1 ? kStages - 2 : 0)>();
      sync_threads();
      if (kStages > 1) copy_next(heads, coming, i + kStages - 1);
      Steps next = now;
      next.next();
      prepare(heads, next, i + 1);
      step(heads, now, i);
    }
    cp_async_wait<0>();
    sync_threads();  // the next head takes the same places
  }

  __device__ void step(const Heads& heads, const Steps& now, int i) {
    if constexpr (kGeneral) {
      step_with_modifiers(heads, now, i);
      return;
    }
    const unsigned active = now.active(kGroup);
    const char* x = ring_ + i % kStages * 2 * kPartBytes;
    const char* y = x + kPartBytes;
    Logits p;
    Products::template rows_by_rows<kColumns>(p, own_x_, warp_row_, x, active);
    probabilities(p, now, i, active, static_cast<float>(a_.call.scale));
    if (kNeedsY) Products::template add_by_columns<kColumns>(sum_y_, p, y, active);
    if (!kNeedsX) return;
    Logits ds;
    Products::template rows_by_rows<kColumns>(ds, own_y_, warp_row_, y, active);
    logit_gradients(ds, p, now, i);
    Products::template add_by_columns<kColumns>(sum_x_, ds, x, active);
  }

  /// The same; dS = `weights` ∘ (D ∘ dP - delta), where weights = P ∘ (derivative of the logits in
  /// the scaled products) and D is dropout. By tiles of keys P ∘ D makes dV.
  __device__ void step_with_modifiers(const Heads& heads, const Steps& now, int i) {
    const FragmentPlace place{work_, now.tile(), warp_row_, now.first_column(), now.active(kGroup)};
    const char* x = ring_ + i % kStages * 2 * kPartBytes;
    const char* y = x + kPartBytes;
    Logits p, weights, slopes;
    Products::template rows_by_rows<kColumns>(p, own_x_, warp_row_, x, place.active);
    const bool shapes = a_.call.modifiers.change_logits();
    if (shapes) {
      shape_fragments<kByRows>(p, slopes, HeadLogits<float>(a_.call, work_.batch, heads.number),
                               place);
    }
    probabilities(p, now, i, place.active, shapes ? 1.0f : static_cast<float>(a_.call.scale));
#pragma unroll
    for (int g = 0; g < kGroup; ++g) weigh(weights[g], p[g], slopes[g], shapes);
    if (kNeedsY) {
      drop(p, place, i, 1.0f);
      Products::template add_by_columns<kColumns>(sum_y_, p, y, place.active);
    }
    if (!kNeedsX) return;
    Logits ds;
    Products::template rows_by_rows<kColumns>(ds, own_y_, warp_row_, y, place.active);
    drop(ds, place, i, keep_factor_);
    logit_gradients(ds, weights, now, i);
    Products::template add_by_columns<kColumns>(sum_x_, ds, x, place.active);
  }

  // ---- copies
  // ------------------------------------------------------------------------------------

  /// Dead rows of queries (without keys, or another tile's) become zeros, whatever they hold.
  __device__ void load_own() {
    const Heads heads(a_, work_, work_.head);
#pragma unroll
    for (int g = 0; g < kGroup; ++g) {
      if (!work_.has_tile(g)) continue;
      const Tile& tile = work_.own_tile(g);
      const auto live = [&](int i) { return is_live(heads, work_, tile, g, i); };
      copy_rows<S, kHeadSize, kMaxTile>(own_x_ + g * kTileBytes, heads.own_x, tile, list_, 0,
                                        static_cast<int>(a_.call.head_dim), live);
      copy_rows<S, kHeadSize, kMaxTile>(own_y_ + g * kTileBytes, heads.own_y, tile, list_, 0,
                                        static_cast<int>(a_.call.value_dim), live);
    }
    cp_async_commit();
  }

  __device__ bool is_live(const Heads& heads, const Work& work, const Tile& tile, int g,
                          int i) const {
    const std::int64_t t = token(tile, list_, i);
    if (kByRows) return work.owns(g, i) && heads.lse[t] != -kInfinity;
    const std::uint8_t* padding = padding_of(a_.call, work.batch);
    return padding == nullptr || padding[t] == 0;
  }

  __device__ void copy_next(const Heads& heads, Steps& steps, int number) {
    if (!steps.done()) {
      const Tile& tile = work_.other_tile(steps.tile());
      const std::uint8_t* padding = padding_of(a_.call, work_.batch);
      const auto live = [&](int i) {
        const std::int64_t t = token(tile, list_, i);
        if (kByRows) return padding == nullptr || padding[t] == 0;
        return heads.lse[t] != -kInfinity;
      };
      char* x = ring_ + number % kStages * 2 * kPartBytes;
      copy_rows<S, kHeadSize, kColumns>(x, heads.other_x, tile, list_, steps.first_column(),
                                        static_cast<int>(a_.call.head_dim), live);
      copy_rows<S, kHeadSize, kColumns>(x + kPartBytes, heads.other_y, tile, list_,
                                        steps.first_column(), static_cast<int>(a_.call.value_dim),
                                        live);
      steps.next();
    }
    cp_async_commit();
  }

  // ---- what a step needs besides its tiles -----------------------------------------------------

  __device__ std::uint64_t* words(int i) const {
    return reinterpret_cast<std::uint64_t*>(words_ + i % 2 * kWordsBytes);
  }
  __device__ std::uint64_t* keeps(int i) const {
    return reinterpret_cast<std::uint64_t*>(keeps_ + i % 2 * kWordsBytes);
  }
  __device__ float* stats(int i) const {
    return reinterpret_cast<float*>(stats_ + i % 2 * kStatsBytes);
  }

  __device__ bool is_masked(const Steps& step, int g) const {
    const Tile& keys = kByRows ? work_.other_tile(step.tile()) : work_.own_tile(g);
    return needs_words(a_.call, keys, step.mask(g));
  }

  /// Writes the masks of step number i, what dropout keeps, and by tiles of keys the rows'
  /// log-sum-exps and deltas: +inf for rows that are another tile's or beyond the end, so that
  /// their P is 0.
  __device__ void prepare(const Heads& heads, const Steps& step, int i) {
    if (step.done()) return;
    for (int g = 0; g < kGroup; ++g) {
      if (step.mask(g) == kSkip) continue;
      if (drops_) prepare_keeps(heads, step, i, g);
      if (!is_masked(step, g)) continue;
      load_words<kGeneral>(words(i) + g * kMaxTile, a_, work_, g, step.tile(), step.mask(g));
    }
    if (kByRows) return;
    const RowTile& rows = work_.pass->row_tiles[step.tile()];
    for (int r = static_cast<int>(threadIdx.x); r < kMaxTile; r += kThreads) {
      float lse = kInfinity, delta = 0.0f;
      if (r < rows.rows.count && (rows.owned >> r & 1)) {
        const std::int64_t row = token(rows.rows, list_, r);
        if (heads.lse[row] != -kInfinity) {
          lse = heads.lse[row] * kLog2E;
          delta = heads.delta[row];
        }
      }
      stats(i)[r] = lse;
      stats(i)[kMaxTile + r] = delta;
    }
  }

  __device__ void prepare_keeps(const Heads& heads, const Steps& step, int i, int g) const {
    const HeadDropout dropout(a_.call, work_.batch, heads.number);
    const Tile &own = work_.own_tile(g), &other = work_.other_tile(step.tile());
    const TilePart part{step.first_column(), kColumns};
    std::uint64_t* words = keeps(i) + g * kMaxTile;
    if (kByRows) {
      load_keeps(words, dropout, list_, own, {}, other, part);
    } else {
      load_keeps(words, dropout, list_, other, part, own, {});
    }
  }

  /// By tiles of rows, each lane keeps those of its own two rows.
  __device__ void load_row_stats() {
    if (!kByRows) return;
    const Heads heads(a_, work_, work_.head);
#pragma unroll
    for (int g = 0; g < kGroup; ++g) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        row_lse_[g][half] = kInfinity;
        row_delta_[g][half] = 0.0f;
        if (!work_.owns(g, row_in_tile(half))) continue;
        const std::int64_t row = token(work_.own_tile(g), list_, row_in_tile(half));
        if (heads.lse[row] == -kInfinity) continue;
        row_lse_[g][half] = heads.lse[row] * kLog2E;
        row_delta_[g][half] = heads.delta[row];
      }
    }
  }

  __device__ int row_in_tile(int half) const { return fragment_row(warp_row_, half); }

  // ---- elements
  // ----------------------------------------------------------------------------------

  /// S -> P = exp(S - lse), 0 where masked. The scale leads from `p` to natural logits.
  __device__ void probabilities(Logits& p, const Steps& step, int number, unsigned active,
                                float natural_scale) {
    const float scale = natural_scale * kLog2E;
    const float* lse = stats(number) + step.first_column();
#pragma unroll
    for (int g = 0; g < kGroup; ++g) {
      if (!(active >> g & 1)) continue;
      if (is_masked(step, g)) mask(p[g], step, words(number) + g * kMaxTile);
#pragma unroll
      for (int n = 0; n < kColumns / 8; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float of_row = kByRows ? row_lse_[g][i / 2] : lse[fragment_column(n, i)];
          p[g][n][i] = exp2_approx(fmaf(p[g][n][i], scale, -of_row));
        }
      }
    }
  }

  __device__ void mask(float (&p)[kColumns / 8][4], const Steps& step,
                       const std::uint64_t* of_keys) const {
    if constexpr (kByRows) {
      mask_columns(p, of_keys + step.first_column(), warp_row_);
    } else {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const std::uint64_t rows = of_keys[row_in_tile(half)] >> step.first_column();
#pragma unroll
        for (int n = 0; n < kColumns / 8; ++n) {
#pragma unroll
          for (int i = 2 * half; i < 2 * half + 2; ++i) {
            if (!(rows >> fragment_column(n, i) & 1)) p[n][i] = -kInfinity;
          }
        }
      }
    }
  }

  /// dP -> dS = P (dP - delta). The scale waits for the sum.
  __device__ void logit_gradients(Logits& ds, const Logits& p, const Steps& step, int number) {
    const float* delta = stats(number) + kMaxTile + step.first_column();
#pragma unroll
    for (int g = 0; g < kGroup; ++g) {
#pragma unroll
      for (int n = 0; n < kColumns / 8; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float of_row = kByRows ? row_delta_[g][i / 2] : delta[fragment_column(n, i)];
          ds[g][n][i] = p[g][n][i] * (ds[g][n][i] - of_row);
        }
      }
    }
  }

  __device__ void drop(Logits& x, const FragmentPlace& place, int number, float factor) const {
    if (!drops_) return;
#pragma unroll
    for (int g = 0; g < kGroup; ++g)
      drop_fragments<kByRows>(x[g], keeps(number) + g * kMaxTile, place, factor);
  }

  // ---- results
  // -----------------------------------------------------------------------------------

  __device__ void write() {
#pragma unroll
    for (int g = 0; g < kGroup; ++g) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = row_in_tile(half);
        if (!work_.owns(g, row)) continue;
        const auto sink = [&](const Gradient& to, void* slots, int size) {
          return GradientSink<S>(a_, work_, to, slots, g, row, size);
        };
        const int head_dim = static_cast<int>(a_.call.head_dim),
                  value_dim = static_cast<int>(a_.call.value_dim);
        if (kNeedsX) {
          // A query without keys gets 0 even if a value that it does not see is NaN.
          const bool is_dead = kByRows && row_lse_[g][half] == kInfinity;
          write_row(sink(kByRows ? a_.grad_query : a_.grad_key, a_.slots_key, head_dim), sum_x_[g],
                    half, is_dead ? 0.0f : static_cast<float>(a_.call.scale), head_dim);
        }
        if (kNeedsY) {
          write_row(sink(a_.grad_value, a_.slots_value, value_dim), sum_y_[g], half,
                    kGeneral ? keep_factor_ : 1.0f, value_dim);
        }
      }
    }
  }

  const Arguments& a_;
  const Work& work_;
  const std::int64_t* const list_;
  const int warp_row_;
  char* const own_x_;
  char* const own_y_;
  char* const ring_;
  char* const words_;
  char* const stats_;
  char* const keeps_;
  std::uint8_t* const covers_;
  const bool drops_;
  const float keep_factor_;
  Sums sum_x_, sum_y_;
  float row_lse_[kGroup][2], row_delta_[kGroup][2];
};

}  // namespace sparse_attn::cuda
