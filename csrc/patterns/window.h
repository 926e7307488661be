// Window(left, right, dilation): key = position + m · dilation with -left <= m <= right.
// Longformer, section 3.1.
#pragma once

#include <algorithm>
#include <numeric>

#include "patterns/pattern.h"

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
      : back_(back), ahead_(ahead), dilation_(dilation) {}

  bool contains(std::int64_t position, std::int64_t key) const override {
    const std::int64_t distance = key - position;
    return -back_ <= distance && distance <= ahead_ &&
           (dilation_ == 1 || distance % dilation_ == 0);
  }

  Cover cover(const TokenSet& positions, const TokenSet& keys) const override {
    const std::int64_t nearest = keys.first() - positions.last();
    const std::int64_t furthest = keys.last() - positions.first();
    if (furthest < -back_ || nearest > ahead_) return Cover::kNone;
    if (dilation_ > 1) {
      const bool one_residue = on_lattice(positions) && on_lattice(keys);
      if (!one_residue) return Cover::kSome;
      if ((keys.first() - positions.first()) % dilation_ != 0) return Cover::kNone;
    }
    return -back_ <= nearest && furthest <= ahead_ ? Cover::kAll : Cover::kSome;
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
    const std::int64_t factor = window->dilation_ / std::gcd(dilation_, window->dilation_);
    const std::int64_t both = dilation_ >= kUnbounded / factor ? kUnbounded : dilation_ * factor;
    return std::make_shared<Window>(std::min(back_, window->back_),
                                    std::min(ahead_, window->ahead_), both);
  }

  bool includes(const Primitive& other) const override {
    const auto* window = dynamic_cast<const Window*>(&other);
    return window && back_ >= window->back_ && ahead_ >= window->ahead_ &&
           window->dilation_ % dilation_ == 0;
  }

  std::int64_t step() const override { return dilation_; }

 private:
  bool on_lattice(const TokenSet& set) const {
    return set.count == 1 || (!set.list && set.step % dilation_ == 0);
  }

  std::int64_t back_, ahead_, dilation_;
};

}  // namespace sparse_attn
