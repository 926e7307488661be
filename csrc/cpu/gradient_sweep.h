// One sweep over the row tiles that adds up gradients of query, key and value. What a tile of pairs
// adds is the business of `Pairs`:
//
//   Pairs(arena, params)                     its memory
//   start(plan, pass, head)                  turns to a query head
//   load_rows(tile, list)                    rows
//   get(key_tile, mask), gather(tile, list)  keys; false if no row sees any
//   add(grad_query, to_key, to_value, fetches)
//                                            adds what the pairs contribute
//
// dQ stays in cache for the whole row tile; dK and dV are added up in place. A chunk that shares
// key tiles with an earlier one adds to slots of its own, which are summed in a fixed order at the
// end.
#pragma once

#include "fetch_ahead.h"
#include "gemm.h"
#include "lists.h"
#include "scheduler.h"
#include "tile.h"

namespace {

using sparse_attn::Reduction;
using sparse_attn::RowTile;
using sparse_attn::SharedTile;

template <class S, class Pairs>
class GradientSweep {
 public:
  using T = Real<S>;

  explicit GradientSweep(const AttentionParams& params)
      : p_(params),
        d_(static_cast<int>(params.head_dim)),
        dv_(static_cast<int>(params.value_dim)),
        d_wide_(round_up(d_, kLanes<T>)),
        dv_wide_(round_up(dv_, kLanes<T>)),
        group_(params.heads / params.heads_kv) {}

  int64_t layout(void* base, int threads) {
    Arena arena(base);
    const int64_t heads = p_.batch * p_.heads, heads_kv = p_.batch * p_.heads_kv;
    row_slots_ =
        largest(p_, [](const PassView& pass) { return static_cast<int64_t>(pass.row_slots); });
    key_slots_ =
        largest(p_, [](const PassView& pass) { return static_cast<int64_t>(pass.key_slots); });
    row_slot_data_ = arena.take<T>(heads * row_slots_ * d_wide_ * kMaxTile);
    key_slot_data_ = arena.take<T>(heads_kv * key_slots_ * (d_wide_ + dv_wide_) * kMaxTile);
    const bool one_pass = pass_count(p_) == 1 && !has_lists(p_);
    const bool one_sweep = one_pass && largest(p_, chunks_of) == 1;
    if (!kSameType<S, T> || d_ != d_wide_ || dv_ != dv_wide_)
      where_ = one_sweep ? Where::kThread : Where::kWide;
    const int64_t copies = where_ == Where::kTensor   ? 0
                           : where_ == Where::kThread ? threads
                                                      : heads_kv;
    wide_keys_ = arena.take<T>(copies * p_.n_k * d_wide_);
    wide_values_ = arena.take<T>(copies * p_.n_k * dv_wide_);
    wide_queries_exist_ = !kSameType<S, T> && !one_pass;
    if (wide_queries_exist_) wide_queries_ = arena.take<T>(heads * p_.n_q * d_wide_);
    key_tiles_ = largest(p_, [](const PassView& pass) { return pass.key_tiles.size; });
    Arena one_thread(nullptr);
    Scratch(one_thread, *this);
    scratch_bytes_ = one_thread.used();
    scratch_ = arena.take<char>(threads * scratch_bytes_);
    return arena.used();
  }

  /// The passes. Lists come next, by listed() or otherwise, then finish().
  void passes(const Parallel& parallel) {
    const int64_t heads_kv = p_.batch * p_.heads_kv, passes = pass_count(p_);
    if (where_ == Where::kWide) {
      for_each_share(parallel, heads_kv, p_.n_k,
                     [&](int64_t head, const Share& rows) { clear_wide(head, rows); });
    }
    for (int64_t pass = 0; pass < passes; ++pass) {
      const int64_t chunks = largest(p_, pass, chunks_of);
      for_each_item(parallel, heads_kv * chunks, [&](int thread, int64_t item) {
        const FlushToZero flush;
        Arena arena(scratch_ + thread * scratch_bytes_);
        Scratch scratch(arena, *this);
        const int64_t head_kv = item / chunks;
        if (where_ == Where::kThread) clear_wide(thread, all_keys());
        for (int64_t g = 0; g < group_; ++g) {
          chunk(scratch, thread, head_kv, head_kv * group_ + g, pass, item % chunks, g == 0);
        }
        if (where_ == Where::kThread) narrow_keys(head_kv, thread, all_keys());
      });
      const int64_t tiles = largest(p_, pass, shared_by_one_tile);
      for_each_item(parallel, heads_kv * tiles,
                    [&](int, int64_t item) { add_key_slots(item / tiles, pass, item % tiles); });
      if (largest(p_, pass, sums_in_turn) == 0) continue;
      for_each_item(parallel, heads_kv, [&](int thread, int64_t head_kv) {
        Arena arena(scratch_ + thread * scratch_bytes_);
        Scratch scratch(arena, *this);
        add_gathered_slots(head_kv, pass);
        for (int64_t g = 0; g < group_; ++g) add_row_slots(scratch, head_kv * group_ + g, pass);
      });
    }
  }

