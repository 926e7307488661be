// Backward on sm_90a: as mma_backward.cuh, a sweep by tiles of rows for dQ and one by tiles of keys
// for dK and dV, so that nothing is added by two blocks. A warpgroup has a tile of its own side,
// and products of one visit go on while the elements of the next are computed.
#pragma once

#include <type_traits>

#include "cuda/config.h"
#include "cuda/fragments.cuh"
#include "cuda/producer_sm90.cuh"
#include "cuda/products_sm90.cuh"

namespace sparse_attn::cuda {

/// kGrad: kQuery or kKeyValue.
template <class S, int kHeadSize, Grad kGrad>
class Sm90Backward {
  static constexpr bool kByRows = kGrad == Grad::kQuery;
  static constexpr Side kSide = kByRows ? Side::kRows : Side::kKeys;
  static constexpr int kStages = kHeadSize > 64 ? 6 : 8;
  using Copies = TileCopies<S, kHeadSize>;
  using Products = WarpgroupProducts<S, kHeadSize>;
  using Coming = std::conditional_t<kByRows, ComingKeys, ComingRows>;
  using Note = typename Coming::Note;
  using Shared = Sm90Shared<2, kStages, Copies::kTileBytes, Note>;
  using Place = typename Shared::Other::Place;
  using OwnPlace = typename Shared::Own::Place;

 public:
  static constexpr int kThreads = kSm90Threads;
  static constexpr int kBlocksPerSM = 1;
  static constexpr int kSharedBytes = Shared::kBytes;

  static __device__ void run(const Sm90Arguments& a) {
    const Shared shared(shared_memory());
    shared.init();
    if (threadIdx.x < kWarpgroup) {
      lower_registers<kProducerRegisters>();
      Producer<S, kHeadSize, kSide, Coming, Shared>(a, shared).run(a.base.grad_query.add);
    } else {
      raise_registers<kConsumerRegisters>();
      Consumer(a, shared).run();
    }
  }

 private:
  static __device__ const float* lse_of(const Arguments& a, std::int64_t batch, std::int64_t head) {
    return static_cast<const float*>(a.call.lse) + first_row_of(a.call, batch, head);
  }
  static __device__ const float* delta_of(const Arguments& a, std::int64_t batch,
                                          std::int64_t head) {
    return static_cast<const float*>(a.delta) + first_row_of(a.call, batch, head);
  }

  class Consumer {
   public:
    __device__ Consumer(const Sm90Arguments& a, const Shared& shared)
        : a_(a.base),
          all_(a),
          shared_(shared),
          consumer_(consumer_number()),
          warp_row_(static_cast<int>(threadIdx.x) % kWarpgroup / 32 * 16),
          scale_(static_cast<float>(a.base.call.scale) * kLog2E) {}

    __device__ void run() {
      for_each_task(all_, kSide, a_.grad_query.add, [&](const Work& work, std::int64_t task) {
        sum(work);
        // The fields of `work` would take 20 registers all the while.
        write(work_of(all_, kSide, anew(task)));
      });
    }

   private:
    using Logits = typename Products::Logits;
    using Sums = typename Products::Sums;

    __device__ void sum(const Work& work) {
      clear(sum_x_);
      if (!kByRows) clear(sum_y_);
      load_own(work);
      const int heads = static_cast<int>(work.end_head() - work.head);
#pragma unroll 1
      for (int i = 0; i < heads; ++i) {
        ConsumerWalk walk(work, consumer_);
        while (walk.seek(shared_.other(), place_)) stream(work, walk);
      }
      let_go_of_own(work);
    }

    // ---- tiles --------------------------------------------------------------------------------

    /// Own X and Y stay where they are until the task is done.
    __device__ void load_own(const Work& work) {
      if (!any_lane(work.has_tile(consumer_))) return;
      shared_.own(consumer_).await_full(own_place_);
      shared_.own(consumer_).await_full(own_place_.following());
      load_own_rows(work);
    }
    __device__ void let_go_of_own(const Work& work) {
      if (!any_lane(work.has_tile(consumer_))) return;
      for (int i = 0; i < 2; ++i, own_place_.next()) shared_.own(consumer_).release(own_place_);
    }

    __device__ int row(int half) const { return fragment_row(warp_row_, half); }

    /// Of the lane's two rows: of queries the log-sum-exp and delta; of keys whether they count.
    __device__ void load_own_rows(const Work& work) {
      const Tile& tile = work.own_tile(consumer_);
      const std::uint8_t* padding = padding_of(a_.call, work.batch);
      all_count_ = tile.count == kMaxTile && padding == nullptr;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        lse_[half] = kInfinity;
        delta_[half] = 0.0f;
        counts_[half] = false;
        if (!work.owns(consumer_, row(half))) continue;
        const std::int64_t t = work.own_token(consumer_, row(half));
        if (!kByRows) {
          counts_[half] = padding == nullptr || padding[t] == 0;
          continue;
        }
        const float lse = lse_of(a_, work.batch, work.head)[t];
        if (lse == -kInfinity) continue;
        lse_[half] = lse * kLog2E;
        delta_[half] = delta_of(a_, work.batch, work.head)[t];
      }
    }

    // ---- products -----------------------------------------------------------------------------

