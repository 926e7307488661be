// Gradients of the tables of bias and gate, or how they change along a tangent: a sweep over the
// row tiles that adds dS, and for the gate dS ∘ ∂logit / ∂gate, where a pair has its number.
//
// Many pairs of one head share a number of a slope, a slot or a block: these are summed in float64.
// Chunks that may run at the same time sum slopes and slots, which are few, apart, and are added in
// order; blocks go chunk by chunk. Tables that examples or heads share are summed one after the
// other.
#pragma once

#include "pair_tile.h"

namespace {

using sparse_attn::Run;
using sparse_attn::Segment;

/// Whether several pairs of one head have the same number.
SPARSE_ATTN_INLINE bool sums_pairs(const LogitTable& table) {
  return table.kind == TableKind::kSlopes ||
         (table.kind == TableKind::kSlots && table.row_stride == 0) ||
         (table.kind == TableKind::kBlocks && table.block > 1);
}
SPARSE_ATTN_INLINE bool has_few_numbers(const LogitTable& table) {
  return sums_pairs(table) && table.kind != TableKind::kBlocks;
}

template <class S, bool kAlong>
class TableGradients {
 public:
  using T = Real<S>;

  explicit TableGradients(const AttentionParams& params)
      : p_(params), tables_{Table(params.grad_bias), Table(params.grad_gate)} {}

  int64_t layout(void* base, int threads) {
    Arena arena(base);
    int64_t parts = has_lists(p_) ? shares() : 1;
    for (int64_t pass = 0; pass < pass_count(p_); ++pass) {
      const int64_t chunks = chunks_at_once(pass);
      if (chunks > parts) parts = chunks;
    }
    for (Table& table : tables_) {
      if (table.few())
        table.parts = arena.take<double>(heads_at_once() * parts * table.gradient.columns);
      if (sums_pairs(table.gradient)) table.sums = arena.take<double>(table.gradient.size);
    }
    Arena one_thread(nullptr);
    Scratch(one_thread, p_);
    scratch_bytes_ = one_thread.used();
    scratch_ = arena.take<char>(threads * scratch_bytes_);
    return arena.used();
  }

  void run(const Parallel& parallel) {
    layout(p_.workspace, parallel.threads);
    for (const Table& table : tables_) {
      for (int64_t i = 0; table.sums && i < table.gradient.size; ++i) table.sums[i] = 0.0;
    }
    for (int64_t b = 0; b < (in_turn(false) ? p_.batch : 1); ++b) {
      for (int64_t h = 0; h < (in_turn(true) ? p_.heads : 1); ++h) round(parallel, b, h);
    }
    for (const Table& table : tables_) write_sums(table);
  }

 private:
  struct Table {
    explicit Table(const LogitTable& of) : gradient(of) {}

    bool exists() const { return gradient.kind != TableKind::kNone; }
    bool few() const { return has_few_numbers(gradient); }
    int64_t first_of(int64_t batch, int64_t head) const {
      return batch * gradient.batch_stride + head * gradient.head_stride;
    }

    LogitTable gradient;
    double* parts =
        nullptr;             // for each item of a round the numbers of its head, where they are few
    double* sums = nullptr;  // of the whole table, where pairs share numbers
  };

  struct Scratch {
    Scratch(Arena& arena, const AttentionParams& params)
        : pairs(arena, params),
          ds(arena.take<T>(kMaxTile * kMaxTile)),
          by_gate(arena.take<T>(kMaxTile * kMaxTile)),
          list(arena.take<int64_t>(kMaxTile)) {}

    PairTile<S, kAlong> pairs;
    T* ds;       // what the bias gets, [key][query]
    T* by_gate;  // what the gate gets
    int64_t* list;
  };

  /// What one item works on.
  struct Item {
    int64_t number, batch, head;  // head of the batch
    int64_t part;                 // chunk or share
    int64_t index(const AttentionParams& p) const { return batch * p.heads + head; }
  };

  // ---- what may run at the same time ------------------------------------------------------------

  /// Whether examples (or heads) share a table whose numbers are not summed apart.
  bool in_turn(bool by_heads) const {
    for (const Table& table : tables_) {
      const int64_t stride = by_heads ? table.gradient.head_stride : table.gradient.batch_stride;
      if (table.exists() && !table.few() && stride == 0) return true;
    }
    return false;
  }
  bool chunk_by_chunk() const {
    for (const Table& table : tables_) {
      if (sums_pairs(table.gradient) && !table.few()) return true;
    }
    return false;
  }
  int64_t heads_at_once() const {
    return (in_turn(false) ? 1 : p_.batch) * (in_turn(true) ? 1 : p_.heads);
  }
  int64_t chunks_at_once(int64_t pass) const {
    return chunk_by_chunk() ? 1 : largest(p_, pass, chunks_of);
  }
  int64_t shares() const { return chunk_by_chunk() ? 1 : list_shares(heads_at_once(), p_.n_q); }

