// Backward: one sweep over the row tiles, five products for each key tile:
//
//   S = K Qᵀ, P = exp(S - lse), dP = V dOᵀ, dS = P ∘ (dP - delta),
//   dV += P dO, dK += dS Q, dQ += dSᵀ K
//
// with the queries in the SIMD lanes of S, P, dP, dS and dQ. dQ stays in cache for the whole row
// tile; dK and dV are added up in place. A chunk that shares key tiles with an earlier one adds to
// slots of its own, which are summed in a fixed order at the end.
#pragma once

#include "gemm.h"
#include "key_tiles.h"
#include "listed_backward.h"
#include "scheduler.h"
#include "softmax.h"
#include "tile.h"

namespace {

using sparse_attn::Reduction;
using sparse_attn::RowTile;
using sparse_attn::Run;
using sparse_attn::Segment;
using sparse_attn::SharedTile;

/// P = exp(S - lse). Rounding may leave S above lse; P is at most 1 all the same.
template <class T>
struct Probabilities {
  T* p;
  const T* lse;
  SPARSE_ATTN_INLINE Vec<T> probability(int n, Vec<T> sum) const {
    const Vec<T> x = sum - load(lse + n * kLanes<T>);
    return exp<T>(x > T{0} ? Vec<T>{} : x);
  }
  SPARSE_ATTN_INLINE void operator()(int m, int n, Vec<T> sum) const {
    store(p + m * kMaxTile + n * kLanes<T>, probability(n, sum));
  }
};

/// The same, 0 where a mask forbids the pair.
template <class T>
struct MaskedProbabilities {
  Probabilities<T> all;
  const uint64_t* words;
  SPARSE_ATTN_INLINE void operator()(int m, int n, Vec<T> sum) const {
    const Vec<T> p = all.probability(n, sum);
    store(all.p + m * kMaxTile + n * kLanes<T>, keep_lanes<T>(p, words[m], n, T{0}));
  }
};

/// dS = P ∘ (dP - delta) · scale.
template <class T>
struct LogitGradients {
  T* ds;
  const T* p;
  const T* delta;
  T scale;
  SPARSE_ATTN_INLINE void operator()(int m, int n, Vec<T> sum) const {
    const int at = m * kMaxTile + n * kLanes<T>;
    store(ds + at, load(p + at) * ((sum - load(delta + n * kLanes<T>)) * scale));
  }
};

template <class S>
class Backward {
 public:
  using T = Real<S>;

  explicit Backward(const AttentionParams& params)
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
    if (has_lists(p_)) delta_ = arena.take<T>(heads * p_.n_q);
    key_tiles_ = largest(p_, [](const PassView& pass) { return pass.key_tiles.size; });
    Arena one_thread(nullptr);
    Scratch(one_thread, *this);
    scratch_bytes_ = one_thread.used();
    scratch_ = arena.take<char>(threads * scratch_bytes_);
    return arena.used();
  }

  void run(const Parallel& parallel) {
    layout(p_.workspace, parallel.threads);
    const int64_t heads_kv = p_.batch * p_.heads_kv, passes = pass_count(p_);
    if (where_ == Where::kWide) {
      for_each_item(parallel, heads_kv, [&](int, int64_t head) { clear_wide(head); });
    }
    for (int64_t pass = 0; pass < passes; ++pass) {
      const int64_t chunks = largest(p_, pass, chunks_of);
      for_each_item(parallel, heads_kv * chunks, [&](int thread, int64_t item) {
        Arena arena(scratch_ + thread * scratch_bytes_);
        Scratch scratch(arena, *this);
        const int64_t head_kv = item / chunks;
        if (where_ == Where::kThread) clear_wide(thread);
        for (int64_t g = 0; g < group_; ++g) {
          chunk(scratch, thread, head_kv, head_kv * group_ + g, pass, item % chunks, g == 0);
        }
        if (where_ == Where::kThread) narrow_keys(head_kv, thread);
      });
      const bool shares = largest(p_, pass, [](const PassView& v) {
                            return v.key_reductions.size + v.row_reductions.size;
                          }) > 0;
      if (!shares) continue;
      for_each_item(parallel, heads_kv, [&](int thread, int64_t head_kv) {
        Arena arena(scratch_ + thread * scratch_bytes_);
        Scratch scratch(arena, *this);
        add_key_slots(head_kv, pass);
        for (int64_t g = 0; g < group_; ++g) add_row_slots(scratch, head_kv * group_ + g, pass);
      });
    }
    if (has_lists(p_)) run_lists(parallel);
    if (where_ != Where::kWide && !wide_queries_exist_) return;
    for_each_item(parallel, heads_kv, [&](int, int64_t head_kv) {
      if (where_ == Where::kWide) narrow_keys(head_kv, head_kv);
      for (int64_t g = 0; wide_queries_exist_ && g < group_; ++g)
        narrow_queries(head_kv * group_ + g);
    });
  }

