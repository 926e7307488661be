// Forward on sm_90a: as mma_forward.cuh, but with warpgroups that have a tile of rows each, and
// skip the key tiles that their rows do not see. While the products with one tile of values go on,
// so does the softmax of the next tile of keys.
#pragma once

#include "cuda/producer_sm90.cuh"
#include "cuda/products_sm90.cuh"
#include "cuda/softmax_fragments.cuh"

namespace sparse_attn::cuda {

template <class S, int kHeadSize>
class Sm90Forward {
  using Copies = TileCopies<S, kHeadSize>;
  using Products = WarpgroupProducts<S, kHeadSize>;
  using Shared = Sm90Shared<1, 8, Copies::kTileBytes, KeysNote>;
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
      Producer<S, kHeadSize, Side::kRows, ComingKeys, Shared>(a, shared).run(!a.base.first);
    } else {
      raise_registers<kConsumerRegisters>();
      Consumer(a, shared).run();
    }
  }

 private:
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
      for_each_task(all_, Side::kRows, !a_.first,
                    [&](const Work& work, std::int64_t) { attend(work); });
    }

   private:
    using State = StateFragments<S, kHeadSize / 8>;

    __device__ void attend(const Work& work) {
      State state{o_, maximum_, sum_};
      state.clear();
      if (!a_.first && work.task->slot < 0) state.resume(a_, work, consumer_, warp_row_, 1.0f);
      if (any_lane(work.has_tile(consumer_))) load_queries();
      ConsumerWalk walk(work, consumer_);
      while (walk.seek(shared_.other(), place_)) stream(work, walk);
      state.write(a_, work, consumer_, warp_row_, 1.0f);
    }

    __device__ void load_queries() {
      const auto own = shared_.own(consumer_);
      own.await_full(own_place_);
      Products::load_rows(q_, own.tile(own_place_));
      own.release(own_place_);
      own_place_.next();
    }

    /// Visits that follow each other: S of the next is made before P V of this one.
    __device__ void stream(const Work& work, ConsumerWalk& walk) {
      Place values = place_.following();
      start_logits(work, walk, place_);
      wgmma_wait<0>();
      finish_logits(place_);
      rescale_output();
      for (;;) {
        Products::as_operand(p_, s_);
        walk.next();
        if (!walk.is_mine()) break;
        const Place keys = values.following();
        start_logits(work, walk, keys);
        start_output(values);
        wgmma_wait<1>();
        finish_logits(keys);
        finish_output(values);
        rescale_output();
        values = keys.following();
      }
      start_output(values);
      finish_output(values);
      place_ = values.following();
    }

    __device__ void start_logits(const Work& work, const ConsumerWalk& walk, const Place& keys) {
      shared_.other().await_full(keys);
      load_words(work, walk.mask(), shared_.note(keys).live);
      pin(s_);
      wgmma_fence();
      Products::rows_by_rows(s_, q_, shared_.other().tile(keys));
      wgmma_commit();
    }

    __device__ void start_output(const Place& values) {
      shared_.other().await_full(values);
      pin(o_);
      wgmma_fence();
      Products::add_by_columns(o_, p_, shared_.other().tile(values));
      wgmma_commit();
    }

    __device__ void finish_output(const Place& values) {
      wgmma_wait<0>();
      pin(o_);
      shared_.other().release(values);
    }

    /// The keys that each of the lane's two rows sees.
    __device__ void load_words(const Work& work, std::int32_t mask, std::uint64_t live) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        words_[half] =
            mask >= 0 ? work.pass->masks_of_rows[mask][fragment_row(warp_row_, half)] & live : live;
      }
      masked_ = any_lane(mask >= 0 || live != ~std::uint64_t{0});
    }

    /// S is there: P, and what the output so far is to be multiplied with.
    __device__ void finish_logits(const Place& keys) {
      pin(s_);
      shared_.other().release(keys);
      if (masked_) mask_rows(s_, words_);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        factor_[half] = raise_maximum(s_, half, scale_, maximum_[half]);
        sum_[half] *= factor_[half];
        exponentiate(s_, half, scale_, maximum_[half], sum_[half]);
      }
    }

    __device__ void rescale_output() {
      if (!any_lane(factor_[0] != 1.0f || factor_[1] != 1.0f)) return;
#pragma unroll
      for (int half = 0; half < 2; ++half) multiply_row(o_, half, factor_[half]);
    }

    const Arguments& a_;
    const Sm90Arguments& all_;
    const Shared& shared_;
    const int consumer_, warp_row_;
    const float scale_;
    Place place_;  // of the next keys
    OwnPlace own_place_;
    typename Products::Rows q_;
    typename Products::Logits s_;
    typename Products::Operand p_;
    typename Products::Sums o_;
    float maximum_[2], sum_[2], factor_[2];
    std::uint64_t words_[2];
    bool masked_;
  };
};

}  // namespace sparse_attn::cuda
