// A thread block on the host: its shared memory, where its threads are, and the end of the program
// when the kernel breaks a rule.
#pragma once

#include <atomic>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <string>
#include <vector>

#include "host/random.h"

#if defined(__SANITIZE_ADDRESS__)
#define SPARSE_ATTN_EMULATOR_ASAN
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define SPARSE_ATTN_EMULATOR_ASAN
#endif
#endif
#ifdef SPARSE_ATTN_EMULATOR_ASAN
#include <sanitizer/asan_interface.h>
#endif

/// CUDA's names for the place of the running thread; the executors keep them up to date.
struct EmulatorIndex {
  unsigned x;
};
inline thread_local EmulatorIndex threadIdx, blockIdx, blockDim, gridDim;

namespace sparse_attn::cuda::emulator {

constexpr int kWarp = 32;

[[noreturn]] inline void fail(const std::string& what) {
  std::fprintf(stderr, "emulator: block %u, thread %u (seed %llu): %s\n", blockIdx.x, threadIdx.x,
               static_cast<unsigned long long>(seed), what.c_str());
  std::abort();
}

/// 16 bits of it are a NaN of every type: float16, bfloat16, the upper halves of float and double.
inline std::uint16_t garbage(Random& random) {
  return static_cast<std::uint16_t>(0x7ff1 + random.below(7) + 0x8000 * random.below(2));
}

/// The bytes that a kernel asked for, full of garbage, between red zones: AddressSanitizer reports
/// an access there at once, without it a store is found at the end of the block.
class SharedMemory {
 public:
  SharedMemory(int bytes, Random& random) : bytes_(bytes) {
    const std::size_t size = static_cast<std::size_t>(bytes) + 2 * kRedZone;
    void* allocated = nullptr;
    if (posix_memalign(&allocated, kAlignment, size) != 0) fail("out of memory");
    allocated_ = static_cast<char*>(allocated);
    std::memset(allocated_, kRed, size);
    for (int i = 0; i + 1 < bytes; i += 2) {
      const std::uint16_t bits = garbage(random);
      std::memcpy(data() + i, &bits, sizeof(bits));
    }
    poison();
  }
  SharedMemory(const SharedMemory&) = delete;
  SharedMemory& operator=(const SharedMemory&) = delete;
  ~SharedMemory() { std::free(allocated_); }

  char* data() const { return allocated_ + kRedZone; }

  int bytes() const { return bytes_; }

  /// The byte that an instruction's operand begins at, if it is inside and aligned.
  int offset(const void* address, int bytes, int alignment, const char* instruction) const {
    const auto offset = static_cast<std::int64_t>(reinterpret_cast<std::uintptr_t>(address) -
                                                  reinterpret_cast<std::uintptr_t>(data()));
    if (offset < 0 || offset + bytes > bytes_)
      fail(place(instruction, offset) + ", which has " + std::to_string(bytes_) + " bytes");
    if (offset % alignment != 0) {
      fail(place(instruction, offset) + ", which is not aligned to " + std::to_string(alignment) +
           " bytes");
    }
    return static_cast<int>(offset);
  }
  /// Instructions that take 16 bytes want them aligned.
  void check(const void* address, const char* instruction) const {
    offset(address, 16, 16, instruction);
  }

  void check_red_zones() const {
    unpoison();
    for (int i = 0; i < kRedZone; ++i) {
      if (allocated_[i] != kRed || data()[bytes_ + i] != kRed)
        fail("a store outside of the block's " + std::to_string(bytes_) +
             " bytes of shared memory");
    }
  }

 private:
  static std::string place(const char* instruction, std::int64_t offset) {
    return std::string(instruction) + " at byte " + std::to_string(offset) + " of shared memory";
  }

  static constexpr int kRedZone = 1024, kAlignment = 1024;
  static constexpr char kRed = 0x5a;

#ifdef SPARSE_ATTN_EMULATOR_ASAN
  void poison() const {
    ASAN_POISON_MEMORY_REGION(allocated_, kRedZone);
    ASAN_POISON_MEMORY_REGION(data() + bytes_, kRedZone);
  }
  void unpoison() const {
    ASAN_UNPOISON_MEMORY_REGION(allocated_, static_cast<std::size_t>(bytes_ + 2 * kRedZone));
  }
#else
  void poison() const {}
  void unpoison() const {}
#endif

  const int bytes_;
  char* allocated_;
};

/// Which places of 16 bytes a thread has filled by cp.async and not fenced since, so that wgmma
/// must not read them. Relaxed: orders nothing.
class Unfenced {
 public:
  Unfenced(int shared_bytes, int threads)
      : marks_(static_cast<std::size_t>(shared_bytes / 16)),
        fences_(static_cast<std::size_t>(threads)) {}

  void landed(int byte, unsigned thread) { mark(byte).store(now(thread), kRelaxed); }
  void overwritten(int byte) { mark(byte).store(0, kRelaxed); }
  void fence(unsigned thread) { fences_[thread].fetch_add(1, kRelaxed); }

  bool at(int byte) const {
    const std::uint32_t was = marks_[static_cast<std::size_t>(byte / 16)].load(kRelaxed);
    return was != 0 && was == now(was % kThreads - 1);
  }

 private:
  static constexpr std::memory_order kRelaxed = std::memory_order_relaxed;
  static constexpr std::uint32_t kThreads = 2048;

  std::atomic<std::uint32_t>& mark(int byte) { return marks_[static_cast<std::size_t>(byte / 16)]; }
  /// The thread, and how many fences it has had.
  std::uint32_t now(unsigned thread) const {
    return fences_[thread].load(kRelaxed) * kThreads + thread + 1;
  }

  std::vector<std::atomic<std::uint32_t>> marks_, fences_;
};

/// `body(arguments)` is what each of its threads runs.
struct Block {
  Block(int number_, int blocks_, int threads_, int shared_bytes, std::uint64_t block_seed)
      : number(number_),
        blocks(blocks_),
        threads(threads_),
        random(block_seed),
        shared(shared_bytes, random),
        unfenced(shared_bytes, threads_),
        places(static_cast<std::size_t>(threads_)) {}

  /// Where a thread waits, or "the end"; null while it can go on.
  void set_place(int thread, const char* place) {
    places[static_cast<std::size_t>(thread)].store(place, std::memory_order_relaxed);
  }

  [[noreturn]] void fail_deadlock() const {
    std::map<std::string, int> counts;
    for (const std::atomic<const char*>& place : places) {
      const char* name = place.load(std::memory_order_relaxed);
      ++counts[name == nullptr ? "elsewhere" : name];
    }
    std::string what = "no thread can go on:";
    for (const auto& [name, count] : counts)
      what += " " + std::to_string(count) + " at " + name + ";";
    fail(what);
  }

  const int number, blocks, threads;
  void (*body)(const void* arguments) = nullptr;
  const void* arguments = nullptr;
  std::size_t argument_bytes = 0;
  Random random;
  SharedMemory shared;
  Unfenced unfenced;
  std::vector<std::atomic<const char*>> places;
};

/// The one that runs: there is one at a time.
inline Block* block = nullptr;

}  // namespace sparse_attn::cuda::emulator
