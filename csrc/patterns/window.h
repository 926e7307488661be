// Window(left, right, dilation): key = position + m · dilation with -left <= m <= right.
// Longformer, section 3.1.
#pragma once

#include <algorithm>
#include <numeric>

#include "patterns/pattern.h"
#include "patterns/rules.h"

namespace sparse_attn {

/// Stands for an unbounded side. Reaches are kept below it, so that sums of two never overflow.
constexpr std::int64_t kUnbounded = std::int64_t{1} << 60;

inline std::int64_t window_reach(std::int64_t steps, std::int64_t dilation) {
  return steps >= kUnbounded / dilation ? kUnbounded : steps * dilation;
}

class Window final : public PrimitiveBase<Window> {
 public:
  /// `back` and `ahead` are distances in tokens.
  Window(std::int64_t back, std::int64_t ahead, std::int64_t dilation)
      : rule_{back, ahead, dilation} {}

  bool contains(std::int64_t position, std::int64_t key) const override {
    return rule_(position, key);
  }

  Cover cover(const TokenSet& positions, const TokenSet& keys) const override {
    const std::int64_t nearest = keys.first() - positions.last();
    const std::int64_t furthest = keys.last() - positions.first();
    if (furthest < -rule_.back || nearest > rule_.ahead) return Cover::kNone;
    if (rule_.dilation > 1) {
      const bool one_residue = on_lattice(positions) && on_lattice(keys);
      if (!one_residue) return Cover::kSome;
      if ((keys.first() - positions.first()) % rule_.dilation != 0) return Cover::kNone;
    }
    return -rule_.back <= nearest && furthest <= rule_.ahead ? Cover::kAll : Cover::kSome;
  }

  bool signature(const TokenSet& positions, const TokenSet& keys, Signature& out) const override {
    describe(positions, positions.first(), out);
    describe(keys, positions.first(), out);
    return true;
  }

  PrimitivePtr intersect(const Primitive& other) const override {
    const auto* window = dynamic_cast<const Window*>(&other);
    if (!window) return nullptr;
    // Beyond kUnbounded no two tokens differ by a multiple of the common step but 0 itself.
    const std::int64_t factor =
        window->rule_.dilation / std::gcd(rule_.dilation, window->rule_.dilation);
    const std::int64_t both =
        rule_.dilation >= kUnbounded / factor ? kUnbounded : rule_.dilation * factor;
    return std::make_shared<Window>(std::min(rule_.back, window->rule_.back),
                                    std::min(rule_.ahead, window->rule_.ahead), both);
  }

  bool includes(const Primitive& other) const override {
    const auto* window = dynamic_cast<const Window*>(&other);
    return window && rule_.back >= window->rule_.back && rule_.ahead >= window->rule_.ahead &&
           window->rule_.dilation % rule_.dilation == 0;
  }

  std::int64_t step() const override { return rule_.dilation; }

  Instruction instruction() const override {
    Instruction step;
    step.kind = Instruction::Kind::kWindow;
    step.window = rule_;
    return step;
  }

 private:
  bool on_lattice(const TokenSet& set) const {
    return set.count == 1 || (!set.list && set.step % rule_.dilation == 0);
  }

  WindowRule rule_;
};

}  // namespace sparse_attn