    /// Visits that follow each other: S of the next is made while the sums of this one are. dP then
    /// has to wait for the sums, whose operands it takes the registers of.
    __device__ void stream(const Work& work, ConsumerWalk& walk) {
      Place x = place_, y = x.following();
      start_logits(work, walk, x);
      start_other_products(y);
      for (;;) {
        sum_pair(x, y);
        place_ = y.following();
        walk.next();
        if (!walk.is_mine()) break;
        start_logits(work, walk, place_);
        wgmma_wait<1>();
        finish_sums(x, y);
        x = place_;
        y = x.following();
        start_other_products(y);
      }
      wgmma_wait<0>();
      finish_sums(x, y);
    }

    /// S and dP are under way when it begins, what they add to the sums when it returns.
    __device__ void sum_pair(const Place& x, const Place& y) {
      wgmma_wait<1>();
      pin(s_);
      probabilities(shared_.note(x));
      wgmma_wait<0>();
      pin(dp_);
      logit_gradients(shared_.note(y));
      Products::as_operand(ds_, dp_);
      start_sum(sum_x_, ds_, x);
      if constexpr (!kByRows) {
        Products::as_operand(p_, s_);
        start_sum(sum_y_, p_, y);
      }
    }

    __device__ void finish_sums(const Place& x, const Place& y) {
      pin(sum_x_);
      if constexpr (!kByRows) pin(sum_y_);
      shared_.other().release(x);
      shared_.other().release(y);
    }

    /// S or its transpose.
    __device__ void start_logits(const Work& work, const ConsumerWalk& walk, const Place& x) {
      shared_.other().await_full(x);
      load_words(work, walk, shared_.note(x));
      start_product(s_, Operand::kX, x);
    }
    /// dP or its transpose.
    __device__ void start_other_products(const Place& y) {
      shared_.other().await_full(y);
      start_product(dp_, Operand::kY, y);
    }
    __device__ void start_product(Logits& d, Operand which, const Place& place) {
      const char* own = shared_.own(consumer_).tile(OwnPlace{which == Operand::kX ? 0 : 1});
      pin(d);
      wgmma_fence();
      Products::rows_by_rows(d, own, shared_.other().tile(place));
      wgmma_commit();
    }

    __device__ void start_sum(Sums& sums, const typename Products::Operand& p, const Place& place) {
      pin(sums);
      wgmma_fence();
      Products::add_by_columns(sums, p, shared_.other().tile(place));
      wgmma_commit();
    }

    // ---- elements -----------------------------------------------------------------------------

    /// For each of the lane's two rows, which of the other side's it sees, or is seen by.
    __device__ void load_words(const Work& work, const ConsumerWalk& walk, const Note& note) {
      const std::int32_t mask = walk.mask();
      std::uint64_t live = ~std::uint64_t{0};
      if constexpr (kByRows) live = note.live;
      masked_ = any_lane(mask >= 0 || live != ~std::uint64_t{0} || (!kByRows && !all_count_));
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        words_[half] = mask < 0  ? live
                       : kByRows ? work.pass->masks_of_rows[mask][row(half)] & live
                                 : work.pass->masks[mask][row(half)];
        if (!kByRows && !counts_[half]) words_[half] = 0;
      }
    }

    /// S -> P = exp(S - lse), 0 where masked.
    __device__ void probabilities(const Note& lse) {
      if (masked_) mask_rows(s_, words_);
#pragma unroll
      for (int n = 0; n < kMaxTile / 8; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          float of_row;
          if constexpr (kByRows) {
            of_row = lse_[i / 2];
          } else {
            of_row = lse.of_rows[fragment_column(n, i)];
          }
          s_[n][i] = exp2_approx(fmaf(s_[n][i], scale_, -of_row));
        }
      }
    }

    /// dP -> dS = P (dP - delta). The scale waits for the sum.
    __device__ void logit_gradients(const Note& delta) {
#pragma unroll
      for (int n = 0; n < kMaxTile / 8; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          float of_row;
          if constexpr (kByRows) {
            of_row = delta_[i / 2];
          } else {
            of_row = delta.of_rows[fragment_column(n, i)];
          }
          dp_[n][i] = s_[n][i] * (dp_[n][i] - of_row);
        }
      }
    }

    // ---- results ------------------------------------------------------------------------------

    __device__ void write(const Work& work) {
      const auto scale = static_cast<float>(a_.call.scale);
      if constexpr (kByRows) {
        write(work, sum_x_, a_.grad_query, a_.slots_key, a_.call.head_dim, scale);
      } else {
        write(work, sum_x_, a_.grad_key, a_.slots_key, a_.call.head_dim, scale);
        write(work, sum_y_, a_.grad_value, a_.slots_value, a_.call.value_dim, 1.0f);
      }
    }

    __device__ void write(const Work& work, const Sums& sums, const Gradient& to, void* slots,
                          std::int64_t columns, float factor) const {
      const int size = static_cast<int>(columns);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        if (!work.owns(consumer_, row(half))) continue;
        // A query without keys gets 0 even if a value that it does not see is NaN.
        const bool is_dead = kByRows && lse_[half] == kInfinity;
        write_row(GradientSink<S>(a_, work, to, slots, consumer_, row(half), size), sums, half,
                  is_dead ? 0.0f : factor, size);
      }
    }

    const Arguments& a_;
    const Sm90Arguments& all_;
    const Shared& shared_;
    const int consumer_, warp_row_;
    const float scale_;
    Place place_;
    OwnPlace own_place_;
    Logits s_, dp_;
    typename Products::Operand p_, ds_;
    Sums sum_x_, sum_y_;
    float lse_[2], delta_[2];
    bool counts_[2], all_count_;
    std::uint64_t words_[2];
    bool masked_;
  };
};

}  // namespace sparse_attn::cuda
