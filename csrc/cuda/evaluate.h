// What the device works out before the sweeps, where a plan on the host cannot know it. No CUDA in
// here.
#pragma once

#include <cstdint>

#include "cuda/args.h"
#include "host_device.h"

namespace sparse_attn::cuda {

/// Makes a pass of each example's tokens, with tiles of their own on one side and all tiles of the
/// other: global keys that every query sees, or global queries that see every key.
struct GlobalPass {
  // Given.
  const GridPass* natural = nullptr;     // (heads of plans): tiles of all tokens, and the program
  const std::int64_t* tokens = nullptr;  // (batch, capacity), ascending
  const std::int64_t* counts = nullptr;  // (batch): how many of them there are
  std::int64_t capacity = 0;
  bool of_keys = false;                             // else of queries
  std::int32_t batch = 1, heads = 1;                // of plans
  std::int32_t natural_rows = 0, natural_keys = 0;  // tiles
  std::int32_t group_rows = 1, group_keys = 1;      // tiles of a task
  // Made.
  GridPass* passes = nullptr;     // (batch, heads)
  RowTile* row_tiles = nullptr;   // (batch, tiles of the capacity), of queries
  Tile* key_tiles = nullptr;      // likewise, of keys
  Task* tasks_by_rows = nullptr;  // (batch, tasks)
  Task* tasks_by_keys = nullptr;
  Visits* visits = nullptr;  // (batch, 2): those of rows, those of keys

  SPARSE_ATTN_HOST_DEVICE std::int32_t listed_tiles() const {
    return static_cast<std::int32_t>((capacity + kMaxTile - 1) / kMaxTile);
  }
  SPARSE_ATTN_HOST_DEVICE std::int32_t row_tiles_count() const {
    return of_keys ? natural_rows : listed_tiles();
  }
  SPARSE_ATTN_HOST_DEVICE std::int32_t key_tiles_count() const {
    return of_keys ? listed_tiles() : natural_keys;
  }
  SPARSE_ATTN_HOST_DEVICE std::int32_t row_tasks() const {
    return (row_tiles_count() + group_rows - 1) / group_rows;
  }
  SPARSE_ATTN_HOST_DEVICE std::int32_t key_tasks() const {
    return (key_tiles_count() + group_keys - 1) / group_keys;
  }
};

/// Picks from lists of keys those that the pattern allows.
struct ListFilter {
  Arguments arguments;  // passes of these lists, tensors, sizes
  /// Of a part of a sequence: where each key of the whole stands in it, or -1; else null.
  const std::int64_t* places = nullptr;
  std::int32_t* items =
      nullptr;  // (plan_batch, plan_heads or heads, n_q, width): -1 if not allowed
  std::int64_t width = 0;
  std::int64_t first_column = 0;  // of this part
  std::int64_t columns = 0;
  std::int64_t list_batch = 1, list_heads = 1;
};

void make_global_pass(const GlobalPass& pass, void* stream);
void filter_lists(const ListFilter& filter, void* stream);

}  // namespace sparse_attn::cuda
