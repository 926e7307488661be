// Forward on tensor cores: load Q; for each tile of keys: S = Q Kᵀ, mask, softmax update,
// O += P V; finish.
//
// Four warps have 16 rows of each of the task's tiles. K and V take turns in a ring of shared
// memory, so that V arrives while S is computed and the next K while O is.
#pragma once

#include "cuda/evaluate.cuh"
#include "cuda/mma_copy.cuh"
#include "cuda/mma_logits.cuh"
#include "cuda/mma_steps.cuh"
#include "cuda/softmax_fragments.cuh"

namespace sparse_attn::cuda {

/// `kGeneral`: visits may be left to the pass's program, and calls have modifiers.
template <class S, int kHeadSize, bool kGeneral>
class MmaForward {
  static constexpr Shape kShape = kForwardShape<sizeof(S), kHeadSize>;
  static constexpr int kGroup = kShape.group, kColumns = kShape.columns, kStages = kShape.stages;
  static constexpr int kTileBytes = kMaxTile * kRowBytes<S, kHeadSize>;
  static constexpr int kStageBytes = kColumns * kRowBytes<S, kHeadSize>;
  static constexpr int kWordsBytes = kGroup * kMaxTile * static_cast<int>(sizeof(std::uint64_t));
  using Products = WarpProducts<S, kHeadSize, kGroup>;
  using Steps = TaskSteps<kColumns>;

 public:
  static constexpr int kThreads = kMmaThreads;
  static constexpr int kBlocksPerSM = kShape.blocks;
  static constexpr int kSharedBytes = kGroup * kTileBytes + kStages * kStageBytes + kWordsBytes +
                                      (kGeneral ? kWordsBytes + kMostCovers : 0);
  static_assert(kSharedBytes <= kMostShared);
  static constexpr int kTilesPerTask = kGroup;

  static __device__ void run(const Arguments& a) {
    const Work work(a, Side::kRows);
    if (!work.found()) return;
    if (!a.first && !work.has_visits()) return;
    MmaForward(a, work).attend();
  }

 private:
  __device__ MmaForward(const Arguments& a, const Work& work)
      : a_(a),
        work_(work),
        list_(work.pass->token_list),
        warp_row_(static_cast<int>(threadIdx.x) / 32 * 16),
        queries_(shared_memory()),
        ring_(queries_ + kGroup * kTileBytes),
        words_(reinterpret_cast<std::uint64_t*>(ring_ + kStages * kStageBytes)),
        keeps_(words_ + kGroup * kMaxTile),
        covers_(kGeneral && work.pass->program != nullptr
                    ? reinterpret_cast<std::uint8_t*>(keeps_) + kWordsBytes
                    : nullptr),
        drops_(kGeneral && a.call.modifiers.dropout_p > 0.0),
        keep_factor_(drops_ ? keep_factor<float>(a.call.modifiers) : 1.0f) {}

  __device__ void attend() {
    if (kGeneral && covers_ != nullptr) {
      load_covers(covers_, a_, work_, kThreads);
      sync_threads();
    }
    load_states();
    Steps coming(work_, covers_), now(work_, covers_);  // to be copied next, and at hand
    load_queries();
    int copied = 0;  // tiles of the ring: a K and a V for each step
    for (; copied < kStages - 1; ++copied) copy_next(coming, copied);
    load_words(now);
    for (int used = 0; !now.done(); now.next(), used += 2) {
      await_tile();
      copy_next(coming, copied++);
      const unsigned active = now.active(kGroup);
      float s[kGroup][kColumns / 8][4];
      Products::template rows_by_rows<kColumns>(s, queries_, warp_row_, stage(used), active);
      softmax(s, now, active);
      await_tile();
      copy_next(coming, copied++);
      Steps next = now;
      next.next();
      load_words(next);
      Products::template add_by_columns<kColumns>(o_, s, stage(used + 1), active);
    }
    cp_async_wait<0>();
    write();
  }

  __device__ char* stage(int i) const { return ring_ + i % kStages * kStageBytes; }

  __device__ void load_queries() {
    const HeadView<const S> query = query_head<S>(a_.call, work_.batch, work_.head);
#pragma unroll
    for (int g = 0; g < kGroup; ++g) {
      if (!work_.has_tile(g)) continue;
      copy_rows<S, kHeadSize, kMaxTile>(queries_ + g * kTileBytes, query, work_.row_tile(g).rows,
                                        list_, 0, static_cast<int>(a_.call.head_dim),
                                        [](int) { return true; });
    }
  }

