// Tensor-core products of tiles in shared memory: how fragments of each type are loaded, and
// multiplied.
//
// A tile has rows of kHeadSize elements, 16 bytes of padding between them: eight rows then lie in
// eight different quarters of the banks, for ldmatrix as for single words. All products work on
// 16-byte chunks of rows: two chunks are the depth of one instruction in every type.
#pragma once

#include <cstdint>

#include "cuda/ptx.cuh"
#include "cuda/scalar.cuh"

namespace sparse_attn::cuda {

constexpr int kChunkBytes = 16;

template <class S>
constexpr int kChunk = kChunkBytes / static_cast<int>(sizeof(S));

/// Bytes between rows of a tile in shared memory.
template <class S, int kHeadSize>
constexpr int kRowBytes = kHeadSize * static_cast<int>(sizeof(S)) + kChunkBytes;

/// Where four matrices of 8 rows x 1 chunk are that make 16 rows x 2 chunks: first along the rows
/// (operand a, and b of a transposed tile), or first along the chunks (operand b).
__device__ inline const char* rows_first(const char* tile, int row_bytes, int row, int chunk) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  return tile + (row + lane % 16) * row_bytes + (chunk + lane / 16) * kChunkBytes;
}
__device__ inline const char* chunks_first(const char* tile, int row_bytes, int row, int chunk) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  return tile + (row + lane / 16 * 8 + lane % 8) * row_bytes + (chunk + lane / 8 % 2) * kChunkBytes;
}

/// Fragments of one storage type.
template <class S>
struct Fragments;

template <class Packed>
struct HalfFragments {
  /// Rows of the other side that one step of the second product takes.
  static constexpr int kDepth = 16;

  static __device__ void load_a(std::uint32_t (&a)[4], const char* tile, int row_bytes, int row,
                                int chunk) {
    ldmatrix_x4(a, rows_first(tile, row_bytes, row, chunk));
  }
  /// Two b: of rows [row, row + 8) and of the next eight.
  static __device__ void load_b(std::uint32_t (&b)[4], const char* tile, int row_bytes, int row,
                                int chunk) {
    ldmatrix_x4(b, chunks_first(tile, row_bytes, row, chunk));
  }
  /// Two b whose depth runs down kDepth rows: of columns [column, column + 8) and of the next
  /// eight.
  static __device__ void load_b_down(std::uint32_t (&b)[4], const char* tile, int row_bytes,
                                     int row, int column) {
    ldmatrix_x4_trans(b, rows_first(tile, row_bytes, row, column / 8));
  }
  /// The results of a product, kDepth columns of it, as operand a of the next.
  static __device__ void as_a(std::uint32_t (&a)[4], const float (*d)[4]) {
    a[0] = Packed::pack(d[0][0], d[0][1]);
    a[1] = Packed::pack(d[0][2], d[0][3]);
    a[2] = Packed::pack(d[1][0], d[1][1]);
    a[3] = Packed::pack(d[1][2], d[1][3]);
  }
};

template <>
struct Fragments<bfloat16> : HalfFragments<Fragments<bfloat16>> {
  static __device__ std::uint32_t pack(float low, float high) { return pack_bf16(low, high); }
  static __device__ void multiply(float (&d)[4], const std::uint32_t (&a)[4], std::uint32_t b0,
                                  std::uint32_t b1) {
    mma_m16n8k16_bf16(d, a, b0, b1);
  }
};

template <>
struct Fragments<float16> : HalfFragments<Fragments<float16>> {
  static __device__ std::uint32_t pack(float low, float high) { return pack_f16(low, high); }
  static __device__ void multiply(float (&d)[4], const std::uint32_t (&a)[4], std::uint32_t b0,
                                  std::uint32_t b1) {
    mma_m16n8k16_f16(d, a, b0, b1);
  }
};

/// float32 by way of TF32.
template <>
struct Fragments<float> {
  static constexpr int kDepth = 8;

