// Gradients of the tables of bias and gate, by tiles of queries; along a tangent of the inputs if
// there is one. tables.h says how the work is divided.
#pragma once

#include "cuda/along.h"
#include "cuda/rows.cuh"
#include "cuda/simt_pairs.cuh"

namespace sparse_attn::cuda {

/// What a pair adds to the gradient, before the table's factor.
template <class T>
__device__ inline T table_term(const TableArguments& a, const GradientAlong<T>& pair) {
  if (a.sweep.call.query_tangent.data == nullptr)
    return a.gradient.of_gate ? pair.gate : pair.logit;
  return a.gradient.of_gate ? pair.gate_dot : pair.logit_dot;
}

/// The partial table of a block: of a table's strip, or the rows that the block owns of it.
struct PartialTable {
  const std::int64_t number;  // of the table
  std::int64_t begin, end;    // of the work: sharers x tasks
  double* const sums;
  LogitTable layout;  // of the partial table, for table_offset()

  __device__ explicit PartialTable(const TableArguments& a)
      : number(blockIdx.x / (a.gradient.strips * a.gradient.owners)),
        sums(a.gradient.partials + blockIdx.x / a.gradient.owners * a.gradient.entries()),
        layout(a.gradient.table) {
    const TableGradient& g = a.gradient;
    const std::int64_t strip = blockIdx.x / g.owners % g.strips, owner = blockIdx.x % g.owners;
    const std::int64_t work = g.sharers() * a.tasks;
    begin = strip * work / g.strips;
    end = (strip + 1) * work / g.strips;
    first_table_row_ = owner * g.rows_of_owner;
    end_table_row_ = first_table_row_ + g.rows_of_owner;
    if (end_table_row_ > g.rows) end_table_row_ = g.rows;
    is_owner_ = g.owners > 1;
    layout.row_stride = layout.kind == TableKind::kBlocks ? g.columns : 0;
    layout.column_stride = 1;
  }

  /// Those of the block.
  __device__ void clear(const TableArguments& a) const {
    const std::int64_t columns = a.gradient.columns;
    for (std::int64_t i = first_table_row_ * columns + threadIdx.x; i < end_table_row_ * columns;
         i += blockDim.x)
      sums[i] = 0.0;
    sync_threads();
  }
  /// Whether it has a row for some query of the ascending ones from `first` to `last`.
  __device__ bool has(const AttentionParams& call, std::int64_t first, std::int64_t last) const {
    const auto row = [&](std::int64_t query) {
      return (call.whole.query(query) - layout.first_query) / layout.block;
    };
    return !is_owner_ || (row(first) < end_table_row_ && row(last) >= first_table_row_);
  }
  __device__ HeadWork place(const TableArguments& a, std::int64_t item) const {
    return HeadWork::of_head(a.sweep.call, Side::kRows, item % a.tasks,
                             a.gradient.head(number, item / a.tasks));
  }

 private:
  std::int64_t first_table_row_, end_table_row_;
  bool is_owner_;
};

/// The gradients of a tile's logits (or gates) after the tile has been visited.
template <class S>
class TablePairs {
  using T = Real<S>;
  using Products = SimtProducts<S>;

 public:
  using Pairs = SimtPairs<S, Side::kRows>;

  __device__ TablePairs(const TableArguments& a, const Work& work)
      : pairs(a.sweep, work), head(pairs.head(work.head)), a_(a) {}

  /// Calls put(i, j, term) for the elements of a thread, where a pair is not allowed with 0.
  template <class Put>
  __device__ void visit(const VisitWalk& at, Put put) {
    pairs.load_other(at, head.number);
    typename Pairs::PairProducts d;
    pairs.multiply_scores(d, head);
    pairs.multiply_values(d, head);
#pragma unroll
    for (int i = 0; i < kSimtRows; ++i) {
#pragma unroll
      for (int j = 0; j < kSimtRows; ++j) {
        put(i, j, pairs.allows(i, j) ? table_term(a_, pairs.gradient(d, head, i, j)) : T{0});
      }
    }
  }

  __device__ const AttentionParams& call() const { return a_.sweep.call; }

  Pairs pairs;
  const typename Pairs::Head head;

 private:
  const TableArguments& a_;
};

/// Each pair of a head adds to an entry of its own.
template <class S>
struct SimtTableEntries {
  using T = Real<S>;
  static constexpr int kThreads = kSimtThreads;
  static constexpr int kBlocksPerSM = sizeof(T) == 8 ? 1 : 2;
  static constexpr int kSharedBytes = TablePairs<S>::Pairs::kSharedBytes;

