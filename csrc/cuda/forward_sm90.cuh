// Forward on sm_90a: as mma_forward.cuh, but with warpgroups that have a tile of rows each, and
// skip the key tiles that their rows do not see. While the products with one tile of values go on,
// so does the softmax of the next tile of keys.
#pragma once

#include "cuda/consumer_sm90.cuh"
#include "cuda/products_sm90.cuh"
#include "cuda/softmax_fragments.cuh"

namespace sparse_attn::cuda {

/// `kEvaluates`: visits may be left to the pass's program.
template <class S, int kHeadSize, bool kEvaluates>
class Sm90Forward {
  static constexpr int kStages = 8, kCovers = kEvaluates ? kMostCovers : 0;
  /// A multiprocessor makes 16 exponentials in a cycle: for heads of 64 as many cycles as the
  /// products take. A quarter goes to the pipes for multiplications, which have that much time.
  static constexpr int kPolynomials = kHeadSize <= 64 ? 4 : 0;
  using Products = WarpgroupProducts<S, kHeadSize>;
  using Shared = Sm90Shared<1, kStages, Products::Copies::kTileBytes, KeysNote, kCovers>;
  using Place = typename Shared::Other::Place;
  using Base = Consumer<Side::kRows, kEvaluates, Shared>;

 public:
  static constexpr int kThreads = kSm90Threads;
  static constexpr int kBlocksPerSM = 1;
  static constexpr int kSharedBytes = Shared::kBytes;

  static __device__ void run(const Sm90Arguments& a) {
    const Shared shared(shared_memory());
    shared.init();
    if (threadIdx.x < kWarpgroup) {
      lower_registers<kProducerRegisters>();
      Producer<S, kHeadSize, Side::kRows, kEvaluates, Shared>(a, shared).run(!a.base.first);
    } else {
      raise_registers<kConsumerRegisters>();
      Rows(a, shared).run();
    }
  }

 private:
  /// A consumer and its tile of rows.
  class Rows : Base {
    using Base::a_, Base::all_, Base::masked_, Base::number_, Base::place_, Base::shared_,
        Base::warp_row_, Base::words_;

   public:
    __device__ Rows(const Sm90Arguments& a, const Shared& shared) : Base(a, shared) {}

    __device__ void run() {
      for_each_task(all_, Side::kRows, !a_.first,
                    [&](const Work& work, std::int64_t) { attend(work); });
    }

   private:
    using State = StateFragments<S, kHeadSize / 8>;

    __device__ void attend(const Work& work) {
      State state{o_, maximum_, sum_};
      state.clear();
      if (!a_.first && work.task->slot < 0) state.resume(a_, work, number_, warp_row_, 1.0f);
      if (any_lane(work.has_tile(number_))) load_queries();
      while (this->seek()) stream(work);
      state.write(a_, work, number_, warp_row_, 1.0f);
    }

    __device__ void load_queries() {
      const auto own = shared_.own(number_);
      own.await_full(own_place_);
      Products::load_rows(q_, own.tile(own_place_));
      own.release(own_place_);
      own_place_.next();
    }

    /// Visits that follow each other: S of the next is made before P V of this one.
    __device__ void stream(const Work& work) {
      start_logits(work);
      wgmma_wait<0>();
      finish_logits(place_);
      rescale_output();
      Place values = place_.following();
      for (;;) {
        Products::as_operand(p_, s_);
        place_ = values.following();
        if (!this->is_mine()) break;
        start_logits(work);
        start_output(values);
        wgmma_wait<1>();
        finish_logits(place_);
        finish_output_and_rescale(values);
        values = place_.following();
      }
      start_output(values);
      finish_output(values);
    }

    /// Of the visit that comes next.
    __device__ void start_logits(const Work& work) {
      const bool all[2] = {true, true};
      this->load_words(work, shared_.note(place_), all);
      Products::start_rows(s_, q_, shared_.other().tile(place_));
    }

    __device__ void start_output(const Place& values) {
      shared_.other().await_full(values);
      Products::start_columns(o_, p_, shared_.other().tile(values));
    }
    __device__ void finish_output(const Place& values) {
      wgmma_wait<0>();
      pin(o_);
      shared_.other().release(values);
    }

    /// S is there: P, and what the output so far is to be multiplied with.
    __device__ void finish_logits(const Place& keys) {
      pin(s_);
      shared_.other().release(keys);
      if (masked_) mask_rows(s_, words_);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        factor_[half] = raise_maximum(s_, half, this->scale_, maximum_[half]);
        sum_[half] *= factor_[half];
        exponentiate<kPolynomials>(s_, half, this->scale_, maximum_[half], sum_[half]);
      }
    }

    /// The vote has to wait for all of the softmax (no sum is negative): or else the assembler
    /// would wait for the output before it, and nothing would overlap.
    __device__ void finish_output_and_rescale(const Place& values) {
      const bool is_one = factor_[0] == 1.0f && factor_[1] == 1.0f;
      if (any_lane(!is_one || sum_[0] < 0.0f || sum_[1] < 0.0f)) {
        finish_output(values);
        rescale_output();
      } else {
        finish_output(values);
      }
    }
    __device__ void rescale_output() {
#pragma unroll
      for (int half = 0; half < 2; ++half) multiply_row(o_, half, factor_[half]);
    }

    typename Shared::Own::Place own_place_;
    typename Products::Rows q_;
    typename Products::Logits s_;
    typename Products::Operand p_;
    typename Products::Sums o_;
    float maximum_[2], sum_[2], factor_[2];
  };
};

}  // namespace sparse_attn::cuda
