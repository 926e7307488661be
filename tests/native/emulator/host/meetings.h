// Where threads meet: the barriers of a block and the collectives of a warp. The executors add how
// threads wait for each other.
#pragma once

#include <cstring>
#include <string>

#include "host/block.h"

namespace sparse_attn::cuda::emulator {

/// sync_threads and sync_threads_or.
class BarrierMeeting {
 public:
  /// True for the last of the block's threads.
  bool arrive(const char* name, bool predicate) {
    if (arrived_ == 0) {
      name_ = name;
      any_ = false;
    }
    if (std::strcmp(name, name_) != 0)
      fail(std::string("divergent barrier: ") + name + " here, " + name_ + " by " +
           std::to_string(arrived_) + " other threads");
    any_ |= predicate;
    if (++arrived_ < block->threads) return false;
    arrived_ = 0;
    result_ = any_;
    return true;
  }
  /// Whether any predicate held, at the last barrier that all reached.
  bool any() const { return result_; }

 private:
  const char* name_ = nullptr;
  int arrived_ = 0;
  bool any_ = false, result_ = false;
};

/// An instruction that a warp executes together: the last lane to arrive computes for all, from the
/// operands of each.
struct Collective {
  const char* name;
  void (*compute)(void* const (&operands)[kWarp], int argument);
};

class WarpMeeting {
 public:
  /// True for the last lane: the results are there.
  bool arrive(const Collective& which, int argument, int lane, void* operands) {
    if (arrived_ == 0) {
      which_ = &which;
      argument_ = argument;
    }
    if (&which != which_ || argument != argument_)
      fail("divergent warp: " + text(which, argument) + " here, " + text(*which_, argument_) +
           " by other lanes");
    operands_[lane] = operands;
    if (++arrived_ < kWarp) return false;
    arrived_ = 0;
    which.compute(operands_, argument);
    return true;
  }

 private:
  static std::string text(const Collective& which, int argument) {
    return std::string(which.name) + "(" + std::to_string(argument) + ")";
  }

  const Collective* which_ = nullptr;
  int argument_ = 0;
  int arrived_ = 0;
  void* operands_[kWarp] = {};
};

}  // namespace sparse_attn::cuda::emulator