 private:
  /// Where dK and dV are added up: in the tensors themselves; in wide rows of the thread, for half
  /// types and rows that are not whole vectors; in wide rows for every head, when several chunks or
  /// passes add to the same keys.
  enum class Where { kTensor, kThread, kWide };

  struct Scratch {
    Scratch(Arena& arena, const Backward& b)
        : query_rows(arena.take<T>(int64_t{kMaxTile} * b.d_wide_)),
          query(arena.take<T>(int64_t{kMaxTile} * b.d_wide_)),
          grad_output_rows(arena.take<T>(int64_t{kMaxTile} * b.dv_wide_)),
          grad_output(arena.take<T>(int64_t{kMaxTile} * b.dv_wide_)),
          output_rows(arena.take<T>(int64_t{kMaxTile} * b.dv_wide_)),
          lse(arena.take<T>(kMaxTile)),
          delta(arena.take<T>(kMaxTile)),
          p(arena.take<T>(kMaxTile * kMaxTile)),
          ds(arena.take<T>(kMaxTile * kMaxTile)),
          grad_query(arena.take<T>(int64_t{kMaxTile} * b.d_wide_)),
          grad_query_rows(arena.take<T>(int64_t{kMaxTile} * b.d_wide_)),
          gathered_key(arena.take<T>(int64_t{kMaxTile} * b.d_wide_)),
          gathered_value(arena.take<T>(int64_t{kMaxTile} * b.dv_wide_)),
          slot_of(arena.take<int32_t>(b.key_tiles_)),
          keys(arena, b.d_, b.dv_),
          listed(arena, b.d_, b.dv_) {}

    T* query_rows;        // packed, when they cannot be read in place
    T* query;             // [head_dim][kMaxTile], scaled
    T* grad_output_rows;  // packed, likewise
    T* grad_output;       // [value_dim][kMaxTile]
    T* output_rows;       // packed, likewise
    T* lse;         // [query]; +inf for rows without keys or of another tile: their probabilities
                    // are 0
    T* delta;       // [query], rowsum(dO ∘ O) less the gradient of the log-sum-exp
    T* p;           // [key][query]
    T* ds;          // [key][query]
    T* grad_query;  // [head_dim][kMaxTile]
    T* grad_query_rows;
    T* gathered_key;  // [key][head_dim], before it is scattered
    T* gathered_value;
    int32_t* slot_of;  // of each key tile in this chunk; -1 = none
    KeyTiles<S> keys;
    typename ListedBackward<S>::Scratch listed;
  };

  /// The rows of a row tile as the products need them.
  struct QueryTile {
    int count;
    int vectors;
    Rows<T> query;
    Rows<T> grad_output;
  };

  /// Sums of dK (or dV): `index` is the thread or the head, as where_ says.
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

  Head<T> query_sums(int64_t head) const {
    if (wide_queries_exist_) return {wide_queries_ + head * p_.n_q * d_wide_, d_wide_};
    if constexpr (kSameType<S, T>) return head_of<T>(p_.grad_query, p_.heads, head);
    return {nullptr, 0};
  }

