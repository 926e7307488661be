// What a thread block works on: its head, its task of one or two tiles, the tiles of the other side
// that it visits, and which pairs of a visit are allowed.
#pragma once

#include <cstdint>

#include "cuda/args.h"
#include "cuda/ptx.cuh"

namespace sparse_attn::cuda {

/// What tasks have tiles of: of rows (forward, dQ) or of keys (dK, dV).
enum class Side { kRows, kKeys };

// ---- tensors ------------------------------------------------------------------------------------

/// The rows of one head.
template <class S>
struct HeadView {
  S* data;
  std::int64_t stride;

  __device__ S* row(std::int64_t token) const { return data + token * stride; }
  __device__ S* row(const Tile& tile, const std::int64_t* list, int i) const {
    return row(token(tile, list, i));
  }
};

template <class S>
__device__ inline HeadView<S> head_of(const TensorView& tensor, std::int64_t batch,
                                      std::int64_t head) {
  return {static_cast<S*>(tensor.data) + batch * tensor.batch_stride + head * tensor.head_stride,
          tensor.row_stride};
}

// Of the query head `head`, and of the key head that it shares.
template <class S>
__device__ inline HeadView<const S> query_head(const AttentionParams& call, std::int64_t batch,
                                               std::int64_t head) {
  return head_of<const S>(call.query, batch, head);
}
template <class S>
__device__ inline HeadView<const S> grad_output_head(const AttentionParams& call,
                                                     std::int64_t batch, std::int64_t head) {
  return head_of<const S>(call.grad_output, batch, head);
}
template <class S>
__device__ inline HeadView<const S> key_head(const AttentionParams& call, std::int64_t batch,
                                             std::int64_t head) {
  return head_of<const S>(call.key, batch, head / (call.heads / call.heads_kv));
}
template <class S>
__device__ inline HeadView<const S> value_head(const AttentionParams& call, std::int64_t batch,
                                               std::int64_t head) {
  return head_of<const S>(call.value, batch, head / (call.heads / call.heads_kv));
}

/// The padding of one example's keys, or null.
__device__ inline const std::uint8_t* padding_of(const AttentionParams& call, std::int64_t batch) {
  return call.key_padding == nullptr ? nullptr : call.key_padding + batch * call.n_k;
}

/// Of head `head` in anything (batch, heads, n_q).
__device__ inline std::int64_t first_row_of(const AttentionParams& call, std::int64_t batch,
                                            std::int64_t head) {
  return (batch * call.heads + head) * call.n_q;
}

// ---- blocks -------------------------------------------------------------------------------------

/// A number (of a task, a reduction or a token) and the head that it is for.
struct HeadWork {
  std::int64_t number;
  std::int64_t batch;
  std::int64_t head;      // of the queries; in a sweep of keys the first of those that share a key
  std::int64_t own_head;  // batch x heads of the side at hand, whose slots are together

  /// `index` = number * (batch * heads) + head: the heads of a task run side by side.
  static __device__ HeadWork numbers_first(const AttentionParams& call, Side side,
                                           std::int64_t index) {
    const std::uint32_t heads = small(call.batch * heads_of(call, side)), i = small(index);
    return of_head(call, side, i / heads, i % heads);
  }
  /// `index` = head * tokens + number, as in a (batch, heads, tokens) array.
  static __device__ HeadWork heads_first(const AttentionParams& call, Side side,
                                         std::int64_t index) {
    const std::int64_t tokens = side == Side::kRows ? call.n_q : call.n_k;
    return of_head(call, side, index % tokens, index / tokens);
  }
  static __device__ HeadWork of_head(const AttentionParams& call, Side side, std::int64_t number,
                                     std::int64_t own_head) {
    const std::uint32_t heads = small(heads_of(call, side)), own = small(own_head);
    return {number, own / heads, own % heads * (small(call.heads) / heads), own_head};
  }

  __device__ std::int64_t key_head(const AttentionParams& call) const {
    return small(head) / (small(call.heads) / small(call.heads_kv));
  }
  __device__ std::int64_t plan(const Arguments& a) const {
    const std::uint32_t plan_batch = small(a.plan_batch), plan_heads = small(a.plan_heads);
    return small(batch) % plan_batch * std::int64_t{plan_heads} +
           small(head) / (small(a.call.heads) / plan_heads);
  }

 private:
  /// Blocks, and so tasks of all heads, are fewer than 2^31: a division takes a quarter of the
  /// time.
  static __device__ std::uint32_t small(std::int64_t number) {
    return static_cast<std::uint32_t>(number);
  }
  static __device__ std::int64_t heads_of(const AttentionParams& call, Side side) {
    return side == Side::kRows ? call.heads : call.heads_kv;
  }
};

/// A softmax state in memory.
template <class T>
struct StateRow {
  T* output;
  T* maximum;
  T* sum;
};

template <class T>
__device__ inline StateRow<T> state_row(const States& states, std::int64_t row,
                                        std::int64_t value_dim) {
  return {static_cast<T*>(states.output) + row * value_dim, static_cast<T*>(states.maximum) + row,
          static_cast<T*>(states.sum) + row};
}

/// The block's task.
struct Work {
  const Side side;
  const HeadWork place;
  const std::int64_t batch, head;
  const GridPass* const pass;
  const Sweep* const sweep;
  const Task* const task;
  const Visits* const visits;

