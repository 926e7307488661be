// What the computing warpgroups have in common: their tile of the task, the visits that come, and
// masks.
#pragma once

#include "cuda/fragments.cuh"
#include "cuda/producer_sm90.cuh"

namespace sparse_attn::cuda {

/// Conditions are taken by vote: they are the same in all lanes, and so the compiler knows it. Else
/// it waits for each product at once.
template <Side kSide, bool kEvaluates, class Shared>
class Consumer {
 protected:
  using Place = typename Shared::Other::Place;
  using Note = typename Shared::Note;
  static constexpr bool kByRows = kSide == Side::kRows;

  __device__ Consumer(const Sm90Arguments& a, const Shared& shared)
      : a_(a.base),
        all_(a),
        shared_(shared),
        number_(first_lane(static_cast<int>(threadIdx.x) / kWarpgroup) - 1),
        warp_row_(static_cast<int>(threadIdx.x) % kWarpgroup / 32 * 16),
        scale_(static_cast<float>(a.base.call.scale) * kLog2E) {}

  /// The row of the own tile of which the lane has a half.
  __device__ int row(int half) const { return fragment_row(warp_row_, half); }

  /// Whether the own tile takes part in the visit that comes next.
  __device__ bool is_mine() const {
    shared_.other().await_full(place_);
    const VisitNote& visit = shared_.note(place_).visit;
    return any_lane(visit.tile != VisitNote::kNoTile && visit.masks[number_] != kSkip);
  }

  /// Goes on to a visit that the own tile takes part in, and lets go of the tiles of others; false
  /// at the end of the task.
  __device__ bool seek() {
    const auto other = shared_.other();
    while (!is_mine()) {
      const bool ends = any_lane(shared_.note(place_).visit.tile == VisitNote::kNoTile);
      other.release(place_);
      place_.next();
      if (ends) return false;
      other.await_full(place_);  // not to be counted for the use before
      other.release(place_);
      place_.next();
    }
    return true;
  }

  /// For each of the lane's two rows, which columns are allowed in the visit with this note; those
  /// of keys that do not `count`, none.
  __device__ void load_words(const Work& work, const Note& note, const bool (&counts)[2]) {
    const std::int32_t mask = note.visit.masks[number_];
    std::uint64_t live = ~std::uint64_t{0};
    if constexpr (kByRows) live = note.live;
    masked_ = any_lane(mask >= 0 || mask == kEvaluate || live != ~std::uint64_t{0} || !counts[0] ||
                       !counts[1]);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      std::uint64_t word = live;
      if (mask >= 0) {
        word &= note.visit.words[number_][row(half)];
      } else if (kEvaluates && mask == kEvaluate) {
        word &= evaluate(work, note.visit.tile, half);
      }
      words_[half] = counts[half] ? word : 0;
    }
  }

  const Arguments& a_;
  const Sm90Arguments& all_;
  const Shared& shared_;
  const int number_, warp_row_;
  const float scale_;
  Place place_;  // of what comes next
  std::uint64_t words_[2];
  bool masked_;

 private:
  /// The lane's own columns of a row, by the program of the pass.
  __device__ std::uint64_t evaluate(const Work& work, int other_tile, int half) const {
    const ProgramOfHead program = program_of(a_, work);
    const Tile &own = work.own_tile(number_), &other = work.other_tile(other_tile);
    const std::int64_t* list = work.pass->token_list;
    if (row(half) >= own.count) return 0;
    const std::int64_t mine = token(own, list, row(half));
    std::uint64_t word = 0;
#pragma unroll 1
    for (int i = 0; i < kMaxTile / 4; ++i) {
      const int column = fragment_column(i / 2, i % 2);
      if (column >= other.count) break;
      const std::int64_t its = token(other, list, column);
      const bool allowed = kByRows ? program.allows(mine, its) : program.allows(its, mine);
      word |= static_cast<std::uint64_t>(allowed) << column;
    }
    return word;
  }
};

}  // namespace sparse_attn::cuda
