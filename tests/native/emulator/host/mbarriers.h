// mbarriers: what arrives at them, and who waits for their phases.
#pragma once

#include <cstdint>
#include <cstring>
#include <map>
#include <string>

#include "host/executor.h"

namespace sparse_attn::cuda::emulator {

class MBarriers {
 public:
  static constexpr int kMostArrivals = (1 << 20) - 1, kMostBytes = (1 << 20) - 1;

  void init(void* barrier, int arrivals) {
    const int byte = offset(barrier, "init");
    if (arrivals < 1 || arrivals > kMostArrivals)
      fail("init of an mbarrier for " + std::to_string(arrivals) + " arrivals");
    std::memcpy(barrier, &kMark, sizeof(kMark));
    const Executor::Lock lock;
    const auto [place, is_new] = states_.try_emplace(byte);
    State& state = place->second;
    if (!is_new) fail("init of the mbarrier at byte " + std::to_string(byte) + " a second time");
    state.name = "the mbarrier at byte " + std::to_string(byte);
    for (int parity = 0; parity < 2; ++parity)
      state.places[parity] = "wait(" + state.name + ", " + std::to_string(parity) + ")";
    state.expected = state.arrivals = arrivals;
  }

  /// By one thread, which lets the phase wait for so many more bytes.
  void arrive(void* barrier, int bytes) {
    const int byte = checked_offset(barrier, "arrive");
    Executor::Lock lock;
    State& state = at(byte, "arrive");
    if (state.arrivals == 0) {
      fail("one arrival more than the " + std::to_string(state.expected) + " that " + state.name +
           " expects in a phase");
    }
    executor.release(state.order());
    add_bytes(state, bytes);
    --state.arrivals;
    finish_phase(state);
  }

  void wait(void* barrier, unsigned parity) {
    const int byte = checked_offset(barrier, "wait");
    if (parity > 1) fail("wait for parity " + std::to_string(parity) + " of an mbarrier");
    Executor::Lock lock;
    State& state = at(byte, "wait");
    executor.wait(lock, state.waiters, state.places[parity].c_str(),
                  [&] { return (state.phase & 1) != parity; });
    executor.acquire(&state.orders[parity]);
    state.awaited = state.phase;
  }

  /// A copy that the barrier counts the bytes of is on its way: in which phase?
  unsigned begin_copy(void* barrier) {
    const int byte = checked_offset(barrier, "tma_load");
    const Executor::Lock lock;
    State& state = at(byte, "tma_load");
    state.copied = state.phase + 1;
    return state.phase;
  }
  /// It has come.
  void end_copy(void* barrier, int bytes, unsigned phase) {
    const int byte = checked_offset(barrier, "tma_load");
    Executor::Lock lock;
    State& state = at(byte, "tma_load");
    if (state.phase != phase) {
      fail("the bytes of a tma_load come after their phase of " + state.name +
           ", which expected fewer");
    }
    executor.release(state.order());
    add_bytes(state, -bytes);
    finish_phase(state);
  }

  /// At the end of the kernel.
  void check_done() const {
    for (const auto& [byte, state] : states_) {
      if (state.awaited < state.copied)
        fail("the kernel ends with a tma_load that nobody waited for, at " + state.name);
      if (state.bytes != 0) {
        fail("the kernel ends while " + state.name + " expects " + std::to_string(state.bytes) +
             " bytes");
      }
    }
  }

 private:
  struct State {
    void* order() { return &orders[phase & 1]; }

    std::string name, places[2];  // of waits for either parity
    int expected = 0;             // arrivals of each phase
    int arrivals = 0, bytes = 0;  // that are to come in this one
    unsigned phase = 0;
    unsigned copied = 0;   // phases up to the last with a copy
    unsigned awaited = 0;  // phases that somebody has found over
    char orders[2] = {};   // what the ends of even and odd phases come after
    Waiters waiters;
  };

  /// What an mbarrier holds, so that a store to it is found.
  static constexpr std::uint64_t kMark = 0x7ff9b0bab0bab0ba;

  static int offset(const void* barrier, const char* instruction) {
    return block->shared.offset(barrier, 8, 8,
                                (std::string(instruction) + " of an mbarrier").c_str());
  }
  /// Of one that holds the mark. Not under the lock: ThreadSanitizer is to see that it is read.
  static int checked_offset(const void* barrier, const char* instruction) {
    const int byte = offset(barrier, instruction);
    std::uint64_t bits;
    std::memcpy(&bits, barrier, sizeof(bits));
    if (bits != kMark) {
      fail(std::string(instruction) + " of the mbarrier at byte " + std::to_string(byte) +
           " before its init, or something was stored there since");
    }
    return byte;
  }

  State& at(int byte, const char* instruction) {
    const auto found = states_.find(byte);
    if (found == states_.end()) {
      fail(std::string(instruction) + " of the mbarrier at byte " + std::to_string(byte) +
           " before its init");
    }
    return found->second;
  }

  static void add_bytes(State& state, int bytes) {
    state.bytes += bytes;
    if (state.bytes > kMostBytes || state.bytes < -kMostBytes)
      fail(state.name + " cannot count " + std::to_string(state.bytes) + " bytes");
  }

  static void finish_phase(State& state) {
    if (state.arrivals > 0 || state.bytes != 0) return;
    state.arrivals = state.expected;
    ++state.phase;
    executor.wake_all(state.waiters);
  }

  std::map<int, State> states_;
};

}  // namespace sparse_attn::cuda::emulator
