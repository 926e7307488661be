// The names of csrc/cuda/ptx.cuh with a meaning on the host.
#pragma once

#include <cmath>
#include <cstdint>

#include "host/warp.h"

#define __device__
#define __host__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__

namespace sparse_attn::cuda {

// ---- the thread block ---------------------------------------------------------------------------

inline char* shared_memory() { return emulator::block->shared.data(); }

inline void sync_threads() { emulator::executor.barrier("sync_threads", false); }
inline bool sync_threads_or(bool predicate) {
  return emulator::executor.barrier("sync_threads_or", predicate);
}

template <class T>
inline T shuffle_xor(T value, int mask) {
  if (mask < 0 || mask >= emulator::kWarp)
    emulator::fail("shuffle_xor with mask " + std::to_string(mask));
  emulator::ShuffleXor<T> operands{value, value};
  emulator::execute(emulator::kShuffleXor<T>, mask, operands);
  return operands.result;
}

/// A collective is a barrier of the warp here.
inline void sync_warp() { shuffle_xor(0, 1); }

// ---- memory -------------------------------------------------------------------------------------

struct alignas(16) Bytes16 {
  std::uint32_t words[4];
};

inline void cp_async_16(void* shared, const void* global, bool valid) {
  emulator::executor.copies().issue(shared, global, valid);
}
inline void cp_async_commit() { emulator::executor.copies().commit(); }
template <int kPending>
inline void cp_async_wait() {
  emulator::executor.copies().wait(kPending);
}

inline void ldmatrix_x4(std::uint32_t (&d)[4], const void* shared_row) {
  emulator::block->shared.check(shared_row, "ldmatrix_x4");
  emulator::Ldmatrix operands{d, static_cast<const char*>(shared_row)};
  emulator::execute(emulator::kLdmatrix, 0, operands);
}
inline void ldmatrix_x4_trans(std::uint32_t (&d)[4], const void* shared_row) {
  emulator::block->shared.check(shared_row, "ldmatrix_x4_trans");
  emulator::Ldmatrix operands{d, static_cast<const char*>(shared_row)};
  emulator::execute(emulator::kLdmatrixTrans, 0, operands);
}

// ---- tensor cores -------------------------------------------------------------------------------

inline void mma_m16n8k16_bf16(float (&d)[4], const std::uint32_t (&a)[4], std::uint32_t b0,
                              std::uint32_t b1) {
  emulator::Mma<emulator::BFloat16Elements> operands{d, a, {b0, b1}};
  emulator::execute(emulator::kMmaBFloat16, 0, operands);
}
inline void mma_m16n8k16_f16(float (&d)[4], const std::uint32_t (&a)[4], std::uint32_t b0,
                             std::uint32_t b1) {
  emulator::Mma<emulator::Float16Elements> operands{d, a, {b0, b1}};
  emulator::execute(emulator::kMmaFloat16, 0, operands);
}
inline void mma_m16n8k8_tf32(float (&d)[4], const std::uint32_t (&a)[4], std::uint32_t b0,
                             std::uint32_t b1) {
  emulator::Mma<emulator::TF32Elements> operands{d, a, {b0, b1}};
  emulator::execute(emulator::kMmaTF32, 0, operands);
}

// ---- numbers ------------------------------------------------------------------------------------

inline float exp2_approx(float x) { return emulator::exp2_flushed(x); }

inline std::uint32_t pack_bf16(float low, float high) {
  return emulator::to_bf16(low) | emulator::to_bf16(high) << 16;
}
inline std::uint32_t pack_f16(float low, float high) {
  return emulator::to_f16(low) | emulator::to_f16(high) << 16;
}
inline std::uint32_t to_tf32(float x) { return emulator::round_to_tf32(x); }

inline float f16_to_float(std::uint16_t bits) { return emulator::from_f16(bits); }
inline std::uint16_t float_to_f16(float x) {
  return static_cast<std::uint16_t>(emulator::to_f16(x));
}

}  // namespace sparse_attn::cuda