  /// The lists, each query's as a row tile of its own: one vector of lanes for a single row, but no
  /// second text of what a pair adds.
  void listed(const Parallel& parallel) {
    for_each_item(parallel, p_.batch * p_.heads_kv, [&](int thread, int64_t head_kv) {
      Arena arena(scratch_ + thread * scratch_bytes_);
      Scratch scratch(arena, *this);
      for (int64_t g = 0; g < group_; ++g) list_head(scratch, head_kv, head_kv * group_ + g);
    });
  }

  void finish(const Parallel& parallel) {
    if (where_ == Where::kWide) {
      for_each_share(parallel, p_.batch * p_.heads_kv, p_.n_k,
                     [&](int64_t head, const Share& rows) { narrow_keys(head, head, rows); });
    }
    if (wide_queries_exist_) {
      for_each_share(parallel, p_.batch * p_.heads, p_.n_q,
                     [&](int64_t head, const Share& rows) { narrow_queries(head, rows); });
    }
  }

  // Sums of dK and dV of a head, and of dQ, while several sweeps add to them.
  Head<T> key_sums(int64_t head_kv) const { return key_sums(head_kv, head_kv); }
  Head<T> value_sums(int64_t head_kv) const { return value_sums(head_kv, head_kv); }
  Head<T> query_sums(int64_t head) const {
    if (wide_queries_exist_) return {wide_queries_ + head * p_.n_q * d_wide_, d_wide_};
    if constexpr (kSameType<S, T>) return head_of<T>(p_.grad_query, p_.heads, head);
    return {nullptr, 0};
  }

 private:
  /// Where dK and dV are added up: in the tensors themselves; in wide rows of the thread, for half
  /// types and rows that are not whole vectors; in wide rows for every head, when several chunks or
  /// passes add to the same keys.
  enum class Where { kTensor, kThread, kWide };

  struct Scratch {
    Scratch(Arena& arena, const GradientSweep& sweep)
        : grad_query(arena.take<T>(int64_t{kMaxTile} * sweep.d_wide_)),
          grad_query_rows(arena.take<T>(int64_t{kMaxTile} * sweep.d_wide_)),
          gathered_key(arena.take<T>(int64_t{kMaxTile} * sweep.d_wide_)),
          gathered_value(arena.take<T>(int64_t{kMaxTile} * sweep.dv_wide_)),
          list(arena.take<int64_t>(kMaxTile)),
          slot_of(arena.take<int32_t>(sweep.key_tiles_)),
          fetched(arena),
          pairs(arena, sweep.p_) {}

    T* grad_query;  // [head_dim][kMaxTile]
    T* grad_query_rows;
    T* gathered_key;  // [key][head_dim], before it is scattered
    T* gathered_value;
    int64_t* list;     // keys of a list that stand for a tile
    int32_t* slot_of;  // of each key tile in this chunk; -1 = none
    FetchStack fetches;
    KeptTiles fetched;
    Pairs pairs;
  };

  /// What a head's pairs add to.
  struct Sums {
    int64_t head_kv;
    Head<T> key, value;
  };

  /// `index` is the thread or the head, as where_ says.
  Head<T> sums(const sparse_attn::TensorView& view, T* wide, int width, int64_t head_kv,
               int64_t index) const {
    if (where_ != Where::kTensor) return {wide + index * p_.n_k * width, width};
    if constexpr (kSameType<S, T>) return head_of<T>(view, p_.heads_kv, head_kv);
    return {nullptr, 0};
  }
  Head<T> key_sums(int64_t head_kv, int64_t index) const {
    return sums(p_.grad_key, wide_keys_, d_wide_, head_kv, index);
  }
  Head<T> value_sums(int64_t head_kv, int64_t index) const {
    return sums(p_.grad_value, wide_values_, dv_wide_, head_kv, index);
  }

