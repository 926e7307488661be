// Who sees whom: the definition of every elementary pattern, for the host and for kernels. A rule
// is plain data; rows are given as positions (query i stands at position i + n_k - n_q).
#pragma once

#include <cstdint>

#include "host_device.h"
#include "philox.h"

namespace sparse_attn {

/// -back <= key - position <= ahead, in whole steps of the dilation.
struct WindowRule {
  std::int64_t back, ahead, dilation;
  SPARSE_ATTN_HOST_DEVICE bool operator()(std::int64_t position, std::int64_t key) const {
    const std::int64_t distance = key - position;
    return -back <= distance && distance <= ahead && (dilation == 1 || distance % dilation == 0);
  }
};

/// Whether `token` is among the ascending `tokens`.
SPARSE_ATTN_HOST_DEVICE inline bool is_among(const std::int64_t* tokens, std::int64_t count,
                                             std::int64_t token) {
  std::int64_t begin = 0, end = count;
  while (begin < end) {
    const std::int64_t middle = begin + (end - begin) / 2;
    if (tokens[middle] < token) {
      begin = middle + 1;
    } else {
      end = middle;
    }
  }
  return begin < count && tokens[begin] == token;
}

struct KeysRule {
  const std::int64_t* tokens;
  std::int64_t count;
  SPARSE_ATTN_HOST_DEVICE bool operator()(std::int64_t, std::int64_t key) const {
    return is_among(tokens, count, key);
  }
};

struct QueriesRule {
  const std::int64_t* tokens;
  std::int64_t count;
  SPARSE_ATTN_HOST_DEVICE bool operator()(std::int64_t position, std::int64_t) const {
    return is_among(tokens, count, position);
  }
};

/// The keys from `first` on in each period.
struct PeriodicRule {
  std::int64_t period, first;
  SPARSE_ATTN_HOST_DEVICE bool operator()(std::int64_t, std::int64_t key) const {
    return key % period >= first;
  }
};

/// -back <= ⌊key / block⌋ - ⌊position / block⌋ <= ahead.
struct BlockWindowRule {
  std::int64_t block, back, ahead;
  SPARSE_ATTN_HOST_DEVICE bool operator()(std::int64_t position, std::int64_t key) const {
    const std::int64_t distance = key / block - position / block;
    return position >= 0 && -back <= distance && distance <= ahead;
  }
};

/// ⌊position / block⌋ + ⌊key / block⌋ is even.
struct CheckerboardRule {
  std::int64_t block;
  SPARSE_ATTN_HOST_DEVICE bool operator()(std::int64_t position, std::int64_t key) const {
    return position >= 0 && (position / block + key / block) % 2 == 0;
  }
};

/// The key's block is one of the `count` ascending ones drawn for the position's.
struct RandomBlocksRule {
  const std::int64_t* drawn;  // (rows, count), for the blocks from first_row on
  std::int64_t rows, count, first_row, block;
  SPARSE_ATTN_HOST_DEVICE bool operator()(std::int64_t position, std::int64_t key) const {
    return position >= 0 &&
           is_among(drawn + (position / block - first_row) * count, count, key / block);
  }
};

/// Kept if the pair's 32 random bits are below the threshold.
struct RandomTokensRule {
  std::int64_t threshold;
  std::uint64_t seed;
  /// The bits of a key and of its three neighbours.
  SPARSE_ATTN_HOST_DEVICE Random4 four_keys(std::int64_t position, std::int64_t key) const {
    return philox(seed, static_cast<std::uint32_t>(key / 4), static_cast<std::uint32_t>(position),
                  Stream::kTokens);
  }
  SPARSE_ATTN_HOST_DEVICE bool keeps(const Random4& random, std::int64_t key) const {
    return random.word[key % 4] < threshold;
  }
  SPARSE_ATTN_HOST_DEVICE bool operator()(std::int64_t position, std::int64_t key) const {
    return keeps(four_keys(position, key), key);
  }
};

/// layout[query / block][key / block] is true.
struct LayoutRule {
  const std::uint8_t* layout;
  std::int64_t columns, block, offset;  // query i stands at position i + offset
  SPARSE_ATTN_HOST_DEVICE const std::uint8_t* row(std::int64_t position) const {
    return layout + (position - offset) / block * columns;
  }
  SPARSE_ATTN_HOST_DEVICE bool operator()(std::int64_t position, std::int64_t key) const {
    return row(position)[key / block] != 0;
  }
};

}  // namespace sparse_attn