  /// The next K or V, as a group of its own even if there is none left: the waits count groups.
  __device__ void copy_next(Steps& steps, int number) {
    if (!steps.done()) {
      const bool is_key = number % 2 == 0;
      const Tile& tile = work_.pass->key_tiles[steps.tile()];
      const HeadView<const S> from = is_key ? key_head<S>(a_.call, work_.batch, work_.head)
                                            : value_head<S>(a_.call, work_.batch, work_.head);
      const std::uint8_t* padding = padding_of(a_.call, work_.batch);
      copy_rows<S, kHeadSize, kColumns>(
          stage(number), from, tile, list_, steps.first_column(),
          static_cast<int>(is_key ? a_.call.head_dim : a_.call.value_dim),
          [&](int i) { return padding == nullptr || padding[token(tile, list_, i)] == 0; });
      if (!is_key) steps.next();
    }
    cp_async_commit();
  }

  /// Waits for the oldest copy, and for everyone to be done with the one whose place the next
  /// takes.
  __device__ void await_tile() {
    cp_async_wait<kStages - 2>();
    sync_threads();
  }

  /// The masks of a step and what dropout keeps, unless the one before had the same.
  __device__ void load_words(const Steps& step) {
    if (step.done() || !step.is_first_part()) return;
    const Tile& keys = work_.pass->key_tiles[step.tile()];
    for (int g = 0; g < kGroup; ++g) {
      if (step.mask(g) == kSkip) continue;
      if (drops_) {
        load_keeps(keeps_ + g * kMaxTile, HeadDropout(a_.call, work_.batch, work_.head), list_,
                   work_.row_tile(g).rows, {}, keys, {});
      }
      if (!needs_words(a_.call, keys, step.mask(g))) continue;
      cuda::load_words<kGeneral>(words_ + g * kMaxTile, a_, work_, g, step.tile(), step.mask(g));
    }
  }

  __device__ void softmax(float (&s)[kGroup][kColumns / 8][4], const Steps& step, unsigned active) {
    const Tile& keys = work_.pass->key_tiles[step.tile()];
    const FragmentPlace place{work_, step.tile(), warp_row_, step.first_column(), active};
    float scale = static_cast<float>(a_.call.scale) * kLog2E;
    if (kGeneral && a_.call.modifiers.change_logits()) {
      float slopes[kGroup][kColumns / 8][4];
      shape_fragments<true>(s, slopes, HeadLogits<float>(a_.call, work_.batch, work_.head), place);
      scale = kLog2E;
    }
#pragma unroll
    for (int g = 0; g < kGroup; ++g) {
      if (!(active >> g & 1)) continue;
      if (needs_words(a_.call, keys, step.mask(g)))
        mask_columns(s[g], words_ + g * kMaxTile + step.first_column(), warp_row_);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float factor = raise_maximum(s[g], half, scale, maximum_[g][half]);
        sum_[g][half] *= factor;
        multiply_row(o_[g], half, factor);
        exponentiate<0>(s[g], half, scale, maximum_[g][half], sum_[g][half]);
      }
      if (drops_) drop_fragments<true>(s[g], keeps_ + g * kMaxTile, place, 1.0f);
    }
  }

  // ---- where the states come from and go to ----------------------------------------------------

  __device__ StateFragments<S, kHeadSize / 8> state(int g) { return {o_[g], maximum_[g], sum_[g]}; }

  __device__ void load_states() {
    const float before_keeping =
        kGeneral ? static_cast<float>(1.0 - a_.call.modifiers.dropout_p) : 1.0f;
#pragma unroll
    for (int g = 0; g < kGroup; ++g) {
      state(g).clear();
      if (!a_.first && work_.task->slot < 0)
        state(g).resume(a_, work_, g, warp_row_, before_keeping);
    }
  }

  __device__ void write() {
#pragma unroll
    for (int g = 0; g < kGroup; ++g)
      state(g).write(a_, work_, g, warp_row_, kGeneral ? keep_factor_ : 1.0f);
  }

  const Arguments& a_;
  const Work& work_;
  const std::int64_t* const list_;
  const int warp_row_;
  char* const queries_;
  char* const ring_;
  std::uint64_t* const words_;
  std::uint64_t* const keeps_;
  std::uint8_t* const covers_;
  const bool drops_;
  const float keep_factor_;  // of the sums, when they are written
  float o_[kGroup][kHeadSize / 8][4];
  float maximum_[kGroup][2], sum_[kGroup][2];
};

}  // namespace sparse_attn::cuda
