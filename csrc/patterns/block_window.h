// Blocks of tokens see blocks around them: LocalBlocks (itself alone), BigBird's window (section 2
// of Zaheer et al. 2020).
#pragma once

#include <algorithm>

#include "patterns/pattern.h"
#include "patterns/rules.h"

namespace sparse_attn {

/// The mathematical floor of a / b for b > 0.
inline std::int64_t floor_div(std::int64_t a, std::int64_t b) { return a / b - (a % b < 0); }

/// The number of blocks that `n` tokens make, the last one maybe partial; n >= 0, any block > 0.
inline std::int64_t block_count(std::int64_t n, std::int64_t block) {
  return n / block + (n % block != 0);
}

/// The blocks [first, last] that the tokens of a set lie in. A token at a negative position lies in
/// none.
struct BlockRange {
  BlockRange(const TokenSet& set, std::int64_t block)
      : first(std::max<std::int64_t>(set.first(), 0) / block),
        last(floor_div(set.last(), block)),
        none(set.last() < 0),
        whole(set.first() >= 0) {}

  std::int64_t first, last;
  bool none;   // no token is in a block
  bool whole;  // every token is in one
};

/// Appends where the tokens lie relative to the blocks.
inline void describe_blocks(const TokenSet& positions, const TokenSet& keys, std::int64_t block,
                            Signature& out) {
  const std::int64_t origin = floor_div(positions.first(), block) * block;
  out.push_back(std::min<std::int64_t>(positions.first(), 0));
  describe(positions, origin, out);
  describe(keys, origin, out);
}

/// -back <= ⌊key / block⌋ - ⌊position / block⌋ <= ahead.
class BlockWindow final : public PrimitiveBase<BlockWindow> {
 public:
  BlockWindow(std::int64_t block, std::int64_t back, std::int64_t ahead)
      : rule_{block, back, ahead} {}

  bool contains(std::int64_t position, std::int64_t key) const override {
    return rule_(position, key);
  }
  Cover cover(const TokenSet& positions, const TokenSet& keys) const override {
    const BlockRange rows(positions, rule_.block), columns(keys, rule_.block);
    const std::int64_t nearest = columns.first - rows.last, furthest = columns.last - rows.first;
    if (rows.none || furthest < -rule_.back || nearest > rule_.ahead) return Cover::kNone;
    return rows.whole && -rule_.back <= nearest && furthest <= rule_.ahead ? Cover::kAll
                                                                           : Cover::kSome;
  }
  bool signature(const TokenSet& positions, const TokenSet& keys, Signature& out) const override {
    describe_blocks(positions, keys, rule_.block, out);
    return true;
  }
  PrimitivePtr intersect(const Primitive& other) const override {
    const auto* window = dynamic_cast<const BlockWindow*>(&other);
    if (!window || window->rule_.block != rule_.block) return nullptr;
    return std::make_shared<BlockWindow>(rule_.block, std::min(rule_.back, window->rule_.back),
                                         std::min(rule_.ahead, window->rule_.ahead));
  }
  bool includes(const Primitive& other) const override {
    const auto* window = dynamic_cast<const BlockWindow*>(&other);
    return window && window->rule_.block == rule_.block && rule_.back >= window->rule_.back &&
           rule_.ahead >= window->rule_.ahead;
  }
  std::int64_t block() const override { return rule_.block; }

  Instruction instruction() const override {
    Instruction step;
    step.kind = Instruction::Kind::kBlockWindow;
    step.block_window = rule_;
    return step;
  }

 private:
  BlockWindowRule rule_;
};

}  // namespace sparse_attn
