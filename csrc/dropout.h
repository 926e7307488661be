// Which probabilities dropout keeps: 16 random bits for each pair, a function of (seed, batch,
// head, query, key) alone.
#pragma once

#include <cstdint>

#include "host_device.h"
#include "philox.h"

namespace sparse_attn {

/// Keys that share a draw: eight times 16 bits.
constexpr int kDropoutKeys = 8;

struct DropoutRule {
  std::uint64_t seed;
  std::uint32_t threshold;  // dropped below it; of 65536

  /// The bits of an aligned run of kDropoutKeys keys. `head` counts batch x heads.
  SPARSE_ATTN_HOST_DEVICE Random4 draw(std::int64_t head, std::int64_t query,
                                       std::int64_t key) const {
    return philox(seed, static_cast<std::uint32_t>(key / kDropoutKeys),
                  static_cast<std::uint32_t>(query), Stream::kDropout,
                  static_cast<std::uint32_t>(head));
  }
  SPARSE_ATTN_HOST_DEVICE bool keeps(const Random4& random, std::int64_t key) const {
    const auto place = static_cast<int>(key % kDropoutKeys);
    return (random.word[place / 2] >> (place % 2 * 16) & 0xffff) >= threshold;
  }
  SPARSE_ATTN_HOST_DEVICE bool keeps(std::int64_t head, std::int64_t query,
                                     std::int64_t key) const {
    return keeps(draw(head, query, key), key);
  }
};

/// The threshold of a probability to drop.
SPARSE_ATTN_HOST_DEVICE inline std::uint32_t dropout_threshold(double probability) {
  return static_cast<std::uint32_t>(probability * 65536.0 + 0.5);
}

}  // namespace sparse_attn
