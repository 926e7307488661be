// What the portable kernels keep in shared memory, besides what products pass through: which tokens
// the tiles at hand have, what is allowed between them, and a tile of probabilities.
#pragma once

#include "cuda/evaluate.cuh"
#include "cuda/simt_products.cuh"

namespace sparse_attn::cuda {

template <class S>
class SimtTiles {
  using T = Real<S>;

 public:
  static constexpr int kTokensBytes = kMaxTile * static_cast<int>(sizeof(std::int64_t));
  static constexpr int kStatsBytes = kMaxTile * static_cast<int>(sizeof(T));
  static constexpr int kBytes = SimtProducts<S>::kTileBytes + SimtProducts<S>::kStageBytes +
                                3 * kTokensBytes + 2 * kStatsBytes + kMostCovers;

  __device__ SimtTiles(const Arguments& a, const Work& work) : a_(a), work_(work) {
    tile = reinterpret_cast<T*>(shared_memory());
    stage = shared_memory() + SimtProducts<S>::kTileBytes;
    rows = reinterpret_cast<std::int64_t*>(stage + SimtProducts<S>::kStageBytes);
    keys = rows + kMaxTile;
    words = reinterpret_cast<std::uint64_t*>(keys + kMaxTile);
    lse = reinterpret_cast<T*>(words + kMaxTile);
    delta = lse + kMaxTile;
    if (work.pass->program == nullptr) return;
    covers = reinterpret_cast<std::uint8_t*>(delta + kMaxTile);
    load_covers(covers, a, work);
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

  T* tile;
  char* stage;
  std::int64_t* rows;
  std::int64_t* keys;
  std::uint64_t* words;
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
