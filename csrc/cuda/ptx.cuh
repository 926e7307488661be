// Every instruction that C++ has no name for. Kernels are written on these names only, so that
// tests/native/emulator can give them a meaning on the host (its cuda/ptx.cuh takes this one's
// place).
#pragma once

#include <cstdint>

namespace sparse_attn::cuda {

// ---- the thread block ---------------------------------------------------------------------------

/// The block's dynamic shared memory; there is no other. Tiles that TMA swizzles want 1024 bytes.
__device__ inline char* shared_memory() {
  extern __shared__ __align__(1024) char memory[];
  return memory;
}

__device__ inline void sync_threads() { __syncthreads(); }
/// The same, and tells whether any thread's predicate holds.
__device__ inline bool sync_threads_or(bool predicate) { return __syncthreads_or(predicate) != 0; }

/// What lanes of the warp did to memory before, all of them see afterwards.
__device__ inline void sync_warp() { __syncwarp(); }

/// The value of the lane whose number differs in the bits of `mask`; all 32 lanes take part.
template <class T>
__device__ inline T shuffle_xor(T value, int mask) {
  return __shfl_xor_sync(0xffffffffu, value, mask);
}

// ---- memory -------------------------------------------------------------------------------------

struct alignas(16) Bytes16 {
  std::uint32_t words[4];
};

__device__ inline std::uint32_t shared_address(const void* shared) {
  return static_cast<std::uint32_t>(__cvta_generic_to_shared(shared));
}

/// Copies 16 bytes from global to shared memory, or zeros if not `valid` (global is then not read).
/// The data is there after cp_async_wait and a barrier. From sm_80 on.
__device__ inline void cp_async_16(void* shared, const void* global, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)),
               "l"(global), "r"(valid ? 16 : 0)
               : "memory");
}
/// Closes the group of this thread's copies since the last commit.
__device__ inline void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
/// Waits until at most `kPending` of this thread's groups are under way.
template <int kPending>
__device__ inline void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

/// Four 8 x 8 matrices of 16-bit elements. Lane l gives the address of row l % 8 of matrix l / 8
/// (16 bytes, aligned) and gets elements 2 (l % 4) and 2 (l % 4) + 1 of row l / 4 of each.
__device__ inline void ldmatrix_x4(std::uint32_t (&d)[4], const void* shared_row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
               : "r"(shared_address(shared_row))
               : "memory");
}
/// The same with each matrix transposed: column l / 4, rows 2 (l % 4) and 2 (l % 4) + 1.
__device__ inline void ldmatrix_x4_trans(std::uint32_t (&d)[4], const void* shared_row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
               : "r"(shared_address(shared_row))
               : "memory");
}

// ---- tensor cores: d += a b, from sm_80 on ------------------------------------------------------
//
// Lane l has, with g = l / 4 and t = l % 4: of d, (g, 2t), (g, 2t + 1), (g + 8, 2t), (g + 8, 2t +
// 1); of a 16-bit a, pairs of columns (g, 2t), (g + 8, 2t), (g, 2t + 8), (g + 8, 2t + 8); of b,
// pairs of rows (2t, g), (2t + 8, g). Of a 32-bit a: (g, t), (g + 8, t), (g, t + 4), (g + 8, t +
// 4); of b: (t, g), (t + 4, g).

__device__ inline void mma_m16n8k16_bf16(float (&d)[4], const std::uint32_t (&a)[4],
                                         std::uint32_t b0, std::uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ inline void mma_m16n8k16_f16(float (&d)[4], const std::uint32_t (&a)[4],
                                        std::uint32_t b0, std::uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ inline void mma_m16n8k8_tf32(float (&d)[4], const std::uint32_t (&a)[4],
                                        std::uint32_t b0, std::uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// ---- numbers ------------------------------------------------------------------------------------

/// 2^x within 2 units in the last place; 0 for -inf.
__device__ inline float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

/// Two numbers rounded to 16 bits, the first in the low half. From sm_80 on.
__device__ inline std::uint32_t pack_bf16(float low, float high) {
  std::uint32_t packed;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}
__device__ inline std::uint32_t pack_f16(float low, float high) {
  std::uint32_t packed;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}
/// Rounded to TF32's 10 bits of mantissa. From sm_80 on.
__device__ inline std::uint32_t to_tf32(float x) {
  std::uint32_t rounded;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(rounded) : "f"(x));
  return rounded;
}

__device__ inline float f16_to_float(std::uint16_t bits) {
  float x;
  asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(bits));
  return x;
}
__device__ inline std::uint16_t float_to_f16(float x) {
  std::uint16_t bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(x));
  return bits;
}

}  // namespace sparse_attn::cuda
