// Backward on sm_90a: as mma_backward.cuh, a sweep by tiles of rows for dQ and one by tiles of keys
// for dK and dV, so that nothing is added by two blocks. A warpgroup has a tile of its own side,
// and products of one visit go on while the elements of the next are computed.
#pragma once

#include <type_traits>

#include "cuda/config.h"
#include "cuda/consumer_sm90.cuh"
#include "cuda/products_sm90.cuh"

namespace sparse_attn::cuda {

/// kGrad: kQuery or kKeyValue. `kEvaluates`: visits may be left to the pass's program.
template <class S, int kHeadSize, Grad kGrad, bool kEvaluates>
class Sm90Backward {
  static constexpr bool kByRows = kGrad == Grad::kQuery;
  static constexpr Side kSide = kByRows ? Side::kRows : Side::kKeys;
  static constexpr int kStages = kHeadSize > 64 ? 6 : 8, kCovers = kEvaluates ? kMostCovers : 0;
  using Products = WarpgroupProducts<S, kHeadSize>;
  using Note = std::conditional_t<kByRows, KeysNote, RowsNote>;
  using Shared = Sm90Shared<2, kStages, Products::Copies::kTileBytes, Note, kCovers>;
  using Place = typename Shared::Other::Place;
  using OwnPlace = typename Shared::Own::Place;
  using Base = Consumer<kSide, kEvaluates, Shared>;

 public:
  static constexpr int kThreads = kSm90Threads;
  static constexpr int kBlocksPerSM = 1;
  static constexpr int kSharedBytes = Shared::kBytes;

  static __device__ void run(const Sm90Arguments& a) {
    const Shared shared(shared_memory());
    shared.init();
    if (threadIdx.x < kWarpgroup) {
      lower_registers<kProducerRegisters>();
      Producer<S, kHeadSize, kSide, kEvaluates, Shared>(a, shared).run(a.base.grad_query.add);
    } else {
      raise_registers<kConsumerRegisters>();
      OwnTile(a, shared).run();
    }
  }

 private:
  /// A consumer and its tile.
  class OwnTile : Base {
    using Base::a_, Base::all_, Base::masked_, Base::number_, Base::place_, Base::row, Base::scale_,
        Base::shared_, Base::words_;
    using Logits = typename Products::Logits;
    using Sums = typename Products::Sums;

   public:
    __device__ OwnTile(const Sm90Arguments& a, const Shared& shared) : Base(a, shared) {}

    __device__ void run() {
      for_each_task(all_, kSide, a_.grad_query.add, [&](const Work& work, std::int64_t task) {
        sum(work);
        // The fields of `work` would take 20 registers all the while.
        write(work_of(all_, kSide, anew(task)));
      });
    }

   private:
    /// All visits, of all heads of queries.
    __device__ void sum(const Work& work) {
      clear(sum_x_);
      if constexpr (!kByRows) clear(sum_y_);
      const bool has_tile = any_lane(work.has_tile(number_));
      if (has_tile) load_own(work);
      while (this->seek()) stream(work);
      if (!kByRows && has_tile) release_own();
    }

    // ---- the own tile -------------------------------------------------------------------------

    /// Q and dO go to registers. For K and V beside two sums there are none: these stay where they
    /// are until the task is done.
    __device__ void load_own(const Work& work) {
      shared_.own(number_).await_full(own_place_);
      shared_.own(number_).await_full(own_place_.following());
      if constexpr (kByRows) {
        Products::load_rows(own_x_, own_tile(Operand::kX));
        Products::load_rows(own_y_, own_tile(Operand::kY));
        release_own();
      }
      const std::uint8_t* padding = padding_of(a_.call, work.batch);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        counts_[half] = kByRows;
        lse_[half] = kInfinity;
        delta_[half] = 0.0f;
        if (!work.owns(number_, row(half))) continue;
        const std::int64_t t = work.own_token(number_, row(half));
        if constexpr (kByRows) {
          load_row(first_row_of(a_.call, work.batch, work.head) + t, half);
        } else {
          counts_[half] = padding == nullptr || padding[t] == 0;
        }
      }
    }

    __device__ void release_own() {
      for (int i = 0; i < 2; ++i, own_place_.next()) shared_.own(number_).release(own_place_);
    }

