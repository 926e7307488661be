// RandomBlocks(count, block, seed): each block of queries sees `count` distinct blocks of keys
// (BigBird, Zaheer et al. 2020, section 2). Drawn by (seed, query block) alone.
#pragma once

#include <algorithm>
#include <vector>

#include "patterns/block_window.h"
#include "patterns/pattern.h"
#include "patterns/rules.h"

namespace sparse_attn {

class RandomBlocks final : public Primitive {
 public:
  /// Draws for the positions [first_position, n_k); there are more than `count` blocks.
  RandomBlocks(std::int64_t count, std::int64_t block, std::uint64_t seed,
               std::int64_t first_position, std::int64_t n_k)
      : count_(count),
        block_(block),
        first_row_(std::max<std::int64_t>(first_position, 0) / block) {
    const std::int64_t blocks = block_count(n_k, block);
    for (std::int64_t row = first_row_; row < blocks; ++row) {
      const std::vector<std::int64_t> chosen = draw(count, blocks, seed, row);
      drawn_.insert(drawn_.end(), chosen.begin(), chosen.end());
    }
  }

  bool contains(std::int64_t position, std::int64_t key) const override {
    return rule()(position, key);
  }
  void tile(const TokenSet& positions, const TokenSet& keys, std::uint64_t* words) const override {
    for (std::int64_t k = 0; k < keys.count; ++k) {
      if (k > 0 && keys[k] / block_ == keys[k - 1] / block_) {
        words[k] = words[k - 1];
        continue;
      }
      words[k] = 0;
      for (std::int64_t r = 0; r < positions.count; ++r)
        words[k] |= static_cast<std::uint64_t>(contains(positions[r], keys[k])) << r;
    }
  }
  Cover cover(const TokenSet& positions, const TokenSet& keys) const override {
    const BlockRange rows(positions, block_), columns(keys, block_);
    if (rows.none) return Cover::kNone;
    bool any = false, all = rows.whole;
    for (std::int64_t b = rows.first; b <= rows.last && !(any && !all); ++b) {
      const std::int64_t *row = drawn(b), *end = row + count_;
      const auto hits =
          std::upper_bound(row, end, columns.last) - std::lower_bound(row, end, columns.first);
      any = any || hits > 0;
      all = all && hits == columns.last - columns.first + 1;
    }
    return all ? Cover::kAll : any ? Cover::kSome : Cover::kNone;
  }
  bool signature(const TokenSet&, const TokenSet&, Signature&) const override { return false; }
  bool includes(const Primitive& other) const override {
    const auto* blocks = dynamic_cast<const RandomBlocks*>(&other);
    return blocks && blocks->block_ == block_ && blocks->drawn_ == drawn_;
  }
  std::int64_t block() const override { return block_; }

  Instruction instruction() const override {
    Instruction step;
    step.kind = Instruction::Kind::kRandomBlocks;
    step.random_blocks = rule();
    return step;
  }

 private:
  RandomBlocksRule rule() const {
    return {drawn_.data(), static_cast<std::int64_t>(drawn_.size()) / count_, count_, first_row_,
            block_};
  }

  const std::int64_t* drawn(std::int64_t row) const {
    return drawn_.data() + (row - first_row_) * count_;
  }

  /// `count` of the numbers below `blocks`, every set alike: Floyd's algorithm (Bentley and Floyd
  /// 1987).
  static std::vector<std::int64_t> draw(std::int64_t count, std::int64_t blocks, std::uint64_t seed,
                                        std::int64_t row) {
    std::vector<std::int64_t> chosen;
    for (std::int64_t i = 0; i < count; ++i) {
      const std::int64_t last = blocks - count + i;
      const Random4 random = philox(seed, static_cast<std::uint32_t>(i),
                                    static_cast<std::uint32_t>(row), Stream::kBlocks);
      const std::int64_t candidate = below(random, last + 1);
      const auto place = std::lower_bound(chosen.begin(), chosen.end(), candidate);
      if (place != chosen.end() && *place == candidate) {
        chosen.push_back(last);  // larger than all before it
      } else {
        chosen.insert(place, candidate);
      }
    }
    return chosen;
  }

  std::int64_t count_, block_, first_row_;
  std::vector<std::int64_t> drawn_;  // for each block of queries `count` blocks, ascending
};

}  // namespace sparse_attn