  T* key_slot(int64_t head_kv, int64_t slot) const {
    return key_slot_data_ + (head_kv * key_slots_ + slot) * (d_wide_ + dv_wide_) * kMaxTile;
  }
  T* value_slot(int64_t head_kv, int64_t slot) const {
    return key_slot(head_kv, slot) + int64_t{d_wide_} * kMaxTile;
  }
  T* row_slot(int64_t head, int64_t slot) const {
    return row_slot_data_ + (head * row_slots_ + slot) * d_wide_ * kMaxTile;
  }

  /// Calls body(head, rows) for all shares of the rows of all heads: one head keeps all threads
  /// busy.
  template <class Body>
  static void for_each_share(const Parallel& parallel, int64_t heads, int64_t rows,
                             const Body& body) {
    const int64_t shares = list_shares(heads, rows);
    for_each_item(parallel, heads * shares, [&](int, int64_t item) {
      body(item / shares, Share(rows, item % shares, shares));
    });
  }
  Share all_keys() const { return {p_.n_k, 0, 1}; }

  void clear_wide(int64_t index, const Share& rows) const {
    const int64_t first = index * p_.n_k + rows.begin, count = rows.end - rows.begin;
    fill_zero(wide_keys_ + first * d_wide_, count * d_wide_);
    fill_zero(wide_values_ + first * dv_wide_, count * dv_wide_);
  }

  void chunk(Scratch& scratch, int thread, int64_t head_kv, int64_t head, int64_t pass_index,
             int64_t chunk_index, bool first_of_group) {
    const PlanView& plan = *p_.plans[head];
    if (pass_index >= plan.passes.size || chunk_index >= plan.passes[pass_index].chunks.size)
      return;
    const PassView& pass = plan.passes[pass_index];
    const Chunk& chunk = pass.chunks[chunk_index];
    scratch.pairs.start(plan, pass, head);
    for (int64_t i = 0; i < pass.key_tiles.size; ++i) scratch.slot_of[i] = -1;
    for (uint32_t i = chunk.first_shared; i < chunk.end_shared; ++i) {
      const SharedTile& shared = pass.shared_tiles[i];
      scratch.slot_of[shared.key_tile] = shared.slot;
      if (first_of_group)
        fill_zero(key_slot(head_kv, shared.slot), int64_t{d_wide_ + dv_wide_} * kMaxTile);
    }
    const int64_t index = where_ == Where::kThread ? thread : head_kv;
    const Sums to{head_kv, key_sums(head_kv, index), value_sums(head_kv, index)};
    scratch.fetched.start();
    for (uint32_t s = chunk.first_segment; s < chunk.end_segment; ++s) {
      const Segment* next = s + 1 < chunk.end_segment ? &pass.segments[s + 1] : nullptr;
      segment(scratch, to, head, plan, pass, pass.segments[s], next, pass_index);
    }
  }

  void segment(Scratch& scratch, const Sums& to, int64_t head, const PlanView& plan,
               const PassView& pass, const Segment& segment, const Segment* next,
               int64_t pass_index) {
    const RowTile& row_tile = pass.row_tiles[segment.row_tile];
    T* grad_query = segment.slot < 0 ? scratch.grad_query : row_slot(head, segment.slot);
    fill_zero(grad_query, int64_t{d_wide_} * kMaxTile);
    if (segment.first_run < segment.end_run) {
      scratch.pairs.load_rows(row_tile, plan.token_list);
      expect_rows(scratch, head, row_tile, next ? &pass.row_tiles[next->row_tile] : nullptr);
      for_each_key_tile(pass, segment, next,
                        [&](int32_t key_tile, int32_t mask, int32_t following) {
                          if (following >= 0) expect_keys(scratch, to, pass, following);
                          if (scratch.pairs.get(key_tile, mask))
                            add(scratch, to, plan, pass.key_tiles[key_tile],
                                scratch.slot_of[key_tile], grad_query);
                        });
    }
    if (segment.slot < 0)
      write(scratch, head, row_tile, plan.token_list, grad_query, pass_index > 0);
  }

  /// Fetches what finishing these rows and beginning the next takes.
  void expect_rows(Scratch& scratch, int64_t head, const RowTile& tile, const RowTile* next) const {
    FetchStack& fetches = scratch.fetches;
    fetches.clear();
    fetches.push(head_of<S>(p_.grad_query, p_.heads, head), tile.rows, d_);
    if (!next) return;
    fetches.push(head_of<const S>(p_.query, p_.heads, head), next->rows, d_);
    fetches.push(head_of<const S>(p_.grad_output, p_.heads, head), next->rows, dv_);
    fetches.push(head_of<const S>(p_.output, p_.heads, head), next->rows, dv_);
  }

