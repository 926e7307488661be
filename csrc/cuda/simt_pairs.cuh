// The pairs of a task, visit by visit, and the products that the derivatives along a tangent take
// of them; without a tangent its part is 0.
#pragma once

#include "cuda/pairs_along.cuh"
#include "cuda/simt_tiles.cuh"

namespace sparse_attn::cuda {

template <class S, Side kSide>
class SimtPairs {
  using T = Real<S>;
  using Products = SimtProducts<S>;
  static constexpr bool kByRows = kSide == Side::kRows;

 public:
  using Logits = typename Products::Logits;
  static constexpr int kSharedBytes =
      SimtTiles<S, false>::kBytes + 2 * SimtTiles<S, false>::kStatsBytes;

  /// A head of queries and what it sees of the key head.
  struct Head {
    std::int64_t number;
    TileRows<S> query, key, value, grad_output;
    TileRows<S> query_dot, key_dot, value_dot;
    HeadAlong<T> modifiers;
  };

  /// q · k and dO · v of the pairs, and their changes; of tiles of the own side by the other's.
  struct PairProducts {
    Logits score, score_dot, dp, dp_dot;
  };

  __device__ SimtPairs(const Arguments& a, const Work& work)
      : tiles(a, work),
        a_(a),
        work_(work),
        lse_dot_(reinterpret_cast<T*>(shared_memory() + SimtTiles<S, false>::kBytes)),
        delta_dot_(lse_dot_ + kMaxTile) {
    if (kByRows) {
      load_rows(work.row_tile(0), work.head);
    } else {
      tiles.load_keys(work.own_tile(0));
    }
  }

  __device__ Head head(std::int64_t number) const {
    const AttentionParams& call = a_.call;
    const std::int64_t shared = number / (call.heads / call.heads_kv);
    const auto rows = [&](const TensorView& tensor, std::int64_t head, const std::int64_t* tokens,
                          std::int64_t size) -> TileRows<S> {
      if (tensor.data == nullptr) return {{nullptr, 0}, tokens, 0};
      return {head_of<const S>(tensor, work_.batch, head), tokens, static_cast<int>(size)};
    };
    return {number,
            rows(call.query, number, tiles.rows, call.head_dim),
            rows(call.key, shared, tiles.keys, call.head_dim),
            rows(call.value, shared, tiles.keys, call.value_dim),
            rows(call.grad_output, number, tiles.rows, call.value_dim),
            rows(call.query_tangent, number, tiles.rows, call.head_dim),
            rows(call.key_tangent, shared, tiles.keys, call.head_dim),
            rows(call.value_tangent, shared, tiles.keys, call.value_dim),
            HeadAlong<T>(call, work_.batch, number)};
  }

  /// The tile of the other side, and which pairs are allowed.
  __device__ void load_other(const VisitWalk& at, std::int64_t head) {
    sync_threads();  // all are done with the pairs before
    if (!kByRows) load_rows(work_.pass->row_tiles[at.tile()], head);
    const Tile& keys = kByRows ? work_.other_tile(at.tile()) : work_.own_tile(0);
    if (kByRows) tiles.load_keys(keys);
    tiles.load_words(keys, at);
  }

  /// Leaves out rows of the own tile whose query is not one of those that count.
  template <class Counts>
  __device__ void keep_rows(Counts counts) {
    const int i = static_cast<int>(threadIdx.x);
    if (i < kMaxTile && tiles.rows[i] >= 0 && !counts(tiles.rows[i])) tiles.rows[i] = -1;
  }

  __device__ void multiply_scores(PairProducts& d, const Head& of) {
    Products::clear(d.score);
    Products::clear(d.score_dot);
    multiply(d.score, of.query, of.key);
    multiply(d.score_dot, of.query_dot, of.key);
    multiply(d.score_dot, of.query, of.key_dot);
  }
  __device__ void multiply_values(PairProducts& d, const Head& of) {
    Products::clear(d.dp);
    Products::clear(d.dp_dot);
    multiply(d.dp, of.grad_output, of.value);
    multiply(d.dp_dot, of.grad_output, of.value_dot);
  }

  // Of element (i, j) of a thread.
  static __device__ int row(int i, int j) {
    return kByRows ? simt_y() + kSimtSide * i : simt_x() + kSimtSide * j;
  }
  static __device__ int key(int i, int j) {
    return kByRows ? simt_x() + kSimtSide * j : simt_y() + kSimtSide * i;
  }
  __device__ bool allows(int i, int j) const {
    return tiles.rows[row(i, j)] >= 0 && tiles.allows(row(i, j), key(i, j));
  }
  __device__ PairPlace place(const Head& of, int i, int j) const {
    return of.modifiers.place(tiles.rows[row(i, j)], tiles.keys[key(i, j)]);
  }
  __device__ RowAlong<T> numbers(int r) const {
    return {tiles.lse[r], lse_dot_[r], tiles.delta[r], delta_dot_[r]};
  }
  __device__ GradientAlong<T> gradient(const PairProducts& d, const Head& of, int i, int j) const {
    return {of.modifiers.logit(place(of, i, j), d.score[i][j], d.score_dot[i][j]),
            numbers(row(i, j)), d.dp[i][j], d.dp_dot[i][j]};
  }

  SimtTiles<S, false> tiles;

 private:
  /// Rows that have no keys are left out.
  __device__ void load_rows(const RowTile& from, std::int64_t head) {
    tiles.load_rows(from);
    const int i = static_cast<int>(threadIdx.x);
    if (i >= kMaxTile) return;
    const std::int64_t row = tiles.rows[i];
    const RowAlong<T> of =
        row < 0 ? RowAlong<T>::none()
                : RowAlong<T>::load(a_, first_row_of(a_.call, work_.batch, head) + row);
    if (of.is_none()) tiles.rows[i] = -1;
    tiles.lse[i] = of.lse;
    tiles.delta[i] = of.delta;
    lse_dot_[i] = of.lse_dot;
    delta_dot_[i] = of.delta_dot;
  }

  /// d += rows · keysᵀ, the own tile's down; nothing without one of the tensors.
  __device__ void multiply(Logits& d, const TileRows<S>& rows, const TileRows<S>& keys) {
    if (rows.head.data == nullptr || keys.head.data == nullptr) return;
    Products::add_rows_by_rows(d, kByRows ? rows : keys, kByRows ? keys : rows, tiles.stage);
  }

  const Arguments& a_;
  const Work& work_;
  T* const lse_dot_;
  T* const delta_dot_;
};

}  // namespace sparse_attn::cuda
