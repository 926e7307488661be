// KeyLists: every query has its own list of keys, found at run time (top-k, hashing, sampling).
#pragma once

#include <algorithm>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "patterns/pattern.h"

namespace sparse_attn {

class KeyLists final : public PrimitiveBase<KeyLists> {
 public:
  /// The first counts[i] (or all `width`) of indices[i] are the keys of query i, in any order,
  /// repeated or not. Throws std::invalid_argument if one is not a key or a count is out of range.
  KeyLists(const std::int64_t* indices, const std::int64_t* counts, std::int64_t width,
           std::int64_t n_q, std::int64_t n_k)
      : offset_(n_k - n_q), n_k_(n_k), seen_(static_cast<std::size_t>(n_k + 63) / 64) {
    lists_.starts.reserve(static_cast<std::size_t>(n_q) + 1);
    lists_.starts.push_back(0);
    for (std::int64_t i = 0; i < n_q; ++i) {
      const std::int64_t count = counts ? counts[i] : width;
      if (count < 0 || count > width) {
        throw std::invalid_argument("expected counts from 0 to " + std::to_string(width) +
                                    ", the width of indices, got " + std::to_string(count) +
                                    " for query " + std::to_string(i));
      }
      add_row(indices + i * width, count, i);
      lists_.starts.push_back(static_cast<std::int64_t>(lists_.keys.size()));
    }
  }

  bool contains(std::int64_t position, std::int64_t key) const override {
    const auto row = static_cast<std::size_t>(position - offset_);
    const auto begin = lists_.keys.begin();
    return std::binary_search(begin + lists_.starts[row], begin + lists_.starts[row + 1], key);
  }
  Cover cover(const TokenSet&, const TokenSet&) const override { return Cover::kSome; }
  bool signature(const TokenSet&, const TokenSet&, Signature&) const override { return false; }
  const Lists* lists() const override { return &lists_; }

 private:
  /// Sorts the keys and drops repetitions: through a set of bits where that has fewer words than
  /// sorting has comparisons.
  void add_row(const std::int64_t* keys, std::int64_t count, std::int64_t row) {
    for (std::int64_t k = 0; k < count; ++k) {
      if (keys[k] < 0 || keys[k] >= n_k_) {
        throw std::invalid_argument("expected indices in [0, " + std::to_string(n_k_) + "), got " +
                                    std::to_string(keys[k]) + " for query " + std::to_string(row));
      }
    }
    if (static_cast<std::int64_t>(seen_.size()) <= 8 * count) {
      add_by_bits(keys, count);
    } else {
      add_by_sorting(keys, count);
    }
  }

  void add_by_bits(const std::int64_t* keys, std::int64_t count) {
    for (std::int64_t k = 0; k < count; ++k)
      seen_[static_cast<std::size_t>(keys[k] / 64)] |= std::uint64_t{1} << keys[k] % 64;
    for (std::size_t w = 0; w < seen_.size(); ++w) {
      for (; seen_[w] != 0; seen_[w] &= seen_[w] - 1) {
        const auto bit = static_cast<std::size_t>(__builtin_ctzll(seen_[w]));
        lists_.keys.push_back(static_cast<std::int32_t>(64 * w + bit));
      }
    }
  }

  void add_by_sorting(const std::int64_t* keys, std::int64_t count) {
    const auto first = static_cast<std::ptrdiff_t>(lists_.keys.size());
    for (std::int64_t k = 0; k < count; ++k)
      lists_.keys.push_back(static_cast<std::int32_t>(keys[k]));
    const auto begin = lists_.keys.begin() + first;
    std::sort(begin, lists_.keys.end());
    lists_.keys.erase(std::unique(begin, lists_.keys.end()), lists_.keys.end());
  }

  std::int64_t offset_, n_k_;
  Lists lists_;
  std::vector<std::uint64_t> seen_;  // a bit for each key
};

}  // namespace sparse_attn