  static __device__ void run(const TableArguments& a) {
    const std::int64_t tables = a.gradient.tables(), number = blockIdx.x % tables;
    const HeadWork place = HeadWork::of_head(a.sweep.call, Side::kRows, blockIdx.x / tables,
                                             a.gradient.head(number, a.sharer));
    const Work work(a.sweep, Side::kRows, place);
    if (!work.found() || !work.has_visits()) return;
    TablePairs<S> tile(a, work);
    const LogitTable& table = a.gradient.table;
    T* const entries = static_cast<T*>(table.data) + a.gradient.offset(number);
    for (VisitWalk at(work, tile.pairs.tiles.covers); !at.done(); at.next()) {
      tile.visit(at, [&](int i, int j, T term) {
        if (!tile.pairs.allows(i, j)) return;
        const PairPlace pair = tile.pairs.place(tile.head, i, j);
        const std::int64_t offset = table_offset(table, tile.head.modifiers.window(), pair);
        if (offset >= 0) entries[offset] += term;
      });
    }
  }
};

/// Pairs that share an entry are summed by the block that has them all.
template <class S>
class SimtTableSums {
  using T = Real<S>;
  using Products = SimtProducts<S>;

 public:
  static constexpr int kThreads = kSimtThreads;
  static_assert(kThreads / kWarp == kSlopeSums);
  static constexpr int kBlocksPerSM = sizeof(T) == 8 ? 1 : 2;
  static constexpr int kSharedBytes = TablePairs<S>::Pairs::kSharedBytes + kThreads;

  static __device__ void run(const TableArguments& a) {
    const PartialTable partial(a);
    if (a.sweep.first) partial.clear(a);
    auto* const wanted =
        reinterpret_cast<bool*>(shared_memory() + TablePairs<S>::Pairs::kSharedBytes);
    for (std::int64_t first = partial.begin; first < partial.end; first += kThreads) {
      sync_threads();  // all have gone through the tasks before
      const std::int64_t own = first + threadIdx.x;
      wanted[threadIdx.x] = own < partial.end && has_rows(a, partial, own);
      sync_threads();
      for (int i = 0; i < kThreads; ++i) {
        if (wanted[i]) add_task(a, partial, first + i);
      }
    }
  }

 private:
  static __device__ bool has_rows(const TableArguments& a, const PartialTable& partial,
                                  std::int64_t item) {
    const Work work(a.sweep, Side::kRows, partial.place(a, item));
    if (!work.found() || !work.has_visits()) return false;
    const Tile& rows = work.row_tile(0).rows;
    const std::int64_t* list = work.pass->token_list;
    return partial.has(a.sweep.call, token(rows, list, 0), token(rows, list, rows.count - 1));
  }

  static __device__ void add_task(const TableArguments& a, const PartialTable& partial,
                                  std::int64_t item) {
    const Work work(a.sweep, Side::kRows, partial.place(a, item));
    sync_threads();  // all are done with the task before
    SimtTableSums(a, partial, work).add();
  }

  __device__ SimtTableSums(const TableArguments& a, const PartialTable& partial, const Work& work)
      : partial_(partial), work_(work), tile_(a, work) {
    tile_.pairs.keep_rows(
        [&](std::int64_t query) { return partial.has(a.sweep.call, query, query); });
  }

  __device__ void add() {
    double of_slopes = 0.0;
    SimtTiles<S, false>& tiles = tile_.pairs.tiles;
    for (VisitWalk at(work_, tiles.covers); !at.done(); at.next()) {
      tile_.visit(at, [&](int i, int j, T term) {
        if (is(TableKind::kSlopes)) {
          if (tile_.pairs.allows(i, j))
            of_slopes += static_cast<double>(term) * factor(tile_.pairs.place(tile_.head, i, j));
        } else {
          *Products::element(tiles.tile, i, j) = term;
        }
      });
      sync_threads();  // the tile is written
      if (is(TableKind::kBlocks)) add_blocks();
      if (is(TableKind::kSlots)) add_slots(work_.row_tile(0).rows, work_.other_tile(at.tile()));
    }
    if (is(TableKind::kSlopes)) add_slopes(of_slopes);
  }

  __device__ bool is(TableKind kind) const { return partial_.layout.kind == kind; }

  // ---- slopes -----------------------------------------------------------------------------------

  __device__ double factor(const PairPlace& at) const {
    return static_cast<double>(table_factor(partial_.layout, at));
  }
  __device__ void add_slopes(double sum) const {
    sum = warp_sum(sum);
    if (lane_number() == 0) partial_.sums[warp_number()] += sum;
  }

  // ---- slots ------------------------------------------------------------------------------------

  /// Slots are the diagonals of tiles in equal steps, which those of a part need not be in.
  /// Elsewhere the keys of one row have different ones, so the tile is taken row by row.
  __device__ void add_slots(const Tile& rows, const Tile& keys) const {
    const bool has_diagonals = rows.list < 0 && keys.list < 0 && rows.step == keys.step &&
                               tile_.call().whole.keys == nullptr;
    if (has_diagonals) {
      add_diagonal(keys.start - tile_.head.modifiers.place(rows.start, 0).position, rows.step);
      return;
    }
    const int k = static_cast<int>(threadIdx.x);
    for (int r = 0; r < kMaxTile; ++r) {
      if (tile_.pairs.tiles.rows[r] < 0) continue;
      if (k < kMaxTile && tile_.pairs.tiles.keys[k] >= 0) {
        const PairPlace at =
            tile_.head.modifiers.place(tile_.pairs.tiles.rows[r], tile_.pairs.tiles.keys[k]);
        add_to_slot(at.key - at.position, static_cast<double>(element(r, k)));
      }
      sync_threads();  // the slots of the next row may be the same
    }
  }

