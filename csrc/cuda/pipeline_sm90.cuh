// The pipeline of a block on sm_90a: three warpgroups, of which the first copies tiles into shared
// memory, and each of the others computes one tile of the task. The block takes one task after the
// other: tiles of the next arrive while the results of the last are written.
#pragma once

#include "cuda/args_sm90.h"
#include "cuda/ptx_sm90.cuh"
#include "cuda/tiles.cuh"

namespace sparse_attn::cuda {

constexpr int kConsumers = 2;  // warpgroups
constexpr int kWarps = kWarpgroup / 32;
constexpr int kSm90Threads = (1 + kConsumers) * kWarpgroup;
/// In multiples of 8. A block of 384 threads begins with 168 each; producers give to consumers.
constexpr int kProducerRegisters = 56, kConsumerRegisters = 224;
static_assert(kProducerRegisters + kConsumers * kConsumerRegisters <= (1 + kConsumers) * 168);

/// A use of a ring: its place, and whether the ring has gone round an odd number of times.
template <int kStages>
struct RingPlace {
  int stage = 0;
  unsigned parity = 0;

  __device__ void next() {
    if (++stage < kStages) return;
    stage = 0;
    parity ^= 1u;
  }
  __device__ RingPlace following() const {
    RingPlace place = *this;
    place.next();
    return place;
  }
};

/// Places for tiles in shared memory, which one warpgroup fills and others empty, in turn.
template <int kStages_, int kTileBytes>
class TileRing {
 public:
  static constexpr int kStages = kStages_;
  static constexpr int kBytes = kStages * kTileBytes;
  static constexpr int kBarrierBytes = 2 * kStages * static_cast<int>(sizeof(MBarrier));
  using Place = RingPlace<kStages>;

  __device__ TileRing(char* tiles, char* barriers)
      : tiles_(tiles), full_(reinterpret_cast<MBarrier*>(barriers)), empty_(full_ + kStages) {}

  /// By one thread. So many warps empty it, and all of the producer fill it: one that need not copy
  /// anything arrives all the same, since phases that it has missed it would wait for in vain.
  __device__ void init(int warps) const {
    for (int i = 0; i < kStages; ++i) {
      cuda::init(full_ + i, kWarps);
      cuda::init(empty_ + i, warps);
    }
  }

  __device__ char* tile(const Place& place) const { return tiles_ + place.stage * kTileBytes; }
  /// To be arrived at by a thread of each warp of the producer, when what it copies is there.
  __device__ MBarrier* full(const Place& place) const { return full_ + place.stage; }
  __device__ void await_empty(const Place& place) const {
    wait(empty_ + place.stage, place.parity ^ 1u);
  }
  __device__ void await_full(const Place& place) const { wait(full_ + place.stage, place.parity); }
  /// The warp has read what it wanted.
  __device__ void release(const Place& place) const {
    sync_warp();
    if (threadIdx.x % 32 == 0) arrive(empty_ + place.stage);
  }

 private:
  char* const tiles_;
  MBarrier* const full_;
  MBarrier* const empty_;
};

/// The block's shared memory: each consumer's own tiles, those of the other side that come and go,
/// a note about each of them, and room for the producer.
template <int kOwn, int kStages, int kTileBytes_, class Note_, int kProducerBytes>
class Sm90Shared {
 public:
  static constexpr int kTileBytes = kTileBytes_;
  using Note = Note_;
  using Own = TileRing<kOwn, kTileBytes>;
  using Other = TileRing<kStages, kTileBytes>;

 private:
  static constexpr int kOwnTiles = Other::kBytes;
  static constexpr int kOtherBarriers = kOwnTiles + kConsumers * Own::kBytes;
  static constexpr int kOwnBarriers = kOtherBarriers + Other::kBarrierBytes;
  static constexpr int kNotes = kOwnBarriers + kConsumers * Own::kBarrierBytes;

 public:
  static constexpr int kBytes = kNotes + kStages * static_cast<int>(sizeof(Note)) + kProducerBytes;

  __device__ explicit Sm90Shared(char* memory) : memory_(memory) {}

  /// By all threads of the block.
  __device__ void init() const {
    if (threadIdx.x == 0) {
      other().init(kConsumers * kWarps);
      for (int i = 0; i < kConsumers; ++i) own(i).init(kWarps);
      fence_barriers();
    }
    sync_threads();
  }

  __device__ Other other() const { return {memory_, memory_ + kOtherBarriers}; }
  __device__ Own own(int consumer) const {
    return {memory_ + kOwnTiles + consumer * Own::kBytes,
            memory_ + kOwnBarriers + consumer * Own::kBarrierBytes};
  }
  __device__ Note& note(const typename Other::Place& place) const {
    return reinterpret_cast<Note*>(memory_ + kNotes)[place.stage];
  }
  __device__ char* of_producer() const { return memory_ + kBytes - kProducerBytes; }

 private:
  char* const memory_;
};

__device__ inline Work work_of(const Sm90Arguments& a, Side side, std::int64_t task) {
  return Work(a.base, side, HeadWork::numbers_first(a.base.call, side, task));
}

/// Calls body(work, task) for the block's tasks that have something to do. With `keeps`, results
/// without a visit are those that are there.
template <class Body>
__device__ inline void for_each_task(const Sm90Arguments& a, Side side, bool keeps, Body body) {
  for (std::int64_t task = blockIdx.x; task < a.tasks; task += gridDim.x) {
    const Work work = work_of(a, side, task);
    if (any_lane(work.found() && (!keeps || work.has_visits()))) body(work, task);
  }
}

}  // namespace sparse_attn::cuda
