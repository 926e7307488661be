// How output and log-sum-exp change along a tangent of the inputs, P being known from the
// log-sum-exp:
//
//   lse_dot = rowsum(P ∘ logit_dot)
//   O_dot = (kept ∘ P ∘ logit_dot) V + (kept ∘ P) V_dot - lse_dot ∘ O
#pragma once

#include "pair_tile.h"

namespace {

using sparse_attn::Reduction;
using sparse_attn::Run;
using sparse_attn::Segment;

template <class S>
class Tangent {
 public:
  using T = Real<S>;

  explicit Tangent(const AttentionParams& params)
      : p_(params),
        dv_(static_cast<int>(params.value_dim)),
        dv_wide_(round_up(dv_, kLanes<T>)),
        state_size_((dv_wide_ + 1) * kMaxTile) {}

  int64_t layout(void* base, int threads) {
    Arena arena(base);
    const int64_t heads = p_.batch * p_.heads;
    slots_per_head_ =
        largest(p_, [](const PassView& pass) { return static_cast<int64_t>(pass.row_slots); });
    slots_ = arena.take<T>(heads * slots_per_head_ * state_size_);
    outputs_ = arena.take<T>(heads * p_.n_q * dv_wide_);
    sums_ = arena.take<T>(heads * p_.n_q);
    Arena one_thread(nullptr);
    Scratch(one_thread, *this);
    scratch_bytes_ = one_thread.used();
    scratch_ = arena.take<char>(threads * scratch_bytes_);
    return arena.used();
  }

  void run(const Parallel& parallel) {
    layout(p_.workspace, parallel.threads);
    const int64_t heads = p_.batch * p_.heads, passes = pass_count(p_);
    for_each_item(parallel, heads, [&](int, int64_t head) {
      fill_zero(outputs_ + head * p_.n_q * dv_wide_, p_.n_q * dv_wide_);
      for (int64_t i = 0; i < p_.n_q; ++i) sums_[head * p_.n_q + i] = T{0};
    });
    for (int64_t pass = 0; pass < passes; ++pass) {
      const int64_t chunks = largest(p_, pass, chunks_of);
      with_scratch(parallel, heads * chunks, [&](Scratch& scratch, int64_t item) {
        chunk(scratch, item / chunks, pass, item % chunks);
      });
      with_scratch(parallel, heads,
                   [&](Scratch& scratch, int64_t head) { add_slots(scratch, head, pass); });
    }
    const int64_t shares = list_shares(heads, p_.n_q);
    with_scratch(parallel, has_lists(p_) ? heads * shares : 0, [&](Scratch& scratch, int64_t item) {
      lists(scratch, item / shares, {p_.n_q, item % shares, shares});
    });
    with_scratch(parallel, heads, [&](Scratch& scratch, int64_t head) { finish(scratch, head); });
  }

 private:
  struct Scratch {
    Scratch(Arena& arena, const Tangent& tangent)
        : pairs(arena, tangent.p_),
          along(arena.take<T>(kMaxTile * kMaxTile)),
          at(arena.take<T>(kMaxTile * kMaxTile)),
          state(arena.take<T>(tangent.state_size_)),
          rows(arena.take<T>(int64_t{kMaxTile} * tangent.dv_wide_)),
          list(arena.take<int64_t>(kMaxTile)) {}

    PairTile<S, true> pairs;
    T* along;  // kept ∘ P ∘ logit_dot, [key][query]
    T* at;     // kept ∘ P
    T* state;  // sums for O_dot, [value_dim][kMaxTile], then those for lse_dot
    T* rows;
    int64_t* list;
  };

  template <class Body>
  void with_scratch(const Parallel& parallel, int64_t items, const Body& body) {
    for_each_item(parallel, items, [&](int thread, int64_t item) {
      const FlushToZero flush;
      Arena arena(scratch_ + thread * scratch_bytes_);
      Scratch scratch(arena, *this);
      body(scratch, item);
    });
  }

  T* slot(int64_t head, int64_t index) const {
    return slots_ + (head * slots_per_head_ + index) * state_size_;
  }

  void chunk(Scratch& scratch, int64_t head, int64_t pass_index, int64_t chunk_index) {
    const PlanView& plan = *p_.plans[head];
    if (pass_index >= plan.passes.size || chunk_index >= plan.passes[pass_index].chunks.size)
      return;
    const PassView& pass = plan.passes[pass_index];
    const Chunk& chunk = pass.chunks[chunk_index];
    scratch.pairs.start(plan, pass, head);
    for (uint32_t s = chunk.first_segment; s < chunk.end_segment; ++s) {
      const Segment& segment = pass.segments[s];
      const RowTile& row_tile = pass.row_tiles[segment.row_tile];
      T* state = segment.slot < 0 ? scratch.state : slot(head, segment.slot);
      fill_zero(state, state_size_);
      if (segment.first_run < segment.end_run) scratch.pairs.load_inputs(row_tile, plan.token_list);
      for (uint32_t r = segment.first_run; r < segment.end_run; ++r) {
        const Run& run = pass.runs[r];
        for (int32_t i = 0; i < run.count; ++i) {
          if (scratch.pairs.get(run.key_tile + i, run.mask)) add(scratch, state);
        }
      }
      if (segment.slot < 0) write(scratch, head, row_tile, plan.token_list, state);
    }
  }