  __device__ Work(const Arguments& a, Side side_)
      : Work(a, side_, HeadWork::numbers_first(a.call, side_, blockIdx.x)) {}
  __device__ Work(const Arguments& a, Side side_, const HeadWork& place_)
      : side(side_),
        place(place_),
        batch(place.batch),
        head(place.head),
        pass(a.passes + place.plan(a)),
        sweep(side_ == Side::kRows ? &pass->rows : &pass->keys),
        task(sweep->tasks + place.number),
        visits(sweep->visits),
        end_head_(side_ == Side::kRows ? head + 1 : head + a.call.heads / a.call.heads_kv) {}

  /// Other heads' plans may have more tasks than this one's.
  __device__ bool found() const { return place.number < sweep->task_count; }
  __device__ bool has_visits() const { return task->first_visit != task->end_visit; }

  /// The query heads to go through are [head, end_head()).
  __device__ std::int64_t end_head() const { return end_head_; }

  __device__ bool has_tile(int g) const { return task->tiles[g] >= 0; }
  __device__ const RowTile& row_tile(int g) const { return pass->row_tiles[task->tiles[g]]; }
  __device__ const Tile& own_tile(int g) const {
    return side == Side::kRows ? row_tile(g).rows : pass->key_tiles[task->tiles[g]];
  }
  __device__ const Tile& other_tile(int i) const {
    return side == Side::kRows ? pass->key_tiles[i] : pass->row_tiles[i].rows;
  }

  /// Whether the results of a row (or key) of tile g are this task's.
  __device__ bool owns(int g, int row) const {
    if (!has_tile(g) || row >= own_tile(g).count) return false;
    return side == Side::kKeys || (row_tile(g).owned >> row & 1) != 0;
  }
  __device__ std::int64_t own_token(int g, int row) const {
    return token(own_tile(g), pass->token_list, row);
  }

  /// Where the state of a row is kept between sweeps.
  template <class T>
  __device__ StateRow<T> row_state(const Arguments& a, int g, int row) const {
    return state_row<T>(a.rows, first_row_of(a.call, batch, head) + own_token(g, row),
                        a.call.value_dim);
  }
  /// The number of a row in the slot of tile g.
  __device__ std::int64_t slot_row(const Arguments& a, int g, int row) const {
    const std::int64_t slot = task->slot + std::int64_t{g} * task->slot_step;
    return (place.own_head * a.slots_per_head + slot) * kMaxTile + row;
  }

 private:
  const std::int64_t end_head_;
};

/// What load_covers() (evaluate.cuh) finds of a visit, for each of the task's tiles: these bits,
/// none set where no pair is allowed. Visits beyond the most are taken for kSomeOfTile.
constexpr unsigned kAllOfTile = 1, kSomeOfTile = 2, kCoverBits = 2;
constexpr int kMostCovers = 4096;

/// The tiles that a task visits, one by one.
class VisitWalk {
 public:
  /// With the covers of the visits, those without a pair are left out.
  __device__ explicit VisitWalk(const Work& work, const std::uint8_t* covers = nullptr)
      : work_(work), covers_(covers), run_(work.task->first_visit), end_(work.task->end_visit) {
    skip_empty();
  }

  __device__ bool done() const { return run_ == end_; }
  __device__ int tile() const { return run().tile + in_run_; }
  /// kFull, kSkip, kEvaluate or the number of a mask.
  __device__ std::int32_t mask(int g) const {
    const std::int32_t mask = run().masks[g];
    if (covers_ == nullptr || mask != kEvaluate) return mask;
    const unsigned cover = this->cover() >> kCoverBits * static_cast<unsigned>(g);
    return cover & kSomeOfTile ? kEvaluate : cover & kAllOfTile ? kFull : kSkip;
  }
  __device__ void next() {
    advance();
    skip_empty();
  }

 private:
  __device__ const Visits& run() const { return work_.visits[run_]; }
  __device__ unsigned cover() const {
    return number_ < kMostCovers ? covers_[number_] : kSomeOfTile | kSomeOfTile << kCoverBits;
  }
  __device__ void advance() {
    ++number_;
    if (++in_run_ < run().count) return;
    in_run_ = 0;
    ++run_;
  }
  __device__ void skip_empty() {
    while (covers_ != nullptr && !done() && cover() == 0) advance();
  }

  const Work& work_;
  const std::uint8_t* covers_;
  std::uint32_t run_, end_;
  int in_run_ = 0;
  int number_ = 0;
};

// ---- masks --------------------------------------------------------------------------------------

/// Whether a visit to (or of) a tile of keys has pairs that are not allowed, as far as keys tell.
__device__ inline bool needs_words(const AttentionParams& call, const Tile& keys,
                                   std::int32_t mask) {
  return mask >= 0 || mask == kEvaluate || keys.count < kMaxTile || call.key_padding != nullptr;
}

/// The words of a visit's kMaxTile keys: bit r of a key's word is set when row r sees the key. They
/// are there after a barrier.
__device__ inline void load_mask_words(std::uint64_t* words, const AttentionParams& call,
                                       const GridPass& pass, std::int64_t batch, const Tile& keys,
                                       std::int32_t mask) {
  const std::uint8_t* padding = padding_of(call, batch);
  for (int i = static_cast<int>(threadIdx.x); i < kMaxTile; i += static_cast<int>(blockDim.x)) {
    const bool is_key =
        i < keys.count && (padding == nullptr || padding[token(keys, pass.token_list, i)] == 0);
    words[i] = !is_key ? 0 : mask >= 0 ? pass.masks[mask][i] : ~std::uint64_t{0};
  }
}

}  // namespace sparse_attn::cuda
