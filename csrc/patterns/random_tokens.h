// RandomTokens(keep_prob, seed): every pair is allowed with one probability, independently. Each
// number belongs to its (seed, position, key), so tiles, threads and devices agree.
#pragma once

#include "patterns/pattern.h"
#include "patterns/rules.h"

namespace sparse_attn {

class RandomTokens final : public Primitive {
 public:
  /// A pair is kept if its 32 random bits are below `threshold`.
  RandomTokens(std::int64_t threshold, std::uint64_t seed) : rule_{threshold, seed} {}

  bool contains(std::int64_t position, std::int64_t key) const override {
    return rule_(position, key);
  }
  void tile(const TokenSet& positions, const TokenSet& keys, std::uint64_t* words) const override {
    for (std::int64_t k = 0; k < keys.count; ++k) words[k] = 0;
    for (std::int64_t r = 0; r < positions.count; ++r) {
      Random4 random{};
      for (std::int64_t k = 0; k < keys.count; ++k) {
        if (k == 0 || keys[k] / 4 != keys[k - 1] / 4)
          random = rule_.four_keys(positions[r], keys[k]);
        words[k] |= static_cast<std::uint64_t>(rule_.keeps(random, keys[k])) << r;
      }
    }
  }
  Cover cover(const TokenSet&, const TokenSet&) const override { return Cover::kSome; }
  bool signature(const TokenSet&, const TokenSet&, Signature&) const override { return false; }
  bool includes(const Primitive& other) const override {
    const auto* tokens = dynamic_cast<const RandomTokens*>(&other);
    return tokens && tokens->rule_.seed == rule_.seed && rule_.threshold >= tokens->rule_.threshold;
  }

  Instruction instruction() const override {
    Instruction step;
    step.kind = Instruction::Kind::kRandomTokens;
    step.random_tokens = rule_;
    return step;
  }

 private:
  RandomTokensRule rule_;
};

}  // namespace sparse_attn
