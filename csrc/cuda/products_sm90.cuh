// Products of a warpgroup's tile of 64 rows with a tile of the other side, both in shared memory as
// TMA lays them, or the own one in registers.
#pragma once

#include "cuda/copy_sm90.cuh"

namespace sparse_attn::cuda {

/// The instructions of a storage type, by the number of columns.
template <class S>
struct Wgmma;

template <>
struct Wgmma<bfloat16> {
  template <Major kMajor, class A>
  static __device__ void multiply(float (&d)[8][4], const A& a, std::uint64_t b, bool add) {
    wgmma_m64n64k16_bf16<kMajor>(d, a, b, add);
  }
  template <Major kMajor, class A>
  static __device__ void multiply(float (&d)[16][4], const A& a, std::uint64_t b, bool add) {
    wgmma_m64n128k16_bf16<kMajor>(d, a, b, add);
  }
};

template <>
struct Wgmma<float16> {
  template <Major kMajor, class A>
  static __device__ void multiply(float (&d)[8][4], const A& a, std::uint64_t b, bool add) {
    wgmma_m64n64k16_f16<kMajor>(d, a, b, add);
  }
  template <Major kMajor, class A>
  static __device__ void multiply(float (&d)[16][4], const A& a, std::uint64_t b, bool add) {
    wgmma_m64n128k16_f16<kMajor>(d, a, b, add);
  }
};

template <class S, int kHeadSize>
struct WarpgroupProducts {
  using Copies = TileCopies<S, kHeadSize>;
  using F = Fragments<S>;
  static constexpr int kDepth = 16;  // of an instruction
  static constexpr int kSteps = kHeadSize / kDepth;
  static constexpr int kStepsOfPiece = kBoxColumns / kDepth;
  static constexpr int kStepsOfTile = kMaxTile / kDepth;
  using Logits = float[kMaxTile / 8][4];
  using Sums = float[kHeadSize / 8][4];
  using Operand = std::uint32_t[kStepsOfTile][4];  // 64 columns
  using Rows = std::uint32_t[kSteps][4];           // a tile of the head's columns

  /// The rows of a tile as operand a: 16 of each warp.
  static __device__ void load_rows(Rows& a, const char* tile) {
    const int lane = static_cast<int>(threadIdx.x) % 32,
              row = static_cast<int>(threadIdx.x) % kWarpgroup / 32 * 16 + lane % 16;
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      const int chunk = step % kStepsOfPiece * 2 + lane / 16;
      ldmatrix_x4(a[step], tile + step / kStepsOfPiece * Copies::kPieceBytes + row * kBoxRowBytes +
                               (chunk ^ row % 8) * kChunkBytes);
    }
  }

  /// d = own · otherᵀ, with the own rows in registers or in shared memory.
  static __device__ void rows_by_rows(Logits& d, const Rows& own, const char* other) {
    const std::uint64_t b = matrix_descriptor(other, kNoPiece);
#pragma unroll
    for (int step = 0; step < kSteps; ++step)
      Wgmma<S>::template multiply<Major::kDepth>(d, own[step], advance(b, along(step)), step > 0);
  }
  static __device__ void rows_by_rows(Logits& d, const char* own, const char* other) {
    // The descriptors of all steps would take 2 * kSteps registers in between.
    const std::uint64_t a = anew(matrix_descriptor(own, kNoPiece)),
                        b = matrix_descriptor(other, kNoPiece);
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      Wgmma<S>::template multiply<Major::kDepth>(d, advance(a, along(step)),
                                                 advance(b, along(step)), step > 0);
    }
  }

  /// sum += p · other, where p has a column for each row of the other tile.
  static __device__ void add_by_columns(Sums& sum, const Operand& p, const char* other) {
    const std::uint64_t b = matrix_descriptor(other, Copies::kPieceBytes);
#pragma unroll
    for (int step = 0; step < kStepsOfTile; ++step) {
      Wgmma<S>::template multiply<Major::kOther>(sum, p[step],
                                                 advance(b, step * kDepth * kBoxRowBytes), true);
    }
  }

  /// Starts d = own · otherᵀ, a group of its own.
  template <class Own>
  static __device__ void start_rows(Logits& d, const Own& own, const char* other) {
    pin(d);
    wgmma_fence();
    rows_by_rows(d, own, other);
    wgmma_commit();
  }
  /// Starts sum += p · other, likewise.
  static __device__ void start_columns(Sums& sum, Operand& p, const char* other) {
    pin(sum);
    pin(p);
    wgmma_fence();
    add_by_columns(sum, p, other);
    wgmma_commit();
  }

  static __device__ void as_operand(Operand& p, const Logits& d) {
#pragma unroll
    for (int step = 0; step < kStepsOfTile; ++step) F::as_a(p[step], &d[2 * step]);
  }

 private:
  static constexpr int kBoxRowBytes = kBoxColumns * static_cast<int>(sizeof(S));
  static constexpr int kNoPiece = 16;

  /// How far a step along the depth is.
  static __device__ constexpr int along(int step) {
    return step / kStepsOfPiece * Copies::kPieceBytes +
           step % kStepsOfPiece * kDepth * static_cast<int>(sizeof(S));
  }
};

}  // namespace sparse_attn::cuda
