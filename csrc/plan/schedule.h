// The plan as the kernels see it: plain arrays that say which key tiles each row tile visits.
//
// Nothing here names a pattern, a device or a data type. plan.h owns the arrays and builds them;
// kernels only walk them.
#pragma once

#include <cstdint>

#include "host_device.h"

namespace sparse_attn {

/// Largest tile in either direction: an element mask keeps one 64-bit word of rows for each key.
constexpr int kMaxTile = 64;

/// Marks a run of tiles in which every row sees every key.
constexpr std::int32_t kFull = -1;

/// Up to kMaxTile tokens: start, start + step, ... (`list` < 0) or the plan's token list from
/// `list` on.
struct Tile {
  std::int64_t start;
  std::int32_t step;
  std::int32_t count;
  std::int64_t list;
};

/// `count` consecutive key tiles. Masked tiles (mask >= 0) come one to a run.
struct Run {
  std::int32_t key_tile;
  std::int32_t count;
  std::int32_t mask;
};

/// A row tile and the runs it visits. Rows outside `owned` belong to another row tile and are not
/// computed.
struct RowTile {
  Tile rows;
  std::uint64_t owned;
  std::uint32_t first_run;
  std::uint32_t end_run;
};

/// The part of a row tile that one chunk computes; `slot` < 0 when the chunk has all of it.
struct Segment {
  std::int32_t row_tile;
  std::int32_t slot;
  std::uint32_t first_run;
  std::uint32_t end_run;
};

/// A key tile whose gradient a chunk adds up in a slot of its own, because an earlier chunk touches
/// it as well.
struct SharedTile {
  std::int32_t key_tile;
  std::int32_t slot;
};

/// An independent share of a pass: what one thread does without looking at the others.
struct Chunk {
  std::uint32_t first_segment;
  std::uint32_t end_segment;
  std::uint32_t first_shared;
  std::uint32_t end_shared;
};

/// The slots [first_slot, end_slot) that add up to one row tile or key tile, in that order.
struct Reduction {
  std::int32_t tile;
  std::int32_t first_slot;
  std::int32_t end_slot;
};

template <class T>
struct Array {
  const T* data;
  std::int64_t size;
  const T* begin() const { return data; }
  const T* end() const { return data + size; }
  const T& operator[](std::int64_t i) const { return data[i]; }
};

/// One sweep over the rows in one token order. A plan has several when its pattern mixes orders
/// (two dilations, say); they run one after the other and merge their softmax states.
struct PassView {
  Array<RowTile> row_tiles;
  Array<Tile> key_tiles;
  Array<Run> runs;
  Array<Segment> segments;
  Array<Chunk> chunks;
  Array<SharedTile> shared_tiles;
  Array<Reduction> row_reductions;
  Array<Reduction> key_reductions;
  std::int32_t row_slots;
  std::int32_t key_slots;
};

/// A list for each row: items[starts[i]], ..., items[starts[i + 1] - 1]. Null when there are none.
struct ListsView {
  const std::int64_t* starts = nullptr;
  const std::int32_t* items = nullptr;
};

struct PlanView {
  Array<PassView> passes;
  const std::int64_t* token_list;
  const std::uint64_t (*masks)[kMaxTile];  // masks[id][key] has bit r set when row r sees the key
  std::int32_t tile_keys;                  // of a whole key tile
  ListsView keys_of_query;                 // pairs that no tile holds: after the passes
  ListsView queries_of_key;                // the same pairs, backward only
};

SPARSE_ATTN_HOST_DEVICE inline std::int64_t token(const Tile& tile, const std::int64_t* list,
                                                  int i) {
  return tile.list < 0 ? tile.start + static_cast<std::int64_t>(tile.step) * i
                       : list[tile.list + i];
}

}  // namespace sparse_attn
