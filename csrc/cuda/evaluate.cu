#include "cuda/evaluate.h"

#include "cuda/launch.cuh"
#include "cuda/program.cuh"
#include "cuda/rows.cuh"

namespace sparse_attn::cuda {
namespace {

/// One block for each example.
struct MakeGlobalPass {
  static constexpr int kThreads = 256;
  static constexpr int kBlocksPerSM = 1;
  static constexpr int kSharedBytes = 0;

  static __device__ void run(const GlobalPass& p) {
    const std::int64_t example = blockIdx.x;
    const std::int64_t count = p.counts[example];
    const auto listed = static_cast<std::int32_t>((count + kMaxTile - 1) / kMaxTile);
    make_tiles(p, example, count);
    const std::int32_t rows = p.of_keys ? p.natural_rows : listed,
                       keys = p.of_keys ? listed : p.natural_keys;
    make_tasks(p.tasks_by_rows + example * p.row_tasks(), p.row_tasks(), p.group_rows, rows, keys,
               0);
    make_tasks(p.tasks_by_keys + example * p.key_tasks(), p.key_tasks(), p.group_keys, keys, rows,
               1);
    if (threadIdx.x == 0) {
      p.visits[2 * example] = {0, keys, {kEvaluate, kEvaluate}};
      p.visits[2 * example + 1] = {0, rows, {kEvaluate, kEvaluate}};
    }
    for (std::int32_t h = first(); h < p.heads; h += kThreads) make_pass(p, example, h);
  }

 private:
  static __device__ std::int32_t first() { return static_cast<std::int32_t>(threadIdx.x); }

  static __device__ void make_tiles(const GlobalPass& p, std::int64_t example, std::int64_t count) {
    for (std::int32_t i = first(); i < p.listed_tiles(); i += kThreads) {
      const std::int64_t begin = std::int64_t{i} * kMaxTile, left = count - begin;
      const int size = left < 0 ? 0 : left < kMaxTile ? static_cast<int>(left) : kMaxTile;
      const Tile tile{0, 1, size, begin};
      if (p.of_keys) {
        p.key_tiles[example * p.listed_tiles() + i] = tile;
      } else {
        const std::uint64_t owned = size == 0 ? 0 : ~std::uint64_t{0} >> (kMaxTile - size);
        p.row_tiles[example * p.listed_tiles() + i] = {tile, owned, 0, 0};
      }
    }
  }

  /// Tasks of `own` tiles, each with the one run of visits to the `other` tiles.
  static __device__ void make_tasks(Task* tasks, std::int32_t count, std::int32_t group,
                                    std::int32_t own, std::int32_t other, std::uint32_t visits) {
    for (std::int32_t i = first(); i < count; i += kThreads) {
      const std::int32_t tile = i * group;
      const bool works = tile < own && other > 0;
      const std::int32_t second = group > 1 && tile + 1 < own ? tile + 1 : -1;
      tasks[i] = {{tile, second}, -1, 0, visits, visits + (works ? 1 : 0)};
    }
  }

  static __device__ void make_pass(const GlobalPass& p, std::int64_t example, std::int32_t head) {
    GridPass pass = p.natural[head];
    pass.token_list = p.tokens + example * p.capacity;
    if (p.of_keys) {
      pass.key_tiles = p.key_tiles + example * p.listed_tiles();
    } else {
      pass.row_tiles = p.row_tiles + example * p.listed_tiles();
    }
    const Visits* visits = p.visits + 2 * example;
    pass.rows = {p.tasks_by_rows + example * p.row_tasks(), visits, nullptr, p.row_tasks(), 0};
    pass.keys = {p.tasks_by_keys + example * p.key_tasks(), visits, nullptr, p.key_tasks(), 0};
    p.passes[example * p.heads + head] = pass;
  }
};

/// A warp for each query.
struct FilterLists : RowKernel {
  static __device__ void run(const ListFilter& f) {
    const AttentionParams& call = f.arguments.call;
    const std::int64_t row = row_number(), query = row % call.n_q;
    if (row >= f.list_batch * f.list_heads * call.n_q) return;
    const std::int64_t batch = row / call.n_q / f.list_heads,
                       head = row / call.n_q % f.list_heads * (call.heads / f.list_heads);
    const GridPass& pass =
        f.arguments.passes[batch % f.arguments.plan_batch * f.arguments.plan_heads +
                           head / (call.heads / f.arguments.plan_heads)];
    std::int32_t* items = f.items + row * f.width + f.first_column;
    const std::int64_t n_k = f.places ? call.whole.n_k : call.n_k;  // that lists are of
    const ProgramOfHead program(pass, f.arguments, batch, head);
    const std::int64_t* keys = pass.program == nullptr ? nullptr : program.first_list(query);
    for (std::int64_t i = lane_number(); i < f.columns; i += kWarp) {
      // A key that is repeated counts once; those beyond the last fill the row up.
      const bool counts = keys != nullptr && i < program.first_list_columns() && keys[i] < n_k &&
                          (i == 0 || keys[i] != keys[i - 1]);
      const std::int64_t key = !counts ? -1 : f.places ? f.places[keys[i]] : keys[i];
      items[i] = key >= 0 && program.allows(query, key) ? static_cast<std::int32_t>(key) : -1;
    }
  }
};

}  // namespace

void make_global_pass(const GlobalPass& pass, void* stream) {
  launch<MakeGlobalPass>(pass.batch, stream, pass);
}

void filter_lists(const ListFilter& filter, void* stream) {
  launch<FilterLists>(
      blocks_for_rows(filter.list_batch * filter.list_heads * filter.arguments.call.n_q), stream,
      filter);
}

}  // namespace sparse_attn::cuda
