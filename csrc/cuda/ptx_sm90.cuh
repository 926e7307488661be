// The instructions of sm_90a: barriers in shared memory, copies of whole tiles (TMA) and products
// of a warpgroup (wgmma). As in ptx.cuh kernels are written on these names only, and
// tests/native/emulator has another cuda/ptx_sm90.cuh in this one's place.
//
// TMA and wgmma reach shared memory by a way of their own, the async proxy. What threads store
// there has to be fenced (fence_async) before it is used by them.
#pragma once

#include <cstdint>

#include "cuda/ptx.cuh"
#include "cuda/tensor_map.h"

namespace sparse_attn::cuda {

constexpr int kWarpgroup = 128;

// ---- threads ------------------------------------------------------------------------------------

/// Registers that each thread of the warpgroup gives back, or takes: all of them call it.
template <int kRegisters>
__device__ inline void lower_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ inline void raise_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

/// A barrier of `threads` threads, whole warps; `barrier` is one of 1 to 15 (sync_threads has 0).
__device__ inline void sync_some(int barrier, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

/// A bit for each lane of the warp whose predicate holds; all 32 take part.
__device__ inline std::uint32_t ballot(bool predicate) {
  return __ballot_sync(0xffffffffu, predicate);
}
/// Whether the predicate of any lane of the warp holds; all 32 take part.
__device__ inline bool any_lane(bool predicate) { return __any_sync(0xffffffffu, predicate) != 0; }

/// The value that the first lane of the warp has.
__device__ inline int first_lane(int value) { return __shfl_sync(0xffffffffu, value, 0); }

/// The same number, though the compiler does not know it: what is made of it is made anew, not kept
/// in registers from before.
template <class Number>
__device__ inline Number anew(Number number) {
  asm volatile("" : "+l"(number));
  return number;
}

// ---- barriers in shared memory ------------------------------------------------------------------

/// Counts arrivals and bytes. Its phases are numbered from 0; one is over when all have arrived and
/// all bytes have come.
struct alignas(8) MBarrier {
  std::uint64_t bits;
};

/// By one thread, before a fence_barriers and a barrier of all.
__device__ inline void init(MBarrier* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)),
               "r"(arrivals)
               : "memory");
}
__device__ inline void fence_barriers() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
__device__ inline void arrive(MBarrier* barrier) {
  asm volatile("mbarrier.arrive.release.cta.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier))
               : "memory");
}
/// Arrives, and lets the phase wait for so many more bytes.
__device__ inline void arrive_expecting(MBarrier* barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.release.cta.shared::cta.b64 _, [%0], %1;" ::"r"(
                   shared_address(barrier)),
               "r"(bytes)
               : "memory");
}
/// Until the last phase whose number has this parity is over; at once for parity 1 at the start.
__device__ inline void wait(MBarrier* barrier, unsigned parity) {
  asm volatile(
      "{\n"
      ".reg .pred over;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 over, [%0], %1;\n"
      "@over bra done;\n"
      "bra again;\n"
      "done:\n"
      "}" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
}

/// What this thread has stored to shared memory, TMA and wgmma see after it.
__device__ inline void fence_async() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// ---- copies of tiles ----------------------------------------------------------------------------

__device__ inline void prefetch(const TensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

/// One thread has the box of a map copied that begins at these coordinates, in elements, the inner
/// first; what lies outside of the tensor becomes zeros. Its bytes count towards the barrier.
__device__ inline void tma_load(void* shared, const TensorMap* map, MBarrier* barrier,
                                const int (&at)[5]) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3, %4, %5, %6, %7}], [%2];" ::"r"(shared_address(shared)),
      "l"(map), "r"(shared_address(barrier)), "r"(at[0]), "r"(at[1]), "r"(at[2]), "r"(at[3]),
      "r"(at[4])
      : "memory");
}

// ---- products of a warpgroup: d = a b, or d += a b ----------------------------------------------
//
// Operands in shared memory are rows of 128 bytes, 64 elements, whose 16-byte chunk c lies in row r
// at place c ^ r % 8; eight rows make an atom of 1024 bytes, aligned to as many, and atoms follow
// each other. A matrix of more than 64 columns has the next 64 in another such piece.

enum class Major { kDepth, kOther };  // along which the elements of a row run

/// Where a matrix begins, and how far it is to its next piece (for Major::kOther, if it has one).
/// PTX ISA, "Matrix descriptor format"; CUTLASS's mma_sm90_desc.hpp draws the layouts.
__device__ inline std::uint64_t matrix_descriptor(const void* shared, int piece_bytes) {
  constexpr std::uint64_t kSwizzle128 = std::uint64_t{1} << 62;
  constexpr std::uint64_t kAtomBytes = 1024;
  const auto field = [](std::uint64_t bytes) { return (bytes & 0x3ffff) >> 4; };
  return field(shared_address(shared)) | field(static_cast<std::uint64_t>(piece_bytes)) << 16 |
         field(kAtomBytes) << 32 | kSwizzle128;
}
/// The same for a matrix that begins some bytes further on.
__device__ inline std::uint64_t advance(std::uint64_t descriptor, int bytes) {
  return descriptor + static_cast<std::uint64_t>(bytes >> 4);
}

