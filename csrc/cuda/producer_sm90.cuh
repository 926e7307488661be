// What the copying warpgroup does, in forward and backward alike: for each task the own tiles of
// the consumers, then X and Y of the other side at each visit. It alone walks the plan, and runs
// ahead while the consumers compute; they read in notes what comes.
#pragma once

#include "cuda/copy_sm90.cuh"
#include "cuda/evaluate.cuh"

namespace sparse_attn::cuda {

/// What a consumer has to know of a visit.
struct VisitNote {
  std::int32_t tile = kNoTile;
  std::int32_t masks[kConsumers] = {};

  static constexpr std::int32_t kNoTile = -1;  // the task has no more visits: no tile comes
};
/// With a tile of keys: which of them are there, and no padding.
struct KeysNote {
  VisitNote visit;
  std::uint64_t live;
};
/// With a tile of rows: with X log-sum-exps in units of log 2, +inf for rows that are another
/// tile's, without keys or beyond the end, so that their P is 0; with Y deltas.
struct RowsNote {
  VisitNote visit;
  float of_rows[kMaxTile];
};

/// A tile of keys that comes, as a warp sees it.
class ComingKeys {
 public:
  using Note = KeysNote;

  __device__ ComingKeys(const Sm90Arguments& a, const Work& work, int i, std::int64_t)
      : tile_(work.pass->key_tiles[i]), live_(live_keys(a.base.call, work, tile_)) {}

  __device__ const Tile& tile() const { return tile_; }
  __device__ std::uint64_t live() const { return live_; }
  /// By the warp that arrives first at the barrier of the tile.
  __device__ void write(KeysNote& note, Operand) const {
    if (threadIdx.x == 0) note.live = live_;
  }

 private:
  const Tile& tile_;
  const std::uint64_t live_;
};

/// A tile of rows that comes: each lane has two of them. Rows without keys are not live.
class ComingRows {
 public:
  using Note = RowsNote;

  __device__ ComingRows(const Sm90Arguments& a, const Work& work, int i, std::int64_t head)
      : tile_(work.pass->row_tiles[i]) {
    const std::int64_t first = first_row_of(a.base.call, work.batch, head);
    const int lane = static_cast<int>(threadIdx.x) % 32;
    std::uint32_t live[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = lane + 32 * half;
      const bool exists = row < tile_.rows.count;
      const std::int64_t at = first + token(tile_.rows, work.pass->token_list, exists ? row : 0);
      const float lse = static_cast<const float*>(a.base.call.lse)[at];
      const bool is_live = exists && lse != -kInfinity;
      const bool counts = is_live && (tile_.owned >> row & 1) != 0;
      lse_[half] = counts ? lse * kLog2E : kInfinity;
      delta_[half] = counts ? static_cast<const float*>(a.base.delta)[at] : 0.0f;
      live[half] = ballot(is_live);
    }
    live_ = live[0] | static_cast<std::uint64_t>(live[1]) << 32;
  }

  __device__ const Tile& tile() const { return tile_.rows; }
  __device__ std::uint64_t live() const { return live_; }
  __device__ void write(RowsNote& note, Operand which) const {
    if (threadIdx.x >= 32) return;
#pragma unroll
    for (int half = 0; half < 2; ++half)
      note.of_rows[threadIdx.x + 32 * half] = which == Operand::kX ? lse_[half] : delta_[half];
  }

 private:
  const RowTile& tile_;
  std::uint64_t live_;
  float lse_[2], delta_[2];
};

/// `Coming` is what comes at a visit. Own tiles are X, and Y if the consumers have places for two.
template <class S, int kHeadSize, Side kSide, bool kEvaluates, class Coming, class Shared>
class Producer {
  static constexpr Side kOther = kSide == Side::kRows ? Side::kKeys : Side::kRows;
  static constexpr int kBarrier = 1;
  using Copies = TileCopies<S, kHeadSize>;

 public:
  static constexpr int kBytes = kEvaluates ? kMostCovers : 0;  // of shared memory

  __device__ Producer(const Sm90Arguments& a, const Shared& shared) : a_(a), shared_(shared) {}

  /// `keeps`: see for_each_task().
  __device__ void run(bool keeps) {
    if (threadIdx.x == 0) prefetch_maps();
    for_each_task(a_, kSide, keeps, [&](const Work& work, std::int64_t) {
#pragma unroll
      for (int g = 0; g < kConsumers; ++g) {
        if (work.has_tile(g)) copy_own(work, g);
      }
      const std::uint8_t* covers = find_covers(work);
      for (std::int64_t head = work.head; head < work.end_head(); ++head) {
        for (VisitWalk walk(work, covers); !walk.done(); walk.next()) copy_other(work, walk, head);
      }
      end_task();
    });
  }

 private:
  __device__ void prefetch_maps() const {
    prefetch(a_.key.maps);
    prefetch(a_.value.maps);
    prefetch(a_.query.maps);
  }

  /// Of the visits that are left to a program, which have a pair to give.
  __device__ const std::uint8_t* find_covers(const Work& work) const {
    if (!kEvaluates || work.pass->program == nullptr) return nullptr;
    auto* covers = reinterpret_cast<std::uint8_t*>(shared_.of_producer());
    sync_some(kBarrier, kWarpgroup);  // all have read those of the task before
    load_covers(covers, a_.base, work, kWarpgroup);
    sync_some(kBarrier, kWarpgroup);
    return covers;
  }

  /// Rows of queries need not be live: what they give is theirs alone.
  __device__ void copy_own(const Work& work, int g) {
    const auto own = shared_.own(g);
    const Tile& tile = work.own_tile(g);
    const std::uint64_t live =
        kSide == Side::kRows ? first_rows(tile.count) : live_keys(a_.base.call, work, tile);
#pragma unroll 1
    for (int i = 0; i < Shared::Own::kStages; ++i) {
      typename Shared::Own::Place& place = own_place_[g];
      own.await_empty(place);
      Copies(a_, work).start(own.tile(place), own.full(place),
                             TileSource<S>(a_, work, kSide, operand(i), work.head), tile, live);
      place.next();
    }
  }

  __device__ void copy_other(const Work& work, const VisitWalk& walk, std::int64_t head) {
    const Coming coming(a_, work, walk.tile(), head);
#pragma unroll 1
    for (int k = 0; k < 2; ++k) {
      shared_.other().await_empty(place_);
      auto& note = shared_.note(place_);
      if (threadIdx.x == 0) note.visit = {walk.tile(), {walk.mask(0), walk.mask(1)}};
      coming.write(note, operand(k));
      Copies(a_, work).start(shared_.other().tile(place_), shared_.other().full(place_),
                             TileSource<S>(a_, work, kOther, operand(k), head), coming.tile(),
                             coming.live());
      place_.next();
    }
  }

  __device__ void end_task() {
    shared_.other().await_empty(place_);
    if (threadIdx.x == 0) shared_.note(place_).visit = VisitNote();
    sync_warp();
    if (threadIdx.x % 32 == 0) arrive(shared_.other().full(place_));
    place_.next();
  }

  static __device__ Operand operand(int i) { return i == 0 ? Operand::kX : Operand::kY; }

  const Sm90Arguments& a_;
  const Shared& shared_;
  typename Shared::Other::Place place_;
  typename Shared::Own::Place own_place_[kConsumers];
};

}  // namespace sparse_attn::cuda