  static __device__ void load_a(std::uint32_t (&a)[4], const char* tile, int row_bytes, int row,
                                int chunk) {
    ldmatrix_x4(a, rows_first(tile, row_bytes, row, chunk));
    round(a);
  }
  static __device__ void load_b(std::uint32_t (&b)[4], const char* tile, int row_bytes, int row,
                                int chunk) {
    ldmatrix_x4(b, chunks_first(tile, row_bytes, row, chunk));
    round(b);
  }
  /// as_a() leaves columns 2t and 2t + 1 of the depth in places t and t + 4: so do the rows here.
  static __device__ void load_b_down(std::uint32_t (&b)[4], const char* tile, int row_bytes,
                                     int row, int column) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    const char* at = tile + (row + lane % 4 * 2) * row_bytes +
                     (column + lane / 4) * static_cast<int>(sizeof(float));
    for (int i = 0; i < 4; ++i) {
      const char* element = at + i % 2 * row_bytes + i / 2 * 8 * static_cast<int>(sizeof(float));
      b[i] = to_tf32(*reinterpret_cast<const float*>(element));
    }
  }
  static __device__ void as_a(std::uint32_t (&a)[4], const float (*d)[4]) {
    a[0] = to_tf32(d[0][0]);
    a[1] = to_tf32(d[0][2]);
    a[2] = to_tf32(d[0][1]);
    a[3] = to_tf32(d[0][3]);
  }
  static __device__ void multiply(float (&d)[4], const std::uint32_t (&a)[4], std::uint32_t b0,
                                  std::uint32_t b1) {
    mma_m16n8k8_tf32(d, a, b0, b1);
  }

 private:
  static __device__ void round(std::uint32_t (&x)[4]) {
    for (std::uint32_t& bits : x) {
      float value;
      static_assert(sizeof(value) == sizeof(bits));
      __builtin_memcpy(&value, &bits, sizeof(value));
      bits = to_tf32(value);
    }
  }
};

/// A warp's 16 rows of each of a group of tiles, times other rows or other columns. `active` has a
/// bit for each tile of the group that takes part.
template <class S, int kHeadSize, int kGroup>
struct WarpProducts {
  using F = Fragments<S>;
  static constexpr int kStride = kRowBytes<S, kHeadSize>;
  static constexpr int kTileBytes = kMaxTile * kStride;
  static constexpr int kChunks = kHeadSize / kChunk<S>;

  /// d = own · otherᵀ for kColumns rows of the other tile. The tiles of the group lie one behind
  /// the other; `first_row` is the warp's in each.
  template <int kColumns>
  static __device__ void rows_by_rows(float (&d)[kGroup][kColumns / 8][4], const char* own,
                                      int first_row, const char* other, unsigned active) {
#pragma unroll
    for (int g = 0; g < kGroup; ++g) {
#pragma unroll
      for (int n = 0; n < kColumns / 8; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) d[g][n][i] = 0.0f;
      }
    }
#pragma unroll
    for (int chunk = 0; chunk < kChunks; chunk += 2) {
      std::uint32_t a[kGroup][4];
#pragma unroll
      for (int g = 0; g < kGroup; ++g)
        F::load_a(a[g], own + g * kTileBytes, kStride, first_row, chunk);
#pragma unroll
      for (int n = 0; n < kColumns / 8; n += 2) {
        std::uint32_t b[4];
        F::load_b(b, other, kStride, 8 * n, chunk);
#pragma unroll
        for (int g = 0; g < kGroup; ++g) {
          if (!(active >> g & 1)) continue;
          F::multiply(d[g][n], a[g], b[0], b[1]);
          F::multiply(d[g][n + 1], a[g], b[2], b[3]);
        }
      }
    }
  }

  /// sum += p · other, where p has a column for each of the kColumns rows of the other tile.
  template <int kColumns>
  static __device__ void add_by_columns(float (&sum)[kGroup][kHeadSize / 8][4],
                                        const float (&p)[kGroup][kColumns / 8][4],
                                        const char* other, unsigned active) {
#pragma unroll
    for (int row = 0; row < kColumns; row += F::kDepth) {
      std::uint32_t a[kGroup][4];
#pragma unroll
      for (int g = 0; g < kGroup; ++g) F::as_a(a[g], &p[g][row / 8]);
#pragma unroll
      for (int n = 0; n < kHeadSize / 8; n += 2) {
        std::uint32_t b[4];
        F::load_b_down(b, other, kStride, row, 8 * n);
#pragma unroll
        for (int g = 0; g < kGroup; ++g) {
          if (!(active >> g & 1)) continue;
          F::multiply(sum[g][n], a[g], b[0], b[1]);
          F::multiply(sum[g][n + 1], a[g], b[2], b[3]);
        }
      }
    }
  }
};

}  // namespace sparse_attn::cuda
