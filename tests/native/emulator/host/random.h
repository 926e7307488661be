// Random numbers that decide orders and garbage: a function of the seed alone.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <numeric>
#include <utility>
#include <vector>

namespace sparse_attn::cuda::emulator {

/// SplitMix64 (Steele, Lea and Flood 2014).
class Random {
 public:
  explicit Random(std::uint64_t seed) : state_(seed) {}

  std::uint64_t word() {
    state_ += 0x9E3779B97F4A7C15;
    std::uint64_t x = state_;
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9;
    x = (x ^ x >> 27) * 0x94D049BB133111EB;
    return x ^ x >> 31;
  }
  /// One of [0, n).
  int below(int n) {
    return static_cast<int>((word() >> 32) * static_cast<std::uint64_t>(n) >> 32);
  }

 private:
  std::uint64_t state_;
};

/// 0 to n - 1 in random order.
inline std::vector<int> shuffled(int n, Random& random) {
  std::vector<int> order(static_cast<std::size_t>(n));
  std::iota(order.begin(), order.end(), 0);
  for (int i = n - 1; i > 0; --i) {
    std::swap(order[static_cast<std::size_t>(i)],
              order[static_cast<std::size_t>(random.below(i + 1))]);
  }
  return order;
}

inline std::uint64_t seed_from_environment() {
  const char* text = std::getenv("SPARSE_ATTN_EMULATOR_SEED");
  return text == nullptr ? 1 : std::strtoull(text, nullptr, 10);
}

/// Every launch draws its own seed from these.
inline std::uint64_t seed = seed_from_environment();
inline Random launch_seeds(seed);

/// From the next launch on.
inline void set_seed(std::uint64_t to) {
  seed = to;
  launch_seeds = Random(to);
}

}  // namespace sparse_attn::cuda::emulator
