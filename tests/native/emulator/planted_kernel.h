// A small product of matrices as kernels here do it, with room for one mistake.
#pragma once

#include "cuda/ptx.cuh"

enum class Bug {
  kNone,
  kNoBarrierBefore,  // a tile is used before all of it has come
  kNoBarrierAfter,   // a tile is overwritten while others use it
  kWrongFragment,
  kNoWait,
  kOutOfBounds,
};

struct Matrices {
  const std::uint16_t* a;  // bfloat16, kRows x kDepth
  const std::uint16_t* b;  // bfloat16, kColumns x kDepth
  float* c;                // kRows x kColumns: c = a bᵀ
};

/// Two warps with 16 rows each. For each 16 columns of the operands: copy both tiles, multiply.
template <Bug kBug>
class PlantedKernel {
  static constexpr int kChunk = 8, kStep = 16;
  static constexpr int kRowBytes = 2 * kStep + 16;  // with padding

 public:
  static constexpr int kRows = 32, kColumns = 16, kDepth = 64;
  static constexpr int kThreads = 64, kBlocksPerSM = 1;
  static constexpr int kSharedBytes = (kRows + kColumns) * kRowBytes;

  static __device__ void run(const Matrices& m) {
    using namespace sparse_attn::cuda;
    const int thread = static_cast<int>(threadIdx.x), lane = thread % 32;
    const int first_row = thread / 32 * 16;
    char* a_tile = shared_memory();
    char* b_tile = a_tile + kRows * kRowBytes;
    float c[2][4] = {};
    for (int k = 0; k < kDepth; k += kStep) {
      copy(a_tile, m.a + k, kRows);
      copy(b_tile, m.b + k, kColumns);
      cp_async_commit();
      if (kBug != Bug::kNoWait) cp_async_wait<0>();
      if (kBug != Bug::kNoBarrierBefore) sync_threads();
      std::uint32_t a[4], b[4];
      ldmatrix_x4(a, a_tile + (first_row + lane % 16) * kRowBytes + lane / 16 * 16);
      ldmatrix_x4(b, b_tile + (lane / 16 * 8 + lane % 8) * kRowBytes + lane / 8 % 2 * 16);
      if (kBug == Bug::kWrongFragment) swap(a[1], a[2]);
      for (int n = 0; n < 2; ++n) mma_m16n8k16_bf16(c[n], a, b[2 * n], b[2 * n + 1]);
      if (kBug != Bug::kNoBarrierAfter) sync_threads();
    }
    cp_async_wait<0>();
    if (kBug == Bug::kOutOfBounds && thread == 0) shared_memory()[kSharedBytes] = 1;
    write(m.c, c, first_row + lane / 4, lane % 4 * 2);
  }

 private:
  static __device__ void copy(char* tile, const std::uint16_t* from, int rows) {
    for (int i = static_cast<int>(threadIdx.x); i < rows * kStep / kChunk; i += kThreads) {
      const int row = i / 2, chunk = i % 2;
      sparse_attn::cuda::cp_async_16(tile + row * kRowBytes + chunk * 16,
                                     from + row * kDepth + chunk * kChunk, true);
    }
  }
  static __device__ void swap(std::uint32_t& x, std::uint32_t& y) {
    const std::uint32_t was = x;
    x = y;
    y = was;
  }
  static __device__ void write(float* to, const float (&c)[2][4], int row, int column) {
    for (int n = 0; n < 2; ++n) {
      for (int i = 0; i < 4; ++i)
        to[(row + i / 2 * 8) * kColumns + 8 * n + column + i % 2] = c[n][i];
    }
  }
};