  /// Threads have a diagonal each. `distance` is that from the first row to the first key.
  __device__ void add_diagonal(std::int64_t distance, std::int64_t step) const {
    const int diagonal = static_cast<int>(threadIdx.x) - (kMaxTile - 1);
    if (diagonal >= kMaxTile) return;
    const int first = diagonal < 0 ? -diagonal : 0,
              end = diagonal < 0 ? kMaxTile : kMaxTile - diagonal;
    double sum = 0.0;
    for (int r = first; r < end; ++r) sum += static_cast<double>(element(r, r + diagonal));
    add_to_slot(distance + step * diagonal, sum);
  }

  __device__ void add_to_slot(std::int64_t distance, double x) const {
    const std::int64_t slot =
        table_offset(partial_.layout, tile_.head.modifiers.window(), {0, 0, distance});
    if (slot >= 0) partial_.sums[slot] += x;
  }

  // ---- blocks -----------------------------------------------------------------------------------

  /// Rows and keys of a tile ascend, so those of one block stand together. Each row's keys of a
  /// block are summed at the first of them, then the rows of that column.
  __device__ void add_blocks() const {
    const int t = static_cast<int>(threadIdx.x);
    if (t < kMaxTile) sum_keys(t);
    sync_threads();
    if (t < kMaxTile && starts_block(t)) sum_rows(t);
  }

  __device__ std::int64_t block_of_key(int k) const {
    const std::int64_t place = tile_.pairs.tiles.keys[k];
    const std::int64_t key = place < 0 ? place : tile_.call().whole.key(place);
    return key < 0 ? -1 : key / partial_.layout.block;
  }
  /// Whether the key has no other of its block before it, but for padded ones.
  __device__ bool starts_block(int k) const {
    const std::int64_t block = block_of_key(k);
    if (block < 0) return false;
    for (int before = k - 1; before >= 0; --before) {
      if (const std::int64_t other = block_of_key(before); other >= 0) return other != block;
    }
    return true;
  }

  __device__ void sum_keys(int r) const {
    double sum = 0.0;
    int start = -1;
    for (int k = 0; k < kMaxTile; ++k) {
      const std::int64_t block = block_of_key(k);
      if (block < 0) continue;
      if (start < 0 || block != block_of_key(start)) {
        if (start >= 0) set_element(r, start, sum);
        start = k;
        sum = 0.0;
      }
      sum += static_cast<double>(element(r, k));
    }
    if (start >= 0) set_element(r, start, sum);
  }

  __device__ void sum_rows(int k) const {
    const std::int64_t* rows = tile_.pairs.tiles.rows;
    const std::int64_t key = tile_.pairs.tiles.keys[k];
    double sum = 0.0;
    std::int64_t at = -1;  // the entry that the sum is for
    for (int r = 0; r < kMaxTile; ++r) {
      if (rows[r] < 0) continue;
      const std::int64_t entry = table_offset(partial_.layout, tile_.head.modifiers.window(),
                                              tile_.head.modifiers.place(rows[r], key));
      if (entry != at) {
        if (at >= 0) partial_.sums[at] += sum;
        at = entry;
        sum = 0.0;
      }
      sum += static_cast<double>(element(r, k));
    }
    if (at >= 0) partial_.sums[at] += sum;
  }

  __device__ T element(int r, int k) const { return *Products::at(tile_.pairs.tiles.tile, r, k); }
  __device__ void set_element(int r, int k, double x) const {
    *Products::at(tile_.pairs.tiles.tile, r, k) = static_cast<T>(x);
  }

  const PartialTable& partial_;
  const Work& work_;
  TablePairs<S> tile_;
};

/// The partial tables add up to the gradient. A thread has an entry.
template <class S>
struct AddStrips {
  using T = Real<S>;
  static constexpr int kThreads = kStripThreads;
  static constexpr int kBlocksPerSM = 1;
  static constexpr int kSharedBytes = 0;

  static __device__ void run(const TableArguments& a) {
    const TableGradient& g = a.gradient;
    const bool of_slopes = g.table.kind == TableKind::kSlopes;
    const std::int64_t entries = of_slopes ? 1 : g.entries();
    const std::int64_t i = std::int64_t{blockIdx.x} * kThreads + threadIdx.x;
    if (i >= g.tables() * entries) return;
    const std::int64_t number = i / entries, entry = i % entries;
    const double* const first = g.partials + number * g.strips * g.entries() + entry;
    double sum = 0.0;
    if (of_slopes) {
      for (std::int64_t s = 0; s < g.strips * kSlopeSums; ++s) sum += first[s];
    } else {
      for (std::int64_t s = 0; s < g.strips; ++s) sum += first[s * entries];
    }
    const std::int64_t row = entry / g.columns, column = entry % g.columns;
    static_cast<T*>(g.table.data)[g.offset(number) + row * g.table.row_stride +
                                  column * g.table.column_stride] = static_cast<T>(sum);
  }
};

}  // namespace sparse_attn::cuda
