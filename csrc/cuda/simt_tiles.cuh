// What the portable kernels keep in shared memory, besides what products pass through: which tokens
// the tiles at hand have, what is allowed between them, and a tile of probabilities.
#pragma once

#include "cuda/evaluate.cuh"
#include "cuda/logits.cuh"
#include "cuda/simt_products.cuh"

namespace sparse_attn::cuda {

/// `kModified`: the call has modifiers.
template <class S, bool kModified>
class SimtTiles {
  using T = Real<S>;
  using Logits = typename SimtProducts<S>::Logits;

 public:
  static constexpr int kTokensBytes = kMaxTile * static_cast<int>(sizeof(std::int64_t));
  static constexpr int kStatsBytes = kMaxTile * static_cast<int>(sizeof(T));
  static constexpr int kBytes = SimtProducts<S>::kTileBytes + SimtProducts<S>::kStageBytes +
                                (kModified ? 4 : 3) * kTokensBytes + 2 * kStatsBytes + kMostCovers;

  __device__ SimtTiles(const Arguments& a, const Work& work) : a_(a), work_(work) {
    tile = reinterpret_cast<T*>(shared_memory());
    stage = shared_memory() + SimtProducts<S>::kTileBytes;
    rows = reinterpret_cast<std::int64_t*>(stage + SimtProducts<S>::kStageBytes);
    keys = rows + kMaxTile;
    words = reinterpret_cast<std::uint64_t*>(keys + kMaxTile);
    keeps = words + (kModified ? kMaxTile : 0);
    lse = reinterpret_cast<T*>(keeps + kMaxTile);
    delta = lse + kMaxTile;
    if (work.pass->program == nullptr) return;
    covers = reinterpret_cast<std::uint8_t*>(delta + kMaxTile);
    load_covers(covers, a, work, static_cast<int>(blockDim.x));
    sync_threads();
  }

  /// Tokens of a tile of keys, without the padded ones.
  __device__ void load_keys(const Tile& from) {
    const std::uint8_t* padding = padding_of(a_.call, work_.batch);
    for_each([&](int i) {
      std::int64_t key = i < from.count ? token(from, list(), i) : -1;
      if (key >= 0 && padding != nullptr && padding[key] != 0) key = -1;
      keys[i] = key;
    });
  }

  /// Tokens of a tile of rows.
  __device__ void load_rows(const RowTile& from) {
    for_each([&](int i) { rows[i] = owned_token(from, i); });
  }

  /// The same with log-sum-exp and delta, and without the rows that have no keys. That of a row
  /// that is left out is +inf, so that its probabilities are 0.
  __device__ void load_rows(const RowTile& from, std::int64_t head) {
    const std::int64_t first = first_row_of(a_.call, work_.batch, head);
    for_each([&](int i) {
      const std::int64_t row = owned_token(from, i);
      const T of_row =
          row < 0 ? static_cast<T>(-kInfinity) : static_cast<const T*>(a_.call.lse)[first + row];
      const bool live = of_row != static_cast<T>(-kInfinity);
      rows[i] = live ? row : -1;
      lse[i] = live ? of_row : static_cast<T>(kInfinity);
      delta[i] = live ? static_cast<const T*>(a_.delta)[first + row] : T{0};
    });
  }

  /// Which pairs of a visit are allowed.
  __device__ void load_words(const Tile& of_keys, const VisitWalk& at) {
    masked = needs_words(a_.call, of_keys, at.mask(0));
    if (masked) cuda::load_words<true>(words, a_, work_, 0, at.tile(), at.mask(0));
  }
  __device__ bool allows(int row, int key) const { return !masked || (words[key] >> row & 1); }

  // With kByRows a thread's elements have rows for their rows, else keys.
  template <bool kByRows>
  static __device__ int row(int i, int j) {
    return kByRows ? simt_y() + kSimtSide * i : simt_x() + kSimtSide * j;
  }
  template <bool kByRows>
  static __device__ int key(int i, int j) {
    return row<!kByRows>(i, j);
  }

  /// Products of a head become logits: HeadLogits::shape().
  template <bool kByRows>
  __device__ void shape(Logits& x, Logits& slopes, std::int64_t head) const {
    const HeadLogits<T> logits(a_.call, work_.batch, head);
    const auto at_least_0 = [](std::int64_t token) { return token < 0 ? 0 : token; };
    logits.shape(x, slopes, [&](int i, PairPlace(&at)[kSimtRows]) {
#pragma unroll
      for (int j = 0; j < kSimtRows; ++j) {
        at[j] =
            logits.pair(at_least_0(rows[row<kByRows>(i, j)]), at_least_0(keys[key<kByRows>(i, j)]));
      }
      return true;
    });
  }

  /// Which pairs of a visit dropout keeps.
  __device__ void load_keeps(const VisitWalk& at, std::int64_t head) const {
    if (a_.call.modifiers.dropout_p == 0.0) return;
    const bool by_rows = work_.side == Side::kRows;
    const Tile &own = work_.own_tile(0), &other = work_.other_tile(at.tile());
    cuda::load_keeps(keeps, HeadDropout(a_.call, work_.batch, head), list(), by_rows ? own : other,
                     {}, by_rows ? other : own, {});
  }
  /// Elements of pairs that it does not keep become 0, and the others larger.
  template <bool kByRows>
  __device__ void drop(Logits& x) const {
    if (a_.call.modifiers.dropout_p == 0.0) return;
    const T factor = keep_factor<T>(a_.call.modifiers);
#pragma unroll
    for (int i = 0; i < kSimtRows; ++i) {
#pragma unroll
      for (int j = 0; j < kSimtRows; ++j) {
        const bool kept = keeps[row<kByRows>(i, j)] >> key<kByRows>(i, j) & 1;
        x[i][j] = kept ? x[i][j] * factor : T{0};
      }
    }
  }

  T* tile;
  char* stage;
  std::int64_t* rows;
  std::int64_t* keys;
  std::uint64_t* words;
  std::uint64_t* keeps;
  T* lse;
  T* delta;
  std::uint8_t* covers = nullptr;  // of visits that are left to the pass's program
  bool masked = false;

 private:
  __device__ const std::int64_t* list() const { return work_.pass->token_list; }

  __device__ std::int64_t owned_token(const RowTile& tile_of_rows, int i) const {
    const bool owned = i < tile_of_rows.rows.count && (tile_of_rows.owned >> i & 1);
    return owned ? token(tile_of_rows.rows, list(), i) : -1;
  }

  template <class Do>
  static __device__ void for_each(Do body) {
    const int i = static_cast<int>(threadIdx.x);
    if (i < kMaxTile) body(i);
  }

  const Arguments& a_;
  const Work& work_;
};

}  // namespace sparse_attn::cuda
