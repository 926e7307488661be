// The barriers 1 to 15 of a block, each for as many threads as come to it.
#pragma once

#include <string>
#include <vector>

#include "host/executor.h"

namespace sparse_attn::cuda::emulator {

class NamedBarriers {
 public:
  NamedBarriers() {
    for (int i = 1; i < kBarriers; ++i) barriers_[i].name = "sync_some(" + std::to_string(i) + ")";
  }

  void sync(int number, int threads) {
    if (number < 1 || number >= kBarriers)
      fail("sync_some of barrier " + std::to_string(number) + ": there are 1 to 15");
    Barrier& barrier = barriers_[number];
    if (threads < kWarp || threads % kWarp != 0 || threads > block->threads)
      fail(barrier.name + " for " + std::to_string(threads) + " threads");
    Executor::Lock lock;
    if (barrier.arrived.empty()) barrier.threads = threads;
    if (barrier.threads != threads) {
      fail(barrier.name + " for " + std::to_string(threads) + " threads here, for " +
           std::to_string(barrier.threads) + " by others");
    }
    const unsigned round = barrier.round;
    void* order = &barrier.orders[round % 2];
    executor.release(order);
    barrier.arrived.push_back(static_cast<int>(threadIdx.x) / kWarp);
    if (static_cast<int>(barrier.arrived.size()) == threads) open(barrier);
    executor.wait(lock, barrier.waiters, barrier.name.c_str(),
                  [&] { return barrier.round != round; });
    executor.acquire(order);
  }

 private:
  static constexpr int kBarriers = 16;

  struct Barrier {
    std::string name;
    int threads = 0;           // that the first has asked for
    std::vector<int> arrived;  // of each, its warp
    unsigned round = 0;
    char orders[2] = {};  // what even and odd rounds come after
    Waiters waiters;
  };

  static void open(Barrier& barrier) {
    std::vector<int> of_warp(static_cast<std::size_t>(block->threads / kWarp));
    for (const int warp : barrier.arrived) ++of_warp[static_cast<std::size_t>(warp)];
    for (const int threads : of_warp) {
      if (threads != 0 && threads != kWarp)
        fail(barrier.name + " by " + std::to_string(threads) + " threads of a warp");
    }
    barrier.arrived.clear();
    ++barrier.round;
    executor.wake_all(barrier.waiters);
  }

  Barrier barriers_[kBarriers];
};

}  // namespace sparse_attn::cuda::emulator
