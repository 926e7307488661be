// Forward: for each row tile, load Q; for each key tile, S = K Qᵀ, mask, softmax update,
// O = O + Vᵀ P; finish.
//
// Everything is transposed, with the queries in the SIMD lanes: the softmax runs down the lanes
// without a horizontal operation, K and V are only ever broadcast (so any head size and any stride
// is as good as another), and P is ready for the second product as it stands.
#pragma once

#include "fetch_ahead.h"
#include "forward_tile.h"
#include "listed_forward.h"
#include "scheduler.h"
#include "softmax.h"
#include "tile.h"

namespace {

using sparse_attn::Reduction;
using sparse_attn::RowTile;

/// Columns of queries divided by their sums of weights. Without keys they become 0, whatever they
/// hold: 0 · NaN of a masked key is NaN.
template <class T>
class Normalised {
 public:
  explicit Normalised(const T* sums) : sums_(sums) {
    for (int i = 0; i < kMaxTile; i += kLanes<T>) store(factors_ + i, T{1} / load(sums + i));
  }
  SPARSE_ATTN_INLINE Vec<T> operator()(Vec<T> x, int column) const {
    return load(sums_ + column) == T{0} ? Vec<T>{} : x * load(factors_ + column);
  }

 private:
  const T* sums_;
  alignas(64) T factors_[kMaxTile];
};

template <class S, class TileAtHand = ForwardTile<S>>
class Forward {
 public:
  using T = Real<S>;

  explicit Forward(const AttentionParams& params)
      : p_(params),
        listed_(params),
        d_(static_cast<int>(params.head_dim)),
        dv_(static_cast<int>(params.value_dim)) {}

  /// Lays the workspace out; returns its size.
  int64_t layout(void* base, int threads) {
    Arena arena(base);
    const int64_t heads = p_.batch * p_.heads;
    const int64_t slots =
        largest(p_, [](const PassView& pass) { return static_cast<int64_t>(pass.row_slots); });
    Arena one_slot(nullptr);
    RowState<T>::take(one_slot, dv_);
    slot_bytes_ = one_slot.used();
    slots_per_head_ = slots;
    slots_ = arena.take<char>(heads * slots * slot_bytes_);
    const bool several_sweeps = pass_count(p_) > 1 || has_lists(p_);
    if (several_sweeps) sums_ = arena.take<T>(heads * p_.n_q);
    keeps_sums_ = several_sweeps;
    merges_in_memory_ = !kSameType<S, T> && several_sweeps;
    if (merges_in_memory_) wide_output_ = arena.take<T>(heads * p_.n_q * dv_);
    Arena one_thread(nullptr);
    Scratch(one_thread, p_);
    scratch_bytes_ = one_thread.used();
    scratch_ = arena.take<char>(threads * scratch_bytes_);
    return arena.used();
  }

  void run(const Parallel& parallel) {
    layout(p_.workspace, parallel.threads);
    const int64_t heads = p_.batch * p_.heads, passes = pass_count(p_);
    for (int64_t pass = 0; pass < passes; ++pass) {
      const int64_t chunks = largest(p_, pass, chunks_of);
      for_each_item(parallel, heads * chunks, [&](int thread, int64_t item) {
        Arena arena(scratch_ + thread * scratch_bytes_);
        Scratch scratch(arena, p_);
        chunk(scratch, item / chunks, pass, item % chunks);
      });
      if (largest(p_, pass, [](const PassView& v) { return v.row_reductions.size; }) == 0) continue;
      for_each_item(parallel, heads, [&](int thread, int64_t head) {
        Arena arena(scratch_ + thread * scratch_bytes_);
        Scratch scratch(arena, p_);
        merge_slots(scratch, head, pass);
      });
    }
    if (!keeps_sums_) return;
    if (has_lists(p_)) run_lists(parallel);
    for_each_item(parallel, heads, [&](int, int64_t head) {
      T *lse = lse_of(head), *sums = sums_of(head);
      for (int64_t i = 0; i < p_.n_q; ++i) lse[i] = log_sum_exp(lse[i], sums[i]);
      if (merges_in_memory_) narrow(head);
    });
  }

 private:
  struct Scratch {
    Scratch(Arena& arena, const AttentionParams& params)
        : state(RowState<T>::take(arena, params.value_dim)),
          output_rows(arena.take<T>(int64_t{kMaxTile} *
                                    round_up(static_cast<int>(params.value_dim), kLanes<T>))),
          tile(arena, params),
          fetched(arena),
          listed(arena, static_cast<int>(params.head_dim), static_cast<int>(params.value_dim)) {}

    RowState<T> state;
    T* output_rows;  // [query][value_dim]
    TileAtHand tile;
    FetchStack fetches;
    KeptTiles fetched;
    typename ListedForward<S>::Scratch listed;
  };

