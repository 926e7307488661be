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
/// What a destination holds until the data lands.
constexpr Words4 kNaNs{{0x7ff37ff5u, 0x7ff37ff5u, 0x7ff37ff5u, 0x7ff37ff5u}};

class Copies {
 public:
  /// Global memory is read now. The destination holds NaNs until the data lands: who reads it too
  /// early, or still needs what was there, gets them.
  void issue(void* shared, const void* global, bool valid) {
    const int byte = block->shared.offset(shared, 16, 16, "cp_async_16");
    if (reinterpret_cast<std::uintptr_t>(global) % 16 != 0)
      fail("cp_async_16 from a global address that is not aligned to 16 bytes");
    Copy copy{shared, byte, {}, committed_};
    if (valid) std::memcpy(&copy.data, global, sizeof(copy.data));
    under_way_.push_back(copy);
    std::memcpy(shared, &kNaNs, sizeof(kNaNs));
  }

  void commit() { ++committed_; }

  /// Lands all groups but the last `pending`.
  void wait(int pending) {
    while (!under_way_.empty() && under_way_.front().group < committed_ - pending) {
      const Copy& copy = under_way_.front();
      std::memcpy(copy.shared, &copy.data, sizeof(copy.data));
      block->unfenced.landed(copy.byte, threadIdx.x);
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
    int byte;  // of shared memory
    Words4 data;
    int group;
  };
  std::deque<Copy> under_way_;
  int committed_ = 0;
};

}  // namespace sparse_attn::cuda::emulator
