// cp.async of one thread: data that is under way until the thread waits for it.
#pragma once

#include <cstdint>
#include <cstring>
#include <deque>

#include "host/block.h"

namespace sparse_attn::cuda::emulator {

struct Words4 {
  std::uint32_t word[4];
};

class Copies {
 public:
  /// Global memory is read now. The destination holds NaNs until the data lands: who reads it too
  /// early, or still needs what was there, gets them.
  void issue(void* shared, const void* global, bool valid) {
    block->shared.check(shared, "cp_async_16");
    if (reinterpret_cast<std::uintptr_t>(global) % 16 != 0)
      fail("cp_async_16 from a global address that is not aligned to 16 bytes");
    Copy copy{shared, {}, committed_};
    if (valid) std::memcpy(&copy.data, global, sizeof(copy.data));
    under_way_.push_back(copy);
    constexpr std::uint32_t kNaNs = 0x7ff37ff5u;
    const Words4 nans{{kNaNs, kNaNs, kNaNs, kNaNs}};
    std::memcpy(shared, &nans, sizeof(nans));
  }

  void commit() { ++committed_; }

  /// Lands all groups but the last `pending`.
  void wait(int pending) {
    while (!under_way_.empty() && under_way_.front().group < committed_ - pending) {
      const Copy& copy = under_way_.front();
      std::memcpy(copy.shared, &copy.data, sizeof(copy.data));
      under_way_.pop_front();
    }
  }

  void check_landed() const {
    if (!under_way_.empty())
      fail("the kernel ends with " + std::to_string(under_way_.size()) +
           " cp_async_16 that nobody waited for");
  }

 private:
  struct Copy {
    void* shared;
    Words4 data;
    int group;
  };
  std::deque<Copy> under_way_;
  int committed_ = 0;
};

}  // namespace sparse_attn::cuda::emulator