  void run_lists(const Parallel& parallel) {
    const int64_t heads = p_.batch * p_.heads, shares = list_shares(heads, p_.n_q);
    for_each_item(parallel, heads * shares, [&](int thread, int64_t item) {
      Arena arena(scratch_ + thread * scratch_bytes_);
      Scratch scratch(arena, p_);
      const int64_t head = item / shares;
      const RowSweep<T> rows{wide_output(head), lse_of(head), sums_of(head)};
      listed_.run(scratch.listed, head, rows, {p_.n_q, item % shares, shares});
    });
  }

  /// Where a pass finds and leaves its output: the tensor itself, or a wide copy while
  /// half-precision passes are merged.
  Head<T> wide_output(int64_t head) const {
    if (merges_in_memory_) return {wide_output_ + head * p_.n_q * dv_, dv_};
    if constexpr (kSameType<S, T>) return head_of<T>(p_.output, p_.heads, head);
    return {nullptr, 0};
  }

  /// While several sweeps take turns, the tensor of log-sum-exps holds the maxima of their softmax
  /// states and this the sums: a log-sum-exp of large logits would round the states.
  T* sums_of(int64_t head) const { return sums_ + head * p_.n_q; }
  T* lse_of(int64_t head) const { return static_cast<T*>(p_.lse) + head * p_.n_q; }

  RowState<T> slot(int64_t head, int64_t index) const {
    Arena arena(slots_ + (head * slots_per_head_ + index) * slot_bytes_);
    return RowState<T>::take(arena, dv_);
  }

  void chunk(Scratch& scratch, int64_t head, int64_t pass_index, int64_t chunk_index) {
    const PlanView& plan = *p_.plans[head];
    if (pass_index >= plan.passes.size || chunk_index >= plan.passes[pass_index].chunks.size)
      return;
    const PassView& pass = plan.passes[pass_index];
    const Chunk& chunk = pass.chunks[chunk_index];
    scratch.tile.start(plan, pass, head);
    scratch.fetched.start();
    for (uint32_t s = chunk.first_segment; s < chunk.end_segment; ++s) {
      const Segment* next = s + 1 < chunk.end_segment ? &pass.segments[s + 1] : nullptr;
      segment(scratch, head, plan, pass, pass.segments[s], next, pass_index);
    }
  }

  void segment(Scratch& scratch, int64_t head, const PlanView& plan, const PassView& pass,
               const Segment& segment, const Segment* next, int64_t pass_index) {
    const RowTile& row_tile = pass.row_tiles[segment.row_tile];
    const RowState<T> state = segment.slot < 0 ? scratch.state : slot(head, segment.slot);
    const bool resumes = segment.slot < 0 && pass_index > 0;
    state.init(dv_);
    if (resumes) resume(scratch, state, head, plan, row_tile.rows);
    if (segment.first_run < segment.end_run) {
      scratch.tile.load_rows(row_tile.rows);
      expect_rows(scratch, head, row_tile, next ? &pass.row_tiles[next->row_tile] : nullptr);
      const auto attend = [&](int32_t key_tile, int32_t mask, int32_t following) {
        if (following >= 0) expect_keys(scratch, head, pass, following);
        scratch.tile.attend(state, key_tile, mask, scratch.fetches);
      };
      for_each_key_tile(pass, segment, next, attend);
    }
    if (segment.slot < 0) finish(scratch, state, head, plan, row_tile);
  }

  /// Fetches what finishing these rows and beginning the next takes.
  void expect_rows(Scratch& scratch, int64_t head, const RowTile& tile, const RowTile* next) const {
    scratch.fetches.clear();
    if (merges_in_memory_) {
      scratch.fetches.push(wide_output(head), tile.rows, dv_);
    } else {
      scratch.fetches.push(head_of<S>(p_.output, p_.heads, head), tile.rows, dv_);
    }
    if (next) scratch.fetches.push(head_of<const S>(p_.query, p_.heads, head), next->rows, d_);
  }

  void expect_keys(Scratch& scratch, int64_t head, const PassView& pass, int32_t key_tile) const {
    if (scratch.fetched.holds(key_tile)) return;
    const int64_t head_kv = head / (p_.heads / p_.heads_kv);
    const Tile& tile = pass.key_tiles[key_tile];
    scratch.fetches.push(head_of<const S>(p_.value, p_.heads_kv, head_kv), tile, dv_);
    scratch.fetches.push(head_of<const S>(p_.key, p_.heads_kv, head_kv), tile, d_);
  }

  /// The state that earlier passes left.
  void resume(Scratch& scratch, const RowState<T>& state, int64_t head, const PlanView& plan,
              const sparse_attn::Tile& rows) {
    const Head<T> output = wide_output(head);
    const T *maxima = lse_of(head), *sums = sums_of(head);
    const int padded = round_up(dv_, kLanes<T>);
    for (int i = 0; i < rows.count; ++i) {
      const int64_t row = sparse_attn::token(rows, plan.token_list, i);
      T* values = scratch.output_rows + i * padded;
      pack_row<T>(values, output.data + row * output.stride, dv_, padded);
      scale_row(values, sums[row], padded);
      state.softmax->maximum[i] = maxima[row];
      state.softmax->sum[i] = sums[row];
    }
    transpose_rows<T>(state.output, kMaxTile, {scratch.output_rows, padded}, rows.count, padded,
                      T{1});
  }