  void expect_keys(Scratch& scratch, const Sums& to, const PassView& pass, int32_t key_tile) const {
    if (scratch.fetched.holds(key_tile)) return;
    const Tile& tile = pass.key_tiles[key_tile];
    FetchStack& fetches = scratch.fetches;
    fetches.push(to.key, tile, d_);
    fetches.push(to.value, tile, dv_);
    fetches.push(head_of<const S>(p_.value, p_.heads_kv, to.head_kv), tile, dv_);
    fetches.push(head_of<const S>(p_.key, p_.heads_kv, to.head_kv), tile, d_);
  }

  /// One key tile for one row tile.
  SPARSE_ATTN_INLINE void add(Scratch& scratch, const Sums& to, const PlanView& plan,
                              const Tile& tile, int32_t slot, T* grad_query) {
    if (slot >= 0) {
      scratch.pairs.add(grad_query, {key_slot(to.head_kv, slot), d_wide_},
                        {value_slot(to.head_kv, slot), dv_wide_}, scratch.fetches);
    } else if (tile.list >= 0) {
      add_gathered(scratch, to, tile, plan.token_list, grad_query);
    } else {
      scratch.pairs.add(grad_query, {to.key.row(tile, nullptr, 0), to.key.stride * tile.step},
                        {to.value.row(tile, nullptr, 0), to.value.stride * tile.step},
                        scratch.fetches);
    }
  }

  void add_gathered(Scratch& scratch, const Sums& to, const Tile& tile, const int64_t* list,
                    T* grad_query) {
    fill_zero(scratch.gathered_key, int64_t{d_wide_} * tile.count);
    fill_zero(scratch.gathered_value, int64_t{dv_wide_} * tile.count);
    scratch.pairs.add(grad_query, {scratch.gathered_key, d_wide_},
                      {scratch.gathered_value, dv_wide_}, scratch.fetches);
    add_tile(to.key, tile, list, scratch.gathered_key, d_wide_);
    add_tile(to.value, tile, list, scratch.gathered_value, dv_wide_);
  }

  static void add_tile(Head<T> sum, const Tile& tile, const int64_t* list, const T* rows,
                       int width) {
    for (int i = 0; i < tile.count; ++i)
      add_row(sum.row(tile, list, i), rows + int64_t{i} * width, width);
  }

  void list_head(Scratch& scratch, int64_t head_kv, int64_t head) {
    const PlanView& plan = *p_.plans[head];
    const auto& lists = plan.keys_of_query;
    if (!lists.starts) return;
    scratch.pairs.start(plan, plan.passes[0], head);
    const Sums to{head_kv, key_sums(head_kv), value_sums(head_kv)};
    for (int64_t i = 0; i < p_.n_q; ++i) {
      const RowTile row{{i, 1, 1, -1}, 1, 0, 0};
      bool any = false;
      for_each_list_tile(lists, i, scratch.list, [&](const Tile& tile) {
        if (!any) {
          fill_zero(scratch.grad_query, int64_t{d_wide_} * kMaxTile);
          scratch.pairs.load_rows(row, nullptr);
          any = true;
        }
        if (scratch.pairs.gather(tile, scratch.list))
          add_gathered(scratch, to, tile, scratch.list, scratch.grad_query);
      });
      if (any) write(scratch, head, row, nullptr, scratch.grad_query, true);
    }
  }

  /// Writes dQ of the owned rows, or adds it to what earlier passes wrote.
  void write(Scratch& scratch, int64_t head, const RowTile& tile, const int64_t* list,
             const T* grad_query, bool add) {
    transpose_rows<T>(scratch.grad_query_rows, d_wide_, {grad_query, kMaxTile}, d_,
                      round_up(tile.rows.count, kLanes<T>), T{1});
    for (int i = 0; i < tile.rows.count; ++i) {
      if (!(tile.owned >> i & 1)) continue;
      const int64_t row = sparse_attn::token(tile.rows, list, i);
      T* from = scratch.grad_query_rows + int64_t{i} * d_wide_;
      const bool no_keys = static_cast<const T*>(p_.lse)[head * p_.n_q + row] == -kInfinity<T>;
      if (no_keys) fill_zero(from, d_wide_);  // 0 · NaN of a masked key is NaN
      if (wide_queries_exist_) {
        add_or_set<T>(wide_queries_ + (head * p_.n_q + row) * d_wide_, from, add);
      } else {
        const Head<S> to = head_of<S>(p_.grad_query, p_.heads, head);
        add_or_set<S>(to.data + row * to.stride, from, add);
      }
    }
  }