  void lists(Scratch& scratch, int64_t head, const Share& share) {
    const PlanView& plan = *p_.plans[head];
    if (!plan.keys_of_query.starts) return;
    scratch.pairs.start(plan, plan.passes[0], head);
    for (int64_t i = share.begin; i < share.end; ++i) {
      const RowTile row{{i, 1, 1, -1}, 1, 0, 0};
      bool any = false;
      for_each_list_tile(plan.keys_of_query, i, scratch.list, [&](const Tile& tile) {
        if (!any) {
          fill_zero(scratch.state, state_size_);
          scratch.pairs.load_inputs(row, nullptr);
          any = true;
        }
        if (scratch.pairs.gather(tile, scratch.list)) add(scratch, scratch.state);
      });
      if (any) write(scratch, head, row, nullptr, scratch.state);
    }
  }

  /// One key tile for one row tile.
  void add(Scratch& scratch, T* state) const {
    scratch.pairs.multiply_inputs();
    T* sums = state + int64_t{dv_wide_} * kMaxTile;
    scratch.pairs.for_each_probability([&](int at, int v, const PairValues<T>& pair) {
      const Vec<T> weighted = pair.p * pair.logit.along.value;
      store(sums + v * kLanes<T>, load(sums + v * kLanes<T>) + weighted);
      store(scratch.along + at, weighted * pair.kept);
      store(scratch.at + at, pair.p * pair.kept);
    });
    add_values(scratch, state, scratch.pairs.keys().value, scratch.along);
    add_values(scratch, state, scratch.pairs.keys_dot().value, scratch.at);
  }
  void add_values(const Scratch& scratch, T* state, const Rows<T>& values, const T* factors) const {
    gemm(dv_, scratch.pairs.rows().vectors, scratch.pairs.keys().count,
         Operand<T, false>{values.data, values.stride}, factors, kMaxTile,
         AddTo<T>{state, kMaxTile});
  }

  /// Adds a state to the sums of the rows that the tile owns.
  void write(Scratch& scratch, int64_t head, const RowTile& tile, const int64_t* list,
             const T* state) {
    transpose_rows<T>(scratch.rows, dv_wide_, {state, kMaxTile}, dv_,
                      round_up(tile.rows.count, kLanes<T>), T{1});
    for (int i = 0; i < tile.rows.count; ++i) {
      if (!(tile.owned >> i & 1)) continue;
      const int64_t row = head * p_.n_q + sparse_attn::token(tile.rows, list, i);
      add_row(outputs_ + row * dv_wide_, scratch.rows + int64_t{i} * dv_wide_, dv_wide_);
      sums_[row] += state[int64_t{dv_wide_} * kMaxTile + i];
    }
  }

  void add_slots(Scratch& scratch, int64_t head, int64_t pass_index) {
    const PlanView& plan = *p_.plans[head];
    if (pass_index >= plan.passes.size) return;
    const PassView& pass = plan.passes[pass_index];
    for (const Reduction& reduction : pass.row_reductions) {
      for (int32_t s = reduction.first_slot; s < reduction.end_slot; ++s)
        write(scratch, head, pass.row_tiles[reduction.tile], plan.token_list, slot(head, s));
    }
  }

  void finish(Scratch& scratch, int64_t head) const {
    const Head<const S> output = head_of<const S>(p_.output, p_.heads, head);
    const Head<S> to = head_of<S>(p_.output_tangent, p_.heads, head);
    for (int64_t i = 0; i < p_.n_q; ++i) {
      const int64_t row = head * p_.n_q + i;
      const bool live = static_cast<const T*>(p_.lse)[row] != -kInfinity<T>;
      T* sum = outputs_ + row * dv_wide_;
      pack_row<S>(scratch.rows, output.data + i * output.stride, dv_, dv_wide_);
      for (int c = 0; c < dv_wide_; c += kLanes<T>)
        store(sum + c, live ? load(sum + c) - load(scratch.rows + c) * sums_[row] : Vec<T>{});
      unpack_row<S>(to.data + i * to.stride, sum, dv_);
      static_cast<T*>(p_.lse_tangent)[row] = live ? sums_[row] : T{0};
    }
  }

  const AttentionParams& p_;
  const int dv_, dv_wide_;
  const int64_t state_size_;
  int64_t slots_per_head_ = 0, scratch_bytes_ = 0;
  T* slots_ = nullptr;
  T* outputs_ = nullptr;  // (batch, heads, n_q, value_dim), in whole vectors
  T* sums_ = nullptr;     // (batch, heads, n_q)
  char* scratch_ = nullptr;
};

}  // namespace
