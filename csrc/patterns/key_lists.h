// KeyLists: every query has its own list of keys, found at run time (top-k, hashing, sampling).
#pragma once

#include <algorithm>
#include <memory>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "patterns/pattern.h"

namespace sparse_attn {

class KeyLists final : public PrimitiveBase<KeyLists> {
 public:
  /// The first counts[i] (or all `width`) of indices[i], which are int32 or int64, are the keys of
  /// query i, in any order, repeated or not. Throws std::invalid_argument if one is not a key or a
  /// count is out of range.
  template <class Index>
  KeyLists(const Index* indices, const std::int64_t* counts, std::int64_t width, std::int64_t n_q,
           std::int64_t n_k)
      : offset_(n_k - n_q), n_k_(n_k) {
    std::vector<std::int64_t>& starts = lists_->starts;
    starts.reserve(static_cast<std::size_t>(n_q) + 1);
    starts.push_back(0);
    lists_->keys.resize(static_cast<std::size_t>(listed(counts, width, n_q)) + 1);  // 1: add_bits
    std::vector<std::uint64_t> seen(static_cast<std::size_t>(n_k + 63) / 64);
    std::int32_t* end = lists_->keys.data();
    for (std::int64_t i = 0; i < n_q; ++i) {
      end = add_row(end, indices + i * width, counts ? counts[i] : width, i, seen);
      starts.push_back(end - lists_->keys.data());
    }
    lists_->keys.resize(static_cast<std::size_t>(starts.back()));
  }

  bool contains(std::int64_t position, std::int64_t key) const override {
    const auto row = static_cast<std::size_t>(position - offset_);
    const auto begin = lists_->keys.begin();
    return std::binary_search(begin + lists_->starts[row], begin + lists_->starts[row + 1], key);
  }
  Cover cover(const TokenSet&, const TokenSet&) const override { return Cover::kSome; }
  bool signature(const TokenSet&, const TokenSet&, Signature&) const override { return false; }
  std::shared_ptr<const Lists> lists() const override { return lists_; }

 private:
  /// The sum of the counts.
  static std::int64_t listed(const std::int64_t* counts, std::int64_t width, std::int64_t n_q) {
    if (!counts) return n_q * width;
    std::int64_t sum = 0;
    for (std::int64_t i = 0; i < n_q; ++i) {
      if (counts[i] < 0 || counts[i] > width) {
        throw std::invalid_argument("expected counts from 0 to " + std::to_string(width) +
                                    ", the width of indices, got " + std::to_string(counts[i]) +
                                    " for query " + std::to_string(i));
      }
      sum += counts[i];
    }
    return sum;
  }

  /// Writes the keys, ascending and each once; returns their end. Keys in any other order go
  /// through a set of bits where that has fewer words than sorting has comparisons.
  template <class Index>
  std::int32_t* add_row(std::int32_t* to, const Index* keys, std::int64_t count, std::int64_t row,
                        std::vector<std::uint64_t>& seen) const {
    using Unsigned = std::make_unsigned_t<Index>;
    const auto n_k = static_cast<Unsigned>(n_k_);
    Index outside = 0, falling = 0;  // negative if any is; without branches, for SIMD
    for (std::int64_t k = 0; k < count; ++k)
      outside |= keys[k] | static_cast<Index>(n_k - 1 - static_cast<Unsigned>(keys[k]));
    if (outside < 0) refuse(keys, count, row);
    for (std::int64_t k = 1; k < count; ++k)
      falling |= static_cast<Index>(keys[k] - keys[k - 1] - 1);
    if (falling >= 0) return std::copy(keys, keys + count, to);
    if (static_cast<std::int64_t>(seen.size()) <= 8 * count) {
      for (std::int64_t k = 0; k < count; ++k)
        seen[static_cast<std::size_t>(keys[k]) / 64] |= std::uint64_t{1} << (keys[k] & 63);
      return add_bits(to, seen);
    }
    std::int32_t* const end = std::copy(keys, keys + count, to);
    std::sort(to, end);
    return std::unique(to, end);
  }

  /// Writes and clears the set; may write one number beyond. Four at a time without a branch, which
  /// would be guessed wrong for every other word.
  static std::int32_t* add_bits(std::int32_t* to, std::vector<std::uint64_t>& set) {
    constexpr std::uint64_t kTop = std::uint64_t{1} << 63;
    for (std::size_t w = 0; w < set.size(); ++w) {
      std::uint64_t bits = std::exchange(set[w], 0);
      const auto first = static_cast<std::int32_t>(64 * w);
      do {
        for (int i = 0; i < 4; ++i) {
          *to = first + __builtin_ctzll(bits | kTop);
          to += bits != 0;
          bits &= bits - 1;
        }
      } while (bits != 0);
    }
    return to;
  }

  template <class Index>
  [[noreturn]] void refuse(const Index* keys, std::int64_t count, std::int64_t row) const {
    const Index* const key =
        std::find_if(keys, keys + count, [&](std::int64_t one) { return one < 0 || one >= n_k_; });
    throw std::invalid_argument("expected indices in [0, " + std::to_string(n_k_) + "), got " +
                                std::to_string(*key) + " for query " + std::to_string(row));
  }

  std::int64_t offset_, n_k_;
  std::shared_ptr<Lists> lists_ = std::make_shared<Lists>();
};

}  // namespace sparse_attn
