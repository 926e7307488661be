// The steps of a task: the tiles of the other side that it visits, a few columns at a time, and
// the masks of a step.
#pragma once

#include "cuda/fragments.cuh"
#include "cuda/tiles.cuh"

namespace sparse_attn::cuda {

template <int kColumns>
class TaskSteps {
 public:
  __device__ explicit TaskSteps(const Work& work, const std::uint8_t* covers)
      : work_(work), walk_(work, covers) {}

  __device__ bool done() const { return walk_.done(); }
  __device__ int tile() const { return walk_.tile(); }
  __device__ std::int32_t mask(int g) const { return walk_.mask(g); }
  __device__ int first_column() const { return column_; }
  __device__ bool is_first_part() const { return column_ == 0; }

  /// Which tiles of the task take part.
  __device__ unsigned active(int group) const {
    return static_cast<unsigned>(mask(0) != kSkip) |
           static_cast<unsigned>(group > 1 && mask(1) != kSkip) << 1;
  }

  __device__ void next() {
    column_ += kColumns;
    if (column_ < work_.other_tile(tile()).count) return;
    column_ = 0;
    walk_.next();
  }

 private:
  const Work& work_;
  VisitWalk walk_;
  int column_ = 0;
};

/// Logits of pairs that the words (one for each column) do not allow become -inf. The lane has rows
/// g and g + 8 of 16, from `first_row` of the tile on.
template <int kTiles>
__device__ inline void mask_columns(float (&s)[kTiles][4], const std::uint64_t* words,
                                    int first_row) {
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const auto rows = static_cast<std::uint32_t>(words[fragment_column(n, i)] >> first_row);
      if (!(rows >> fragment_row(0, i / 2) & 1)) s[n][i] = -kInfinity;
    }
  }
}

}  // namespace sparse_attn::cuda
