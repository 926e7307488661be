// Visits whose masks the host cannot know: what a pass's program says of them.
//
// A block first asks for the cover of every tile that it would visit, and then goes to those alone
// that have a pair to give; where the cover is not clear the program runs for each pair.
#pragma once

#include "cuda/program.cuh"
#include "cuda/tiles.cuh"

namespace sparse_attn::cuda {

/// The program of the block's pass.
__device__ inline ProgramOfHead program_of(const Arguments& a, const Work& work) {
  return {*work.pass, a, work.batch, work.head};
}

/// Writes the covers of the task's visits to shared memory, kMostCovers bytes, by the first threads
/// of the block. They are there after a barrier.
__device__ inline void load_covers(std::uint8_t* covers, const Arguments& a, const Work& work,
                                   int threads) {
  const ProgramOfHead program = program_of(a, work);
  int before = 0;  // visits of the runs before
  for (std::uint32_t r = work.task->first_visit; r < work.task->end_visit; ++r) {
    const Visits& run = work.sweep->visits[r];
    for (int i = static_cast<int>(threadIdx.x); i < run.count && before + i < kMostCovers;
         i += threads) {
      unsigned cover = 0;
      for (int g = 0; g < 2; ++g) {
        if (!work.has_tile(g) || run.masks[g] == kSkip) continue;
        const Tile &own = work.own_tile(g), &other = work.other_tile(run.tile + i);
        const bool by_rows = work.side == Side::kRows;
        const TileCover c =
            program.cover(by_rows ? own : other, by_rows ? other : own, work.pass->token_list);
        cover |= (c.none ? 0 : c.all ? kAllOfTile : kSomeOfTile) << kCoverBits * g;
      }
      covers[before + i] = static_cast<std::uint8_t>(cover);
    }
    before += run.count;
  }
}

/// The words of a visit for tile g of the task, by the program, less what load_mask_words() knows:
/// keys beyond the end and padding. They are there after a barrier.
__device__ inline void evaluate_words(std::uint64_t* words, const Arguments& a, const Work& work,
                                      const Tile& rows, const Tile& keys) {
  constexpr int kHalf = kMaxTile / 2;
  const ProgramOfHead program = program_of(a, work);
  const std::uint8_t* padding = padding_of(a.call, work.batch);
  const std::int64_t* list = work.pass->token_list;
  for (int i = static_cast<int>(threadIdx.x); i < 2 * kMaxTile; i += static_cast<int>(blockDim.x)) {
    const int k = i % kMaxTile, first = i / kMaxTile * kHalf;
    std::uint32_t bits = 0;
    const std::int64_t key = k < keys.count ? token(keys, list, k) : -1;
    if (key >= 0 && (padding == nullptr || padding[key] == 0)) {
      for (int r = first; r < first + kHalf && r < rows.count; ++r) {
        const bool allowed = program.allows(token(rows, list, r), key);
        bits |= static_cast<std::uint32_t>(allowed) << (r - first);
      }
    }
    memcpy(reinterpret_cast<char*>(words + k) + first / 8, &bits, sizeof(bits));
  }
}

/// The words of a visit for tile g of the task, whatever decides about them.
template <bool kEvaluates>
__device__ inline void load_words(std::uint64_t* words, const Arguments& a, const Work& work, int g,
                                  int other_tile, std::int32_t mask) {
  const bool by_rows = work.side == Side::kRows;
  const Tile& keys = by_rows ? work.other_tile(other_tile) : work.own_tile(g);
  if (kEvaluates && mask == kEvaluate) {
    const Tile& rows = by_rows ? work.own_tile(g) : work.other_tile(other_tile);
    evaluate_words(words, a, work, rows, keys);
  } else {
    load_mask_words(words, a.call, *work.pass, work.batch, keys, mask);
  }
}

}  // namespace sparse_attn::cuda