/// Orders what threads did to registers and shared memory before the products that follow.
__device__ inline void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
/// Closes the group of the products since the last commit.
__device__ inline void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
/// Waits until at most `kPending` groups are under way. Until then sums and operands in registers
/// must not be touched.
template <int kPending>
__device__ inline void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}
/// Keeps the compiler from moving what it does with sums, or with an operand, across this place.
template <int kTiles>
__device__ inline void pin(float (&d)[kTiles][4]) {
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) asm volatile("" : "+f"(d[n][i])::"memory");
  }
}

template <int kSteps>
__device__ inline void pin(std::uint32_t (&a)[kSteps][4]) {
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
#pragma unroll
    for (int i = 0; i < 4; ++i) asm volatile("" : "+r"(a[step][i])::"memory");
  }
}

// Sums d of 64 rows: the 16 of each warp, in eight columns d[n], as those of mma_m16n8k16; a in
// registers is as its a, too. `add` is false for d = a b.

#define SPARSE_ATTN_SUMS(n) "+f"(d[n][0]), "+f"(d[n][1]), "+f"(d[n][2]), "+f"(d[n][3])
#define SPARSE_ATTN_SUMS_64                                                           \
  SPARSE_ATTN_SUMS(0), SPARSE_ATTN_SUMS(1), SPARSE_ATTN_SUMS(2), SPARSE_ATTN_SUMS(3), \
      SPARSE_ATTN_SUMS(4), SPARSE_ATTN_SUMS(5), SPARSE_ATTN_SUMS(6), SPARSE_ATTN_SUMS(7)
#define SPARSE_ATTN_SUMS_128                                                                  \
  SPARSE_ATTN_SUMS_64, SPARSE_ATTN_SUMS(8), SPARSE_ATTN_SUMS(9), SPARSE_ATTN_SUMS(10),        \
      SPARSE_ATTN_SUMS(11), SPARSE_ATTN_SUMS(12), SPARSE_ATTN_SUMS(13), SPARSE_ATTN_SUMS(14), \
      SPARSE_ATTN_SUMS(15)

#define SPARSE_ATTN_PLACES_32                                              \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define SPARSE_ATTN_PLACES_64                                                          \
  SPARSE_ATTN_PLACES_32                                                                \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"

#define SPARSE_ATTN_WGMMA(TYPE, COLUMNS, PLACES, AFTER1, AFTER2, AFTER3, AFTER4, AFTER5, AFTER6,   \
                          AFTER7)                                                                  \
  template <Major kMajor>                                                                          \
  __device__ inline void wgmma_m64n##COLUMNS##k16_##TYPE(                                          \
      float(&d)[COLUMNS / 8][4], const std::uint32_t(&a)[4], std::uint64_t b, bool add) {          \
    asm volatile("{\n.reg .pred adds;\nsetp.ne.b32 adds, %" AFTER6                                 \
                 ", 0;\n"                                                                          \
                 "wgmma.mma_async.sync.aligned.m64n" #COLUMNS "k16.f32." #TYPE "." #TYPE           \
                 " {" PLACES "}, {%" AFTER1 ", %" AFTER2 ", %" AFTER3 ", %" AFTER4 "}, %" AFTER5   \
                 ", adds, 1, 1, %" AFTER7 ";\n}"                                                   \
                 : SPARSE_ATTN_SUMS_##COLUMNS                                                      \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(add)), \
                   "n"(kMajor == Major::kOther ? 1 : 0));                                          \
  }                                                                                                \
  template <Major kMajor>                                                                          \
  __device__ inline void wgmma_m64n##COLUMNS##k16_##TYPE(                                          \
      float(&d)[COLUMNS / 8][4], std::uint64_t a, std::uint64_t b, bool add) {                     \
    asm volatile("{\n.reg .pred adds;\nsetp.ne.b32 adds, %" AFTER3                                 \
                 ", 0;\n"                                                                          \
                 "wgmma.mma_async.sync.aligned.m64n" #COLUMNS "k16.f32." #TYPE "." #TYPE           \
                 " {" PLACES "}, %" AFTER1 ", %" AFTER2 ", adds, 1, 1, 0, %" AFTER4 ";\n}"         \
                 : SPARSE_ATTN_SUMS_##COLUMNS                                                      \
                 : "l"(a), "l"(b), "r"(static_cast<int>(add)),                                     \
                   "n"(kMajor == Major::kOther ? 1 : 0));                                          \
  }

SPARSE_ATTN_WGMMA(bf16, 64, SPARSE_ATTN_PLACES_32, "32", "33", "34", "35", "36", "37", "38")
SPARSE_ATTN_WGMMA(f16, 64, SPARSE_ATTN_PLACES_32, "32", "33", "34", "35", "36", "37", "38")
SPARSE_ATTN_WGMMA(bf16, 128, SPARSE_ATTN_PLACES_64, "64", "65", "66", "67", "68", "69", "70")
SPARSE_ATTN_WGMMA(f16, 128, SPARSE_ATTN_PLACES_64, "64", "65", "66", "67", "68", "69", "70")

#undef SPARSE_ATTN_WGMMA
#undef SPARSE_ATTN_PLACES_64
#undef SPARSE_ATTN_PLACES_32
#undef SPARSE_ATTN_SUMS_128
#undef SPARSE_ATTN_SUMS_64
#undef SPARSE_ATTN_SUMS

}  // namespace sparse_attn::cuda
