// What the copying warpgroup does, in forward and backward alike: for each task the own tiles of
// the consumers, then X and Y of the other side at each visit. It alone walks the plan, and runs
// ahead while the consumers compute; they read in notes what comes.
#pragma once

#include "cuda/copy_sm90.cuh"
#include "cuda/evaluate.cuh"

namespace sparse_attn::cuda {

/// What a consumer has to know of a visit. With a mask of the plan, the words are there too: of its
/// own tile's rows (or keys), a bit for each column.
struct VisitNote {
  std::int32_t tile = kNoTile;
  std::int32_t masks[kConsumers];
  std::uint64_t words[kConsumers][kMaxTile];

  static constexpr std::int32_t kNoTile = -1;  // the task has no more visits: no tile comes
};
/// Of keys: which of them are there, and no padding.
struct KeysNote {
  VisitNote visit;
  std::uint64_t live;
};
/// Of rows: log-sum-exps in units of log 2, +inf for rows that are another tile's, without keys or
/// beyond the end, so that their P is 0; and deltas.
struct RowsNote {
  VisitNote visit;
  float lse[kMaxTile], delta[kMaxTile];
};

/// Writes the note about a tile of keys, by the warp that arrives first at the tile's barrier;
/// returns which of them are live.
__device__ inline std::uint64_t write_note(KeysNote& note, const Sm90Arguments& a, const Work& work,
                                           int tile, std::int64_t) {
  const std::uint64_t live = live_keys(a.base.call, work, work.pass->key_tiles[tile]);
  if (threadIdx.x == 0) note.live = live;
  return live;
}
/// Likewise about a tile of rows. Those without keys are not live.
__device__ inline std::uint64_t write_note(RowsNote& note, const Sm90Arguments& a, const Work& work,
                                           int i, std::int64_t head) {
  const RowTile& tile = work.pass->row_tiles[i];
  const std::int64_t first = first_row_of(a.base.call, work.batch, head);
  const int lane = static_cast<int>(threadIdx.x) % 32;
  std::uint32_t live[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = lane + 32 * half;
    const bool exists = row < tile.rows.count;
    const std::int64_t at = first + token(tile.rows, work.pass->token_list, exists ? row : 0);
    const float lse = static_cast<const float*>(a.base.call.lse)[at];
    const bool is_live = exists && lse != -kInfinity;
    live[half] = ballot(is_live);
    if (threadIdx.x >= 32) continue;
    const bool counts = is_live && (tile.owned >> row & 1) != 0;
    note.lse[row] = counts ? lse * kLog2E : kInfinity;
    note.delta[row] = counts ? static_cast<const float*>(a.base.delta)[at] : 0.0f;
  }
  return live[0] | static_cast<std::uint64_t>(live[1]) << 32;
}

/// Own tiles are X, and Y if the consumers have places for two.
template <class S, int kHeadSize, Side kSide, bool kEvaluates, class Shared>
class Producer {
  static constexpr Side kOther = kSide == Side::kRows ? Side::kKeys : Side::kRows;
  static constexpr int kBarrier = 1;
  using Copies = TileCopies<S, kHeadSize>;

 public:
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
      Copies(work).start(own.tile(place), own.full(place),
                         TileSource<S>(a_, work, kSide, operand(i), work.head), tile, live);
      place.next();
    }
  }

  /// A visit: its note comes with X. Without a live token it is left out.
  __device__ void copy_other(const Work& work, const VisitWalk& walk, std::int64_t head) {
    const auto other = shared_.other();
    other.await_empty(place_);
    auto& note = shared_.note(place_);
    const std::uint64_t live = write_note(note, a_, work, walk.tile(), head);
    if (live == 0) return;
    write_visit(note.visit, work, walk);
#pragma unroll 1
    for (int i = 0; i < 2; ++i) {
      other.await_empty(place_);
      Copies(work).start(other.tile(place_), other.full(place_),
                         TileSource<S>(a_, work, kOther, operand(i), head),
                         work.other_tile(walk.tile()), live);
      place_.next();
    }
  }

  __device__ void write_visit(VisitNote& note, const Work& work, const VisitWalk& walk) const {
    if (threadIdx.x == 0) {
      note.tile = walk.tile();
#pragma unroll
      for (int g = 0; g < kConsumers; ++g) note.masks[g] = walk.mask(g);
    }
    static_assert(kConsumers * kMaxTile == kWarpgroup, "a word for each thread");
    const int g = static_cast<int>(threadIdx.x) / kMaxTile,
              row = static_cast<int>(threadIdx.x) % kMaxTile;
    const std::int32_t mask = walk.mask(g);
    if (mask < 0) return;
    note.words[g][row] =
        (kSide == Side::kRows ? work.pass->masks_of_rows : work.pass->masks)[mask][row];
  }

  __device__ void end_task() {
    shared_.other().await_empty(place_);
    if (threadIdx.x == 0) shared_.note(place_).visit.tile = VisitNote::kNoTile;
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