  template <class To>
  void add_or_set(To* to, const T* from, bool add) const {
    if constexpr (kSameType<To, T>) {
      if (add) {
        for (int c = 0; c < d_; ++c) to[c] += from[c];
        return;
      }
    }
    unpack_row<To>(to, from, d_);
  }

  /// Of a pass's key reductions those of the partition's tiles, which have no key in common. Tiles
  /// of gathered keys come after them.
  static int64_t shared_by_one_tile(const PassView& pass) {
    int64_t count = pass.key_reductions.size;
    while (count > 0 && pass.key_tiles[pass.key_reductions[count - 1].tile].list >= 0) --count;
    return count;
  }
  /// The other reductions of a pass.
  static int64_t sums_in_turn(const PassView& pass) {
    return pass.key_reductions.size - shared_by_one_tile(pass) + pass.row_reductions.size;
  }

  void add_key_slots(int64_t head_kv, int64_t pass_index, int64_t number) {
    const PlanView& plan = *p_.plans[head_kv * group_];
    if (pass_index >= plan.passes.size) return;
    const PassView& pass = plan.passes[pass_index];
    if (number < shared_by_one_tile(pass)) add_slots(head_kv, plan, pass, number);
  }

  void add_gathered_slots(int64_t head_kv, int64_t pass_index) {
    const PlanView& plan = *p_.plans[head_kv * group_];
    if (pass_index >= plan.passes.size) return;
    const PassView& pass = plan.passes[pass_index];
    for (int64_t i = shared_by_one_tile(pass); i < pass.key_reductions.size; ++i)
      add_slots(head_kv, plan, pass, i);
  }

  void add_slots(int64_t head_kv, const PlanView& plan, const PassView& pass, int64_t number) {
    const Reduction& reduction = pass.key_reductions[number];
    const Tile& tile = pass.key_tiles[reduction.tile];
    const Head<T> key_grad = key_sums(head_kv), value_grad = value_sums(head_kv);
    for (int32_t s = reduction.first_slot; s < reduction.end_slot; ++s) {
      add_tile(key_grad, tile, plan.token_list, key_slot(head_kv, s), d_wide_);
      add_tile(value_grad, tile, plan.token_list, value_slot(head_kv, s), dv_wide_);
    }
  }

  void add_row_slots(Scratch& scratch, int64_t head, int64_t pass_index) {
    const PlanView& plan = *p_.plans[head];
    if (pass_index >= plan.passes.size) return;
    const PassView& pass = plan.passes[pass_index];
    for (const Reduction& reduction : pass.row_reductions) {
      T* sum = row_slot(head, reduction.first_slot);
      for (int32_t s = reduction.first_slot + 1; s < reduction.end_slot; ++s) {
        add_row(sum, row_slot(head, s), d_wide_ * kMaxTile);
      }
      write(scratch, head, pass.row_tiles[reduction.tile], plan.token_list, sum, pass_index > 0);
    }
  }

  void narrow_keys(int64_t head_kv, int64_t index, const Share& rows) const {
    const Head<S> key = head_of<S>(p_.grad_key, p_.heads_kv, head_kv),
                  value = head_of<S>(p_.grad_value, p_.heads_kv, head_kv);
    const T* key_sum = wide_keys_ + index * p_.n_k * d_wide_;
    const T* value_sum = wide_values_ + index * p_.n_k * dv_wide_;
    for (int64_t i = rows.begin; i < rows.end; ++i) {
      unpack_row<S>(key.data + i * key.stride, key_sum + i * d_wide_, d_);
      unpack_row<S>(value.data + i * value.stride, value_sum + i * dv_wide_, dv_);
    }
  }

  void narrow_queries(int64_t head, const Share& rows) const {
    const Head<S> to = head_of<S>(p_.grad_query, p_.heads, head);
    for (int64_t i = rows.begin; i < rows.end; ++i) {
      unpack_row<S>(to.data + i * to.stride, wide_queries_ + (head * p_.n_q + i) * d_wide_, d_);
    }
  }

  const AttentionParams& p_;
  const int d_, dv_, d_wide_, dv_wide_;
  const int64_t group_;
  Where where_ = Where::kTensor;
  bool wide_queries_exist_ = false;
  int64_t row_slots_ = 0, key_slots_ = 0, key_tiles_ = 0;
  T* row_slot_data_ = nullptr;
  T* key_slot_data_ = nullptr;
  T* wide_keys_ = nullptr;
  T* wide_values_ = nullptr;
  T* wide_queries_ = nullptr;
  char* scratch_ = nullptr;
  int64_t scratch_bytes_ = 0;
};

}  // namespace
