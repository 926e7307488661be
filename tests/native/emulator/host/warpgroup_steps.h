// The collectives that products of a warpgroup are made of.
#pragma once

#include "host/units.h"
#include "host/warp.h"

namespace sparse_attn::cuda::emulator {

template <int kRegisters>
inline constexpr bool kCanHaveRegisters =
    kRegisters >= 24 && kRegisters <= 256 && kRegisters % 8 == 0;

inline Wgmma named(const char* name) {
  Wgmma which{};
  which.name = name;
  return which;
}

struct WgmmaSteps {
  static void fence(void* const (&)[kWarp], int) { pass("wgmma_fence", 0).fence(); }
  static void commit(void* const (&)[kWarp], int) { pass("wgmma_commit", 0).commit(); }
  static void wait(void* const (&)[kWarp], int pending) {
    pass("wgmma_wait", pending).wait(pending);
  }
  static void issue(void* const (&lanes)[kWarp], int) {
    units->warpgroups.pass({*static_cast<Wgmma*>(lanes[0]), 0}).issue(lanes);
  }

 private:
  static WarpProducts& pass(const char* name, int argument) {
    return units->warpgroups.pass({named(name), argument});
  }
};

inline constexpr Collective kWgmmaFence = {"wgmma_fence", WgmmaSteps::fence};
inline constexpr Collective kWgmmaCommit = {"wgmma_commit", WgmmaSteps::commit};
inline constexpr Collective kWgmmaWait = {"wgmma_wait", WgmmaSteps::wait};
inline constexpr Collective kWgmma = {"wgmma", WgmmaSteps::issue};

inline void multiply(Wgmma operands) { execute(kWgmma, 0, operands); }

}  // namespace sparse_attn::cuda::emulator