  /// All sweeps for example b and head h, or for all of them where they need not take turns.
  void round(const Parallel& parallel, int64_t b, int64_t h) {
    for (int64_t pass = 0; pass < pass_count(p_); ++pass) {
      const int64_t at_once = chunks_at_once(pass), all = largest(p_, pass, chunks_of);
      for_each_part(parallel, b, h, at_once, [&](Scratch& scratch, const Item& item) {
        for (int64_t c = item.part; c < all; c += at_once) chunk(scratch, item, pass, c);
      });
    }
    if (!has_lists(p_)) return;
    const int64_t at_once = shares();
    for_each_part(parallel, b, h, at_once, [&](Scratch& scratch, const Item& item) {
      lists(scratch, item, {p_.n_q, item.part, at_once});
    });
  }

  template <class Body>
  void for_each_part(const Parallel& parallel, int64_t b, int64_t h, int64_t parts,
                     const Body& body) {
    const int64_t heads = in_turn(true) ? 1 : p_.heads, items = heads_at_once() * parts;
    const auto item_of = [&](int64_t i) {
      const int64_t head = i / parts;
      return Item{i, b + head / heads, h + head % heads, i % parts};
    };
    for_each_item(parallel, items, [&](int thread, int64_t i) {
      Arena arena(scratch_ + thread * scratch_bytes_);
      Scratch scratch(arena, p_);
      for (const Table& table : tables_) {
        for (int64_t c = 0; table.few() && c < table.gradient.columns; ++c)
          table.parts[i * table.gradient.columns + c] = 0.0;
      }
      body(scratch, item_of(i));
    });
    for (int64_t i = 0; i < items; ++i) add_parts(item_of(i));
  }

  void add_parts(const Item& item) const {
    for (const Table& table : tables_) {
      if (!table.few()) continue;
      double* sums = table.sums + table.first_of(item.batch, item.head);
      const double* parts = table.parts + item.number * table.gradient.columns;
      for (int64_t c = 0; c < table.gradient.columns; ++c) sums[c] += parts[c];
    }
  }

  // ---- sweeps -----------------------------------------------------------------------------------

  void chunk(Scratch& scratch, const Item& item, int64_t pass_index, int64_t chunk_index) {
    const PlanView& plan = *p_.plans[item.index(p_)];
    if (pass_index >= plan.passes.size || chunk_index >= plan.passes[pass_index].chunks.size)
      return;
    const PassView& pass = plan.passes[pass_index];
    const Chunk& chunk = pass.chunks[chunk_index];
    scratch.pairs.start(plan, pass, item.index(p_));
    for (uint32_t s = chunk.first_segment; s < chunk.end_segment; ++s) {
      const Segment& segment = pass.segments[s];
      if (segment.first_run == segment.end_run) continue;
      scratch.pairs.load_rows(pass.row_tiles[segment.row_tile], plan.token_list);
      for (uint32_t r = segment.first_run; r < segment.end_run; ++r) {
        const Run& run = pass.runs[r];
        for (int32_t i = 0; i < run.count; ++i) {
          if (scratch.pairs.get(run.key_tile + i, run.mask)) add(scratch, item);
        }
      }
    }
  }

  void lists(Scratch& scratch, const Item& item, const Share& share) {
    const PlanView& plan = *p_.plans[item.index(p_)];
    if (!plan.keys_of_query.starts) return;
    scratch.pairs.start(plan, plan.passes[0], item.index(p_));
    for (int64_t i = share.begin; i < share.end; ++i) {
      bool any = false;
      for_each_list_tile(plan.keys_of_query, i, scratch.list, [&](const Tile& tile) {
        if (!any) scratch.pairs.load_rows({{i, 1, 1, -1}, 1, 0, 0}, nullptr);
        any = true;
        if (scratch.pairs.gather(tile, scratch.list)) add(scratch, item);
      });
    }
  }

  /// One tile of pairs.
  void add(Scratch& scratch, const Item& item) const {
    scratch.pairs.multiply_inputs();
    scratch.pairs.multiply_gradients();
    scratch.pairs.for_each_gradient([&](int at, int, const PairValues<T>& pair) {
      const Vec<T> by_gate = pair.logit.at.by_gate, by_gate_dot = pair.logit.along.by_gate;
      store(scratch.ds + at, kAlong ? pair.ds_dot : pair.ds);
      store(scratch.by_gate + at,
            kAlong ? pair.ds_dot * by_gate + pair.ds * by_gate_dot : pair.ds * by_gate);
    });
    add(scratch, item, tables_[0], scratch.ds);
    add(scratch, item, tables_[1], scratch.by_gate);
  }

  void add(const Scratch& scratch, const Item& item, const Table& table, const T* numbers) const {
    if (!table.exists()) return;
    const SlotWindow& window = p_.modifiers.window(item.head, p_.heads);
    const HeadTable<T> of_head(table.gradient, window, item.batch, item.head);
    const PlaceOfPairs& place = scratch.pairs.place();
    if (table.few()) {
      of_head.add(place, numbers, table.parts + item.number * table.gradient.columns);
    } else if (table.sums) {
      of_head.add(place, numbers, table.sums + table.first_of(item.batch, item.head));
    } else {
      of_head.add(place, numbers, of_head.data());
    }
  }

  void write_sums(const Table& table) const {
    for (int64_t i = 0; table.sums && i < table.gradient.size; ++i)
      static_cast<T*>(table.gradient.data)[i] = static_cast<T>(table.sums[i]);
  }

  const AttentionParams& p_;
  Table tables_[2];  // of the bias, of the gate
  int64_t scratch_bytes_ = 0;
  char* scratch_ = nullptr;
};

}  // namespace
