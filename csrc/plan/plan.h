// A plan: which key tiles each row tile of one head visits, and which single keys besides. Built
// once per (pattern, sizes), cached, printable, countable.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "patterns/expand.h"
#include "plan/schedule.h"

namespace sparse_attn {

struct TileShape {
  int rows = kMaxTile;
  int keys = kMaxTile;
};

/// One sweep over the rows: residue classes modulo `step` (1 = the natural order), then listed
/// rows.
struct Pass {
  std::int64_t step = 1;
  std::vector<RowTile> row_tiles;
  std::vector<Tile> key_tiles;        // a partition of all keys, then tiles of gathered keys
  std::int64_t affine_key_tiles = 0;  // how many make up the partition
  std::vector<Run> runs;
};

using Mask = std::array<std::uint64_t, kMaxTile>;

struct Plan {
  Sizes sizes;
  TileShape tile;
  std::vector<Pass> passes;
  std::vector<std::int64_t> token_list;  // listed rows (as query indices) and gathered keys
  std::vector<Mask> masks;
  std::vector<std::int32_t> computed;  // pairs of each mask that the kernels compute
  /// For each query the keys that no tile holds.
  std::shared_ptr<const Lists> lists = std::make_shared<const Lists>();

  std::int64_t pairs = 0;    // allowed (query, key) pairs, exactly
  std::int64_t visited = 0;  // pairs that are computed in the visited tiles, and those of the lists
  std::int64_t unique = 0;   // tiles with a mask of their own: random pairs, data

  std::int64_t bytes() const;
  std::string to_string() const;
};

template <class T>
std::int64_t bytes_of(const std::vector<T>& v) {
  return static_cast<std::int64_t>(v.size() * sizeof(T));
}

/// Which tiles to put into lists if they hold few pairs: those whose mask no other tile has, or
/// all.
enum class Listing { kUnique, kAll };

/// What the plan is for. The kernels of a CPU skip, in a tile with a mask, the keys before the
/// first and after the last that any of kVectorRows rows sees; those of a GPU compute all of it.
enum class Target { kCpu, kGpu };
constexpr int kVectorRows = 16;

/// A pair of a list takes about as long as so many pairs of a tile: a tile with fewer pairs than
/// one in so many is listed.
std::int64_t pairs_for_listed(Target target);

Plan build_plan(const Terms& terms, Sizes sizes, TileShape tile = {},
                Listing listing = Listing::kUnique, Target target = Target::kCpu);

/// The plan of the tile shape and the listing that should take the least time.
Plan choose_plan(const Terms& terms, Sizes sizes, Target target = Target::kCpu);

/// Calls visit(key_tile, mask) for each key tile of the runs, in order.
template <class Visit>
void for_each_visit(const Run* begin, const Run* end, Visit visit) {
  for (const Run* run = begin; run != end; ++run) {
    for (std::int32_t i = 0; i < run->count; ++i) visit(run->key_tile + i, run->mask);
  }
}

}  // namespace sparse_attn
