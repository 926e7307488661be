// A product of matrices as kernels for sm_90a do it, with room for one mistake: a warp has tiles
// copied to a ring of stages, a warpgroup multiplies them.
#pragma once

#include "cuda/ptx_sm90.cuh"

enum class PipelineBug {
  kNone,
  kNoWaitForFull,
  kNoWaitForEmpty,
  kReleasedTooEarly,  // a stage, while products still read it
  kReadTooEarly,      // the sums, while products still add to them
  kWrongParity,
  kNoFence,
  kWrongSwizzle,
  kTooFewBytes,
};

struct PipelineMatrices {
  sparse_attn::cuda::TensorMap b;  // bfloat16, kTiles * 64 x kDepth
  const std::uint16_t* a;          // bfloat16, 64 x kDepth
  float* c;                        // 64 x 64: the sum of a bᵀ over the tiles of b
};

template <PipelineBug kBug>
class PlantedPipeline {
  static constexpr int kRows = 64, kRowBytes = 128, kPieceBytes = kRows * kRowBytes;
  static constexpr int kPieces = 2, kTileBytes = kPieces * kPieceBytes, kStages = 2;
  static constexpr int kBarriers = (kStages + 1) * kTileBytes;  // where they are

 public:
  static constexpr int kTiles = 8, kDepth = 64 * kPieces;
  static constexpr int kThreads = sparse_attn::cuda::kWarpgroup + 32, kBlocksPerSM = 1;
  static constexpr int kSharedBytes = kBarriers + 2 * kStages * 8;

  static __device__ void run(const PipelineMatrices& m) {
    using namespace sparse_attn::cuda;
    const int thread = static_cast<int>(threadIdx.x);
    if (thread == 0) {
      for (int stage = 0; stage < kStages; ++stage) {
        init(full(stage), 1);
        init(empty(stage), kWarpgroup / 32);
      }
      fence_barriers();
    }
    sync_threads();
    if (thread >= kWarpgroup) {
      if (thread == kWarpgroup) produce(m);
    } else {
      consume(m, thread);
    }
  }

 private:
  static __device__ char* tile(int stage) {
    return sparse_attn::cuda::shared_memory() + (1 + stage) * kTileBytes;
  }
  static __device__ sparse_attn::cuda::MBarrier* full(int stage) {
    return reinterpret_cast<sparse_attn::cuda::MBarrier*>(sparse_attn::cuda::shared_memory() +
                                                          kBarriers) +
           stage;
  }
  static __device__ sparse_attn::cuda::MBarrier* empty(int stage) { return full(kStages + stage); }
  static __device__ unsigned parity(int t) { return static_cast<unsigned>(t / kStages % 2); }

  static __device__ void produce(const PipelineMatrices& m) {
    using namespace sparse_attn::cuda;
    for (int t = 0; t < kTiles; ++t) {
      const int stage = t % kStages;
      if (kBug != PipelineBug::kNoWaitForEmpty) wait(empty(stage), parity(t) ^ 1);
      arrive_expecting(full(stage), kBug == PipelineBug::kTooFewBytes ? kPieceBytes : kTileBytes);
      for (int piece = 0; piece < kPieces; ++piece) {
        tma_load(tile(stage) + piece * kPieceBytes, &m.b, full(stage),
                 {64 * piece, 0, kRows * t, 0, 0});
      }
    }
  }

  static __device__ void consume(const PipelineMatrices& m, int thread) {
    using namespace sparse_attn::cuda;
    load_a(m, thread);
    float c[8][4];
    for (int t = 0; t < kTiles; ++t) {
      const int stage = t % kStages;
      if (kBug != PipelineBug::kNoWaitForFull)
        wait(full(stage), parity(t) ^ (kBug == PipelineBug::kWrongParity));
      multiply(c, stage, t > 0);
      if (kBug == PipelineBug::kReleasedTooEarly) release(stage, thread);
      if (kBug == PipelineBug::kReadTooEarly && t + 1 == kTiles) write(m.c, c, thread);
      wgmma_wait<0>();
      if (kBug != PipelineBug::kReleasedTooEarly) release(stage, thread);
    }
    if (kBug != PipelineBug::kReadTooEarly) write(m.c, c, thread);
  }

  /// By hand, as TMA would.
  static __device__ void load_a(const PipelineMatrices& m, int thread) {
    using namespace sparse_attn::cuda;
    for (int i = thread; i < kRows * kDepth / 8; i += kWarpgroup) {
      const int row = i / (kDepth / 8), chunk = i % (kDepth / 8);
      const int place = kBug == PipelineBug::kWrongSwizzle ? chunk % 8 : chunk % 8 ^ row % 8;
      cp_async_16(shared_memory() + chunk / 8 * kPieceBytes + row * kRowBytes + place * 16,
                  m.a + 8 * i, true);
    }
    cp_async_commit();
    cp_async_wait<0>();
    if (kBug != PipelineBug::kNoFence) fence_async();
    sync_some(1, kWarpgroup);
  }

  static __device__ void multiply(float (&c)[8][4], int stage, bool add) {
    using namespace sparse_attn::cuda;
    const std::uint64_t a = matrix_descriptor(shared_memory(), 0);
    const std::uint64_t b = matrix_descriptor(tile(stage), 0);
    wgmma_fence();
    for (int k = 0; k < kDepth; k += 16) {
      const int bytes = k / 64 * kPieceBytes + k % 64 * 2;
      wgmma_m64n64k16_bf16<Major::kDepth>(c, advance(a, bytes), advance(b, bytes), add || k > 0);
    }
    wgmma_commit();
  }

  static __device__ void release(int stage, int thread) {
    if (thread % 32 == 0) sparse_attn::cuda::arrive(empty(stage));
  }

  static __device__ void write(float* to, const float (&c)[8][4], int thread) {
    const int row = thread / 32 * 16 + thread % 32 / 4, column = thread % 4 * 2;
    for (int n = 0; n < 8; ++n) {
      for (int i = 0; i < 4; ++i) to[(row + i / 2 * 8) * 64 + 8 * n + column + i % 2] = c[n][i];
    }
  }
};
