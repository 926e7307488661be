// Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"): numbers that
// are a function of a key and a counter, so that any device, thread and tile draws the same ones.
#pragma once

#include <cstdint>

#include "host_device.h"

namespace sparse_attn {

/// What the numbers of one seed are for: streams that never meet.
enum class Stream : std::uint32_t { kTokens = 1, kBlocks = 2, kDropout = 3 };

struct Random4 {
  std::uint32_t word[4];
};

SPARSE_ATTN_HOST_DEVICE_INLINE Random4 philox(std::uint64_t seed, std::uint32_t a, std::uint32_t b,
                                              Stream stream, std::uint32_t c = 0) {
  auto key0 = static_cast<std::uint32_t>(seed), key1 = static_cast<std::uint32_t>(seed >> 32);
  Random4 x{{a, b, c, static_cast<std::uint32_t>(stream)}};
  for (int round = 0; round < 10; ++round) {
    const std::uint64_t p0 = std::uint64_t{0xD2511F53} * x.word[0],
                        p1 = std::uint64_t{0xCD9E8D57} * x.word[2];
    x = {{static_cast<std::uint32_t>(p1 >> 32) ^ x.word[1] ^ key0, static_cast<std::uint32_t>(p1),
          static_cast<std::uint32_t>(p0 >> 32) ^ x.word[3] ^ key1, static_cast<std::uint32_t>(p0)}};
    key0 += 0x9E3779B9;
    key1 += 0xBB67AE85;
  }
  return x;
}

/// One of [0, n), from 64 random bits: a bias of at most n / 2^64.
inline std::int64_t below(const Random4& random, std::int64_t n) {
  const std::uint64_t bits = random.word[0] | std::uint64_t{random.word[1]} << 32;
  __extension__ using Wide = unsigned __int128;
  return static_cast<std::int64_t>(Wide{bits} * static_cast<std::uint64_t>(n) >> 64);
}

}  // namespace sparse_attn