    __device__ const char* own_tile(Operand which) const {
      return shared_.own(number_).tile(OwnPlace{which == Operand::kX ? 0 : 1});
    }

    __device__ void load_row(std::int64_t number, int half) {
      const float lse = static_cast<const float*>(a_.call.lse)[number];
      if (lse == -kInfinity) return;
      lse_[half] = lse * kLog2E;
      delta_[half] = static_cast<const float*>(a_.delta)[number];
    }

    // ---- products -----------------------------------------------------------------------------

    /// Visits that follow each other: S of the next is made while the sums of this one are. dP then
    /// has to wait for the sums, whose operands it takes the registers of.
    __device__ void stream(const Work& work) {
      start_logits(work);
      start_other_products(place_.following());
      for (;;) {
        const Place x = place_, y = place_.following();
        sum_pair(x, y);
        place_ = y.following();
        if (!this->is_mine()) {
          wgmma_wait<0>();
          finish_sums(x, y);
          return;
        }
        start_logits(work);
        wgmma_wait<1>();
        finish_sums(x, y);
        start_other_products(place_.following());
      }
    }

    /// S and dP are under way when it begins, what they add to the sums when it returns.
    __device__ void sum_pair(const Place& x, const Place& y) {
      wgmma_wait<1>();
      pin(s_);
      probabilities(shared_.note(x));
      wgmma_wait<0>();
      pin(dp_);
      logit_gradients(shared_.note(x));
      Products::as_operand(ds_, dp_);
      Products::start_columns(sum_x_, ds_, shared_.other().tile(x));
      if constexpr (!kByRows) {
        Products::as_operand(p_, s_);
        Products::start_columns(sum_y_, p_, shared_.other().tile(y));
      }
    }

    __device__ void finish_sums(const Place& x, const Place& y) {
      pin(sum_x_);
      if constexpr (!kByRows) pin(sum_y_);
      shared_.other().release(x);
      shared_.other().release(y);
    }

    /// S or its transpose, of the visit that comes next.
    __device__ void start_logits(const Work& work) {
      this->load_words(work, shared_.note(place_), counts_);
      start_product(s_, Operand::kX, place_);
    }
    /// dP or its transpose.
    __device__ void start_other_products(const Place& y) {
      shared_.other().await_full(y);
      start_product(dp_, Operand::kY, y);
    }
    __device__ void start_product(Logits& d, Operand which, const Place& place) {
      const char* other = shared_.other().tile(place);
      if constexpr (kByRows) {
        Products::start_rows(d, which == Operand::kX ? own_x_ : own_y_, other);
      } else {
        Products::start_rows(d, own_tile(which), other);
      }
    }

    // ---- elements -----------------------------------------------------------------------------

    /// S -> P = exp(S - lse), 0 where masked.
    __device__ void probabilities(const Note& note) {
      if (masked_) mask_rows(s_, words_);
#pragma unroll
      for (int n = 0; n < kMaxTile / 8; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          float of_row;
          if constexpr (kByRows) {
            of_row = lse_[i / 2];
          } else {
            of_row = note.lse[fragment_column(n, i)];
          }
          s_[n][i] = exp2_approx(fmaf(s_[n][i], scale_, -of_row));
        }
      }
    }

    /// dP -> dS = P (dP - delta). The scale waits for the sum.
    __device__ void logit_gradients(const Note& note) {
#pragma unroll
      for (int n = 0; n < kMaxTile / 8; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          float of_row;
          if constexpr (kByRows) {
            of_row = delta_[i / 2];
          } else {
            of_row = note.delta[fragment_column(n, i)];
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
        if (!work.owns(number_, row(half))) continue;
        // A query without keys gets 0 even if a value that it does not see is NaN.
        const bool is_dead = kByRows && lse_[half] == kInfinity;
        write_row(GradientSink<S>(a_, work, to, slots, number_, row(half), size), sums, half,
                  is_dead ? 0.0f : factor, size);
      }
    }

    OwnPlace own_place_;
    typename Products::Rows own_x_, own_y_;
    Logits s_, dp_;
    typename Products::Operand p_, ds_;
    Sums sum_x_, sum_y_;
    float lse_[2], delta_[2];
    bool counts_[2];
  };
};

}  // namespace sparse_attn::cuda
