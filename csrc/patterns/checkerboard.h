// Checkerboard(block): ⌊position / block⌋ + ⌊key / block⌋ is even.
#pragma once

#include "patterns/block_window.h"
#include "patterns/pattern.h"

namespace sparse_attn {

class Checkerboard final : public PrimitiveBase<Checkerboard> {
 public:
  explicit Checkerboard(std::int64_t block) : rule_{block} {}

  bool contains(std::int64_t position, std::int64_t key) const override {
    return rule_(position, key);
  }
  Cover cover(const TokenSet& positions, const TokenSet& keys) const override {
    const BlockRange rows(positions, rule_.block), columns(keys, rule_.block);
    if (rows.none) return Cover::kNone;
    if (!one_color(positions, rows) || !one_color(keys, columns)) return Cover::kSome;
    if ((rows.first + columns.first) % 2 != 0) return Cover::kNone;
    return rows.whole ? Cover::kAll : Cover::kSome;
  }
  bool signature(const TokenSet& positions, const TokenSet& keys, Signature& out) const override {
    describe_blocks(positions, keys, rule_.block, out);
    return true;
  }
  bool includes(const Primitive& other) const override {
    const auto* board = dynamic_cast<const Checkerboard*>(&other);
    return board && board->rule_.block == rule_.block;
  }
  /// Single tokens alternate: residue classes modulo 2 are dense. Blocks are as they are.
  std::int64_t step() const override { return rule_.block == 1 ? 2 : 1; }
  std::int64_t block() const override { return rule_.block; }

  Instruction instruction() const override {
    Instruction step;
    step.kind = Instruction::Kind::kCheckerboard;
    step.checkerboard = rule_;
    return step;
  }

 private:
  bool one_color(const TokenSet& set, const BlockRange& range) const {
    if (range.first == range.last) return true;
    return rule_.block == 1 && range.whole && !set.list && set.step % 2 == 0;
  }

  CheckerboardRule rule_;
};

}  // namespace sparse_attn