  /// Normalises and writes the rows that this tile owns.
  void finish(Scratch& scratch, const RowState<T>& state, int64_t head, const PlanView& plan,
              const RowTile& tile) {
    write_softmax(*state.softmax, head, plan, tile);
    const Normalised<T> normalised(state.softmax->sum);
    const Rows<T> columns{state.output, kMaxTile};
    const Head<T> to = wide_output(head);
    const bool owns_all = tile.owned == all_rows(tile.rows.count);
    if (to.data && owns_all && tile.rows.list < 0 && dv_ % kLanes<T> == 0) {
      transpose_rows<T>(to.row(tile.rows, nullptr, 0), to.stride * tile.rows.step, columns, dv_,
                        tile.rows.count, normalised);
      return;
    }
    const int padded = round_up(dv_, kLanes<T>);
    transpose_rows<T>(scratch.output_rows, padded, columns, dv_, tile.rows.count, normalised);
    for (int i = 0; i < tile.rows.count; ++i) {
      if (tile.owned >> i & 1)
        write_row(head, sparse_attn::token(tile.rows, plan.token_list, i),
                  scratch.output_rows + i * padded);
    }
  }

  void write_softmax(const SoftmaxState<T>& state, int64_t head, const PlanView& plan,
                     const RowTile& tile) const {
    T* lse = lse_of(head);
    for (int i = 0; i < tile.rows.count; ++i) {
      if (!(tile.owned >> i & 1)) continue;
      const int64_t row = sparse_attn::token(tile.rows, plan.token_list, i);
      lse[row] = keeps_sums_ ? state.maximum[i] : log_sum_exp(state.maximum[i], state.sum[i]);
      if (keeps_sums_) sums_of(head)[row] = state.sum[i];
    }
  }

  void write_row(int64_t head, int64_t row, const T* values) const {
    if (merges_in_memory_) {
      const Head<T> wide = wide_output(head);
      unpack_row<T>(wide.data + row * wide.stride, values, dv_);
    } else {
      const Head<S> output = head_of<S>(p_.output, p_.heads, head);
      unpack_row<S>(output.data + row * output.stride, values, dv_);
    }
  }

  /// Merges the slots of each split row tile, in order.
  void merge_slots(Scratch& scratch, int64_t head, int64_t pass_index) {
    const PlanView& plan = *p_.plans[head];
    if (pass_index >= plan.passes.size) return;
    const PassView& pass = plan.passes[pass_index];
    for (const Reduction& reduction : pass.row_reductions) {
      const RowTile& row_tile = pass.row_tiles[reduction.tile];
      scratch.state.init(dv_);
      if (pass_index > 0) resume(scratch, scratch.state, head, plan, row_tile.rows);
      for (int32_t s = reduction.first_slot; s < reduction.end_slot; ++s)
        merge(scratch.state, slot(head, s));
      finish(scratch, scratch.state, head, plan, row_tile);
    }
  }

  void merge(const RowState<T>& into, const RowState<T>& part) const {
    for (int i = 0; i < kMaxTile; i += kLanes<T>) {
      SoftmaxState<T>&a = *into.softmax, &b = *part.softmax;
      const Vec<T> top = max<T>(load(a.maximum + i), load(b.maximum + i));
      const Vec<T> finite = finite_maximum<T>(top);
      const Vec<T> keep = exp<T>(load(a.maximum + i) - finite),
                   add = exp<T>(load(b.maximum + i) - finite);
      store(a.sum + i, load(a.sum + i) * keep + load(b.sum + i) * add);
      store(a.maximum + i, top);
      for (int c = 0; c < dv_; ++c) {
        T* at = into.output + c * kMaxTile + i;
        store(at, load(at) * keep + load(part.output + c * kMaxTile + i) * add);
      }
    }
  }

  void narrow(int64_t head) {
    const Head<S> output = head_of<S>(p_.output, p_.heads, head);
    const Head<T> wide = wide_output(head);
    for (int64_t i = 0; i < p_.n_q; ++i)
      unpack_row<S>(output.data + i * output.stride, wide.data + i * wide.stride, dv_);
  }

  const AttentionParams& p_;
  const ListedForward<S> listed_;
  const int d_, dv_;
  bool keeps_sums_ = false, merges_in_memory_ = false;
  T* sums_ = nullptr;
  T* wide_output_ = nullptr;
  char* slots_ = nullptr;
  int64_t slots_per_head_ = 0, slot_bytes_ = 0;
  char* scratch_ = nullptr;
  int64_t scratch_bytes_ = 0;
};

}  // namespace