  void run_lists(const Parallel& parallel) {
    const ListedBackward<S> listed(p_, delta_);
    const int64_t heads = p_.batch * p_.heads, shares = list_shares(heads, p_.n_q);
    for_each_item(parallel, heads * shares, [&](int thread, int64_t item) {
      Arena arena(scratch_ + thread * scratch_bytes_);
      const Scratch scratch(arena, *this);
      const int64_t head = item / shares;
      listed.queries(scratch.listed, head, query_sums(head), {p_.n_q, item % shares, shares});
    });
    const int64_t heads_kv = p_.batch * p_.heads_kv, key_shares = list_shares(heads_kv, p_.n_k);
    for_each_item(parallel, heads_kv * key_shares, [&](int thread, int64_t item) {
      Arena arena(scratch_ + thread * scratch_bytes_);
      const Scratch scratch(arena, *this);
      const int64_t head_kv = item / key_shares;
      for (int64_t head = head_kv * group_; head < (head_kv + 1) * group_; ++head) {
        listed.keys(scratch.listed, head, key_sums(head_kv, head_kv), value_sums(head_kv, head_kv),
                    {p_.n_k, item % key_shares, key_shares});
      }
    });
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

  void clear_wide(int64_t index) const {
    fill_zero(wide_keys_ + index * p_.n_k * d_wide_, p_.n_k * d_wide_);
    fill_zero(wide_values_ + index * p_.n_k * dv_wide_, p_.n_k * dv_wide_);
  }

  void chunk(Scratch& scratch, int thread, int64_t head_kv, int64_t head, int64_t pass_index,
             int64_t chunk_index, bool first_of_group) {
    const PlanView& plan = *p_.plans[head];
    if (pass_index >= plan.passes.size || chunk_index >= plan.passes[pass_index].chunks.size)
      return;
    const PassView& pass = plan.passes[pass_index];
    const Chunk& chunk = pass.chunks[chunk_index];
    scratch.keys.start(p_, plan, pass, head);
    for (int64_t i = 0; i < pass.key_tiles.size; ++i) scratch.slot_of[i] = -1;
    for (uint32_t i = chunk.first_shared; i < chunk.end_shared; ++i) {
      const SharedTile& shared = pass.shared_tiles[i];
      scratch.slot_of[shared.key_tile] = shared.slot;
      if (first_of_group)
        fill_zero(key_slot(head_kv, shared.slot), int64_t{d_wide_ + dv_wide_} * kMaxTile);
    }
    const int64_t index = where_ == Where::kThread ? thread : head_kv;
    const Head<T> key_grad = key_sums(head_kv, index), value_grad = value_sums(head_kv, index);
    for (uint32_t s = chunk.first_segment; s < chunk.end_segment; ++s) {
      segment(scratch, head_kv, head, plan, pass, pass.segments[s], pass_index, key_grad,
              value_grad);
    }
  }

  void segment(Scratch& scratch, int64_t head_kv, int64_t head, const PlanView& plan,
               const PassView& pass, const Segment& segment, int64_t pass_index, Head<T> key_grad,
               Head<T> value_grad) {
    const RowTile& row_tile = pass.row_tiles[segment.row_tile];
    T* grad_query = segment.slot < 0 ? scratch.grad_query : row_slot(head, segment.slot);
    fill_zero(grad_query, int64_t{d_wide_} * kMaxTile);
    if (segment.first_run < segment.end_run) {
      const QueryTile rows = load_rows(scratch, head, plan, row_tile);
      for (uint32_t r = segment.first_run; r < segment.end_run; ++r) {
        const Run& run = pass.runs[r];
        for (int32_t i = 0; i < run.count; ++i) {
          attend(scratch, head_kv, plan, rows, run.key_tile + i, run.mask, grad_query, key_grad,
                 value_grad);
        }
      }
    }
    if (segment.slot < 0) finish(scratch, head, plan, row_tile, grad_query, pass_index);
  }

  QueryTile load_rows(Scratch& scratch, int64_t head, const PlanView& plan,
                      const RowTile& tile) const {
    const int count = tile.rows.count;
    const uint64_t live = load_lse(scratch, head, plan, tile);
    const auto rows_of = [&](const sparse_attn::TensorView& view, int size, T* buffer) {
      return whole_vector_rows(head_of<const S>(view, p_.heads, head), tile.rows, plan.token_list,
                               size, live, buffer);
    };
    const QueryTile rows{count, round_up(count, kLanes<T>) / kLanes<T>,
                         rows_of(p_.query, d_, scratch.query_rows),
                         rows_of(p_.grad_output, dv_, scratch.grad_output_rows)};
    transpose_rows<T>(scratch.query, kMaxTile, rows.query, count, d_wide_,
                      static_cast<T>(p_.scale));
    transpose_rows<T>(scratch.grad_output, kMaxTile, rows.grad_output, count, dv_wide_, T{1});
    const Rows<T> output = rows_of(p_.output, dv_, scratch.output_rows);
    for (int i = 0; i < kMaxTile; ++i) {
      scratch.delta[i] = T{0};
      if (!(live >> i & 1)) continue;
      scratch.delta[i] = dot(rows.grad_output.row(i), output.row(i), dv_wide_);
      if (!p_.grad_lse) continue;
      const int64_t row = head * p_.n_q + sparse_attn::token(tile.rows, plan.token_list, i);
      scratch.delta[i] -= static_cast<const T*>(p_.grad_lse)[row];
    }
    return rows;
  }

  /// Loads the log-sum-exps; returns which rows this tile owns that have keys. The others count as
  /// zero throughout, whatever their gradient holds.
  uint64_t load_lse(Scratch& scratch, int64_t head, const PlanView& plan,
                    const RowTile& tile) const {
    uint64_t live = 0;
    for (int i = 0; i < kMaxTile; ++i) {
      scratch.lse[i] = kInfinity<T>;
      if (i >= tile.rows.count || !(tile.owned >> i & 1)) continue;
      const int64_t row = head * p_.n_q + sparse_attn::token(tile.rows, plan.token_list, i);
      const T lse = static_cast<const T*>(p_.lse)[row];
      if (lse == -kInfinity<T>) continue;
      scratch.lse[i] = lse;
      live |= uint64_t{1} << i;
    }
    return live;
  }

  static T dot(const T* a, const T* b, int size) {
    Vec<T> sum{};
    for (int i = 0; i < size; i += kLanes<T>) sum += load(a + i) * load(b + i);
    T total{0};
    for (int i = 0; i < kLanes<T>; ++i) total += sum[i];
    return total;
  }

  /// One key tile for one row tile.
  SPARSE_ATTN_INLINE void attend(Scratch& scratch, int64_t head_kv, const PlanView& plan,
                                 const QueryTile& rows, int32_t key_tile, int32_t mask,
                                 T* grad_query, Head<T> key_grad, Head<T> value_grad) {
    KeyTile<T> keys;
    if (!scratch.keys.get(key_tile, mask, keys)) return;
    const Operand<T, true> key{keys.key.data, keys.key.stride},
        value{keys.value.data, keys.value.stride};
    if (keys.words) {
      gemm(keys.count, rows.vectors, d_, key, scratch.query, kMaxTile,
           MaskedProbabilities<T>{{scratch.p, scratch.lse}, keys.words});
    } else {
      gemm(keys.count, rows.vectors, d_, key, scratch.query, kMaxTile,
           Probabilities<T>{scratch.p, scratch.lse});
    }
    gemm(keys.count, rows.vectors, dv_, value, scratch.grad_output, kMaxTile,
         LogitGradients<T>{scratch.ds, scratch.p, scratch.delta, static_cast<T>(p_.scale)});
    gemm(d_, rows.vectors, keys.count, Operand<T, false>{keys.key.data, keys.key.stride},
         scratch.ds, kMaxTile, AddTo<T>{grad_query, kMaxTile});

    const Tile& tile = scratch.keys.tile(key_tile);
    const int32_t slot = scratch.slot_of[key_tile];
    const bool scatter = tile.list >= 0 && slot < 0;
    AddTo<T> to_key{}, to_value{};
    if (slot >= 0) {
      to_key = {key_slot(head_kv, slot), d_wide_};
      to_value = {value_slot(head_kv, slot), dv_wide_};
    } else if (scatter) {
      fill_zero(scratch.gathered_key, int64_t{d_wide_} * keys.count);
      fill_zero(scratch.gathered_value, int64_t{dv_wide_} * keys.count);
      to_key = {scratch.gathered_key, d_wide_};
      to_value = {scratch.gathered_value, dv_wide_};
    } else {
      to_key = {key_grad.row(tile, nullptr, 0), key_grad.stride * tile.step};
      to_value = {value_grad.row(tile, nullptr, 0), value_grad.stride * tile.step};
    }
    gemm(keys.count, dv_wide_ / kLanes<T>, rows.count, Operand<T, true>{scratch.p, kMaxTile},
         rows.grad_output.data, rows.grad_output.stride, to_value);
    gemm(keys.count, d_wide_ / kLanes<T>, rows.count, Operand<T, true>{scratch.ds, kMaxTile},
         rows.query.data, rows.query.stride, to_key);
    if (scatter) {
      add_tile(key_grad, tile, plan.token_list, scratch.gathered_key, d_wide_);
      add_tile(value_grad, tile, plan.token_list, scratch.gathered_value, dv_wide_);
    }
  }

  static void add_tile(Head<T> sum, const Tile& tile, const int64_t* list, const T* rows,
                       int width) {
    for (int i = 0; i < tile.count; ++i)
      add_row(sum.row(tile, list, i), rows + int64_t{i} * width, width);
  }

  /// Writes dQ of the owned rows, or adds it to what earlier passes wrote.
  void finish(Scratch& scratch, int64_t head, const PlanView& plan, const RowTile& tile,
              const T* grad_query, int64_t pass_index) {
    transpose_rows<T>(scratch.grad_query_rows, d_wide_, {grad_query, kMaxTile}, d_,
                      round_up(tile.rows.count, kLanes<T>), T{1});
    for (int i = 0; i < tile.rows.count; ++i) {
      if (!(tile.owned >> i & 1)) continue;
      const int64_t row = sparse_attn::token(tile.rows, plan.token_list, i);
      T* from = scratch.grad_query_rows + int64_t{i} * d_wide_;
      const bool no_keys = static_cast<const T*>(p_.lse)[head * p_.n_q + row] == -kInfinity<T>;
      if (no_keys) fill_zero(from, d_wide_);  // 0 · NaN of a masked key is NaN
      if (wide_queries_exist_) {
        add_or_set<T>(wide_queries_ + (head * p_.n_q + row) * d_wide_, from, pass_index > 0);
      } else {
        const Head<S> to = head_of<S>(p_.grad_query, p_.heads, head);
        add_or_set<S>(to.data + row * to.stride, from, pass_index > 0);
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

  void add_key_slots(int64_t head_kv, int64_t pass_index) {
    const PlanView& plan = *p_.plans[head_kv * group_];
    if (pass_index >= plan.passes.size) return;
    const PassView& pass = plan.passes[pass_index];
    const Head<T> key_grad = key_sums(head_kv, head_kv), value_grad = value_sums(head_kv, head_kv);
    for (const Reduction& reduction : pass.key_reductions) {
      const Tile& tile = pass.key_tiles[reduction.tile];
      for (int32_t s = reduction.first_slot; s < reduction.end_slot; ++s) {
        add_tile(key_grad, tile, plan.token_list, key_slot(head_kv, s), d_wide_);
        add_tile(value_grad, tile, plan.token_list, value_slot(head_kv, s), dv_wide_);
      }
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
      finish(scratch, head, plan, pass.row_tiles[reduction.tile], sum, pass_index);
    }
  }

  void narrow_keys(int64_t head_kv, int64_t index) const {
    const Head<S> key = head_of<S>(p_.grad_key, p_.heads_kv, head_kv),
                  value = head_of<S>(p_.grad_value, p_.heads_kv, head_kv);
    const T* key_sum = wide_keys_ + index * p_.n_k * d_wide_;
    const T* value_sum = wide_values_ + index * p_.n_k * dv_wide_;
    for (int64_t i = 0; i < p_.n_k; ++i) {
      unpack_row<S>(key.data + i * key.stride, key_sum + i * d_wide_, d_);
      unpack_row<S>(value.data + i * value.stride, value_sum + i * dv_wide_, dv_);
    }
  }

  void narrow_queries(int64_t head) const {
    const Head<S> to = head_of<S>(p_.grad_query, p_.heads, head);
    for (int64_t i = 0; i < p_.n_q; ++i) {
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
  T* delta_ = nullptr;  // of the lists
  char* scratch_ = nullptr;
  int64_t scratch_bytes_ = 0;
};

}  // namespace
