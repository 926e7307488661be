// The names of csrc/cuda/ptx_sm90.cuh with a meaning on the host.
#pragma once

#include <cstdint>

#include "cuda/ptx.cuh"
#include "cuda/tensor_map.h"
#include "host/descriptors.h"
#include "host/tensor_copies.h"
#include "host/warpgroup_steps.h"

namespace sparse_attn::cuda {

constexpr int kWarpgroup = 128;

// ---- threads ------------------------------------------------------------------------------------

template <int kRegisters>
inline void lower_registers() {
  static_assert(emulator::kCanHaveRegisters<kRegisters>);
  sync_warp();
}
template <int kRegisters>
inline void raise_registers() {
  static_assert(emulator::kCanHaveRegisters<kRegisters>);
  sync_warp();
}

inline void sync_some(int barrier, int threads) {
  emulator::units->named_barriers.sync(barrier, threads);
}

inline std::uint32_t ballot(bool predicate) {
  emulator::Ballot operands{predicate};
  emulator::execute(emulator::kBallot, 0, operands);
  return operands.lanes;
}
inline bool any_lane(bool predicate) { return ballot(predicate) != 0; }

inline int first_lane(int value) {
  emulator::FirstLane operands{value};
  emulator::execute(emulator::kFirstLane, 0, operands);
  return operands.value;
}

template <class Number>
inline Number anew(Number number) {
  return number;
}

// ---- barriers in shared memory ------------------------------------------------------------------

struct alignas(8) MBarrier {
  std::uint64_t bits;
};

inline void init(MBarrier* barrier, int arrivals) {
  emulator::units->barriers.init(barrier, arrivals);
}
inline void fence_barriers() {}
inline void arrive(MBarrier* barrier) {
  emulator::units->barriers.arrive(barrier, 0);
  emulator::executor.pause();
}
inline void arrive_expecting(MBarrier* barrier, int bytes) {
  emulator::units->barriers.arrive(barrier, bytes);
  emulator::executor.pause();
}
inline void wait(MBarrier* barrier, unsigned parity) {
  emulator::units->barriers.wait(barrier, parity);
}

inline void fence_async() { emulator::block->unfenced.fence(threadIdx.x); }

// ---- copies of tiles ----------------------------------------------------------------------------

inline void prefetch(const TensorMap*) {}

inline void tma_load(void* shared, const TensorMap* map, MBarrier* barrier, const int (&at)[5]) {
  emulator::tma_load(shared, map, barrier, at);
}

// ---- products of a warpgroup --------------------------------------------------------------------

inline std::uint64_t matrix_descriptor(const void* shared, int piece_bytes) {
  return emulator::matrix_descriptor(shared, piece_bytes);
}
inline std::uint64_t advance(std::uint64_t descriptor, int bytes) {
  return emulator::advance(descriptor, bytes);
}

inline void wgmma_fence() {
  int none = 0;
  emulator::execute(emulator::kWgmmaFence, 0, none);
}
inline void wgmma_commit() {
  int none = 0;
  emulator::execute(emulator::kWgmmaCommit, 0, none);
}
template <int kPending>
inline void wgmma_wait() {
  int none = 0;
  emulator::execute(emulator::kWgmmaWait, kPending, none);
}
template <class Element, int kCount>
inline void pin(Element (&)[kCount][4]) {}

#define SPARSE_ATTN_WGMMA(TYPE, COLUMNS)                                                    \
  template <Major kMajor>                                                                   \
  inline void wgmma_m64n##COLUMNS##k16_##TYPE(                                              \
      float(&d)[COLUMNS / 8][4], const std::uint32_t(&a)[4], std::uint64_t b, bool add) {   \
    emulator::multiply({"wgmma_m64n" #COLUMNS "k16_" #TYPE, emulator::from_##TYPE, COLUMNS, \
                        kMajor, add, d[0], a, 0, b});                                       \
  }                                                                                         \
  template <Major kMajor>                                                                   \
  inline void wgmma_m64n##COLUMNS##k16_##TYPE(float(&d)[COLUMNS / 8][4], std::uint64_t a,   \
                                              std::uint64_t b, bool add) {                  \
    emulator::multiply({"wgmma_m64n" #COLUMNS "k16_" #TYPE, emulator::from_##TYPE, COLUMNS, \
                        kMajor, add, d[0], nullptr, a, b});                                 \
  }

SPARSE_ATTN_WGMMA(bf16, 64)
SPARSE_ATTN_WGMMA(f16, 64)
SPARSE_ATTN_WGMMA(bf16, 128)
SPARSE_ATTN_WGMMA(f16, 128)

#undef SPARSE_ATTN_WGMMA

}  // namespace sparse_attn::cuda
