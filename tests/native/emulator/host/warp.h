// What the collective instructions compute, for a whole warp at once. PTX ISA, "Matrix fragments
// for mma.m16n8k16 / mma.m16n8k8" and "ldmatrix"; with g = lane / 4 and t = lane % 4 throughout.
#pragma once

#include <cstdint>
#include <cstring>

#include "host/executor.h"
#include "host/numbers.h"

namespace sparse_attn::cuda::emulator {

/// Every lane calls this with its own operands of the same instruction.
template <class Operands>
void execute(const Collective& which, int argument, Operands& operands) {
  executor.collective(which, argument, &operands);
}

template <class T>
struct ShuffleXor {
  T value, result;

  static void compute(void* const (&operands)[kWarp], int mask) {
    for (int lane = 0; lane < kWarp; ++lane)
      at(operands, lane).result = at(operands, lane ^ mask).value;
  }
  static ShuffleXor& at(void* const (&operands)[kWarp], int lane) {
    return *static_cast<ShuffleXor*>(operands[lane]);
  }
};

template <class T>
inline constexpr Collective kShuffleXor = {"shuffle_xor", ShuffleXor<T>::compute};

struct Ballot {
  bool predicate;
  std::uint32_t lanes = 0;

  static void compute(void* const (&operands)[kWarp], int) {
    std::uint32_t lanes = 0;
    for (int lane = 0; lane < kWarp; ++lane)
      lanes |= static_cast<std::uint32_t>(static_cast<Ballot*>(operands[lane])->predicate) << lane;
    for (void* lane : operands) static_cast<Ballot*>(lane)->lanes = lanes;
  }
};

inline constexpr Collective kBallot = {"ballot", Ballot::compute};

struct FirstLane {
  int value;

  static void compute(void* const (&operands)[kWarp], int) {
    for (void* lane : operands)
      static_cast<FirstLane*>(lane)->value = static_cast<FirstLane*>(operands[0])->value;
  }
};

inline constexpr Collective kFirstLane = {"first_lane", FirstLane::compute};

struct Ldmatrix {
  std::uint32_t (&d)[4];
  const char* row;

  template <bool kTransposed>
  static void compute(void* const (&operands)[kWarp], int) {
    for (int matrix = 0; matrix < 4; ++matrix) {
      std::uint16_t elements[8][8];
      for (int row = 0; row < 8; ++row)
        std::memcpy(elements[row], at(operands, 8 * matrix + row).row, sizeof(elements[row]));
      for (int lane = 0; lane < kWarp; ++lane) {
        const int g = lane / 4, t = lane % 4;
        const std::uint32_t low = kTransposed ? elements[2 * t][g] : elements[g][2 * t];
        const std::uint32_t high = kTransposed ? elements[2 * t + 1][g] : elements[g][2 * t + 1];
        at(operands, lane).d[matrix] = low | high << 16;
      }
    }
  }
  static Ldmatrix& at(void* const (&operands)[kWarp], int lane) {
    return *static_cast<Ldmatrix*>(operands[lane]);
  }
};

inline constexpr Collective kLdmatrix = {"ldmatrix_x4", Ldmatrix::compute<false>};
inline constexpr Collective kLdmatrixTrans = {"ldmatrix_x4_trans", Ldmatrix::compute<true>};

/// Operands in 32-bit registers: kElements each, which `element(register, i)` unpacks.
struct BFloat16Elements {
  static constexpr int kElements = 2;
  static float element(std::uint32_t bits, int i) { return from_bf16(bits >> 16 * i & 0xffff); }
};
struct Float16Elements {
  static constexpr int kElements = 2;
  static float element(std::uint32_t bits, int i) { return from_f16(bits >> 16 * i & 0xffff); }
};
struct TF32Elements {
  static constexpr int kElements = 1;
  static float element(std::uint32_t bits, int) { return float_of(bits & ~0x1fffu); }
};

template <class Elements>
struct Mma {
  float (&d)[4];
  const std::uint32_t (&a)[4];
  const std::uint32_t b[2];

  /// Products are exact in float; sums are rounded to it.
  static void compute(void* const (&operands)[kWarp], int) {
    float a[16][kDepth];
    Row b[kDepth], d[16];
    for (int lane = 0; lane < kWarp; ++lane) at(operands, lane).unpack(lane / 4, lane % 4, a, b, d);
    for (int k = 0; k < kDepth; ++k) {
      for (int m = 0; m < 16; ++m) d[m] += a[m][k] * b[k];
    }
    for (int lane = 0; lane < kWarp; ++lane) {
      for (int i = 0; i < 4; ++i)
        at(operands, lane).d[i] = d[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2];
    }
  }

 private:
  static constexpr int kDepth = 8 * Elements::kElements;
  using Row __attribute__((vector_size(8 * sizeof(float)))) = float;

  static Mma& at(void* const (&operands)[kWarp], int lane) {
    return *static_cast<Mma*>(operands[lane]);
  }

  void unpack(int g, int t, float (&all_a)[16][kDepth], Row (&all_b)[kDepth],
              Row (&all_d)[16]) const {
    for (int i = 0; i < 4; ++i) all_d[g + i / 2 * 8][2 * t + i % 2] = d[i];
    for (int e = 0; e < Elements::kElements; ++e) {
      const int first = Elements::kElements * t + e;
      for (int i = 0; i < 4; ++i)
        all_a[g + i % 2 * 8][first + i / 2 * kDepth / 2] = Elements::element(a[i], e);
      for (int i = 0; i < 2; ++i) all_b[first + i * kDepth / 2][g] = Elements::element(b[i], e);
    }
  }
};

inline constexpr Collective kMmaBFloat16 = {"mma_m16n8k16_bf16", Mma<BFloat16Elements>::compute};
inline constexpr Collective kMmaFloat16 = {"mma_m16n8k16_f16", Mma<Float16Elements>::compute};
inline constexpr Collective kMmaTF32 = {"mma_m16n8k8_tf32", Mma<TF32Elements>::compute};

}  // namespace sparse_attn::cuda::emulator
