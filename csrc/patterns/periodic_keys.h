// PeriodicKeys(period, count): the last `count` keys of every `period`, the summaries of the fixed
// pattern (Sparse Transformer, Child et al. 2019, section 4.2).
#pragma once

#include <algorithm>

#include "patterns/pattern.h"
#include "patterns/tokens.h"

namespace sparse_attn {

class PeriodicKeys final : public Primitive {
 public:
  PeriodicKeys(std::int64_t period, std::int64_t count, std::int64_t n_k)
      : rule_{period, period - count} {
    for (std::int64_t start = rule_.first; start < n_k; start += period) {
      for (std::int64_t t = start; t < std::min(start + count, n_k); ++t) tokens_.push_back(t);
      if (period > n_k) break;  // and the sum might overflow
    }
  }

  bool contains(std::int64_t position, std::int64_t key) const override {
    return rule_(position, key);
  }
  void tile(const TokenSet&, const TokenSet& keys, std::uint64_t* words) const override {
    for (std::int64_t k = 0; k < keys.count; ++k)
      words[k] = contains(0, keys[k]) ? ~std::uint64_t{0} : 0;
  }
  Cover cover(const TokenSet&, const TokenSet& keys) const override {
    if (keys.list) return cover_of(tokens_, keys);
    const std::int64_t first = keys.first() % rule_.period,
                       reach = first + keys.last() - keys.first();
    if (keys.step % rule_.period == 0 || keys.count == 1)
      return first >= rule_.first ? Cover::kAll : Cover::kNone;
    if (reach < rule_.first) return Cover::kNone;
    return first >= rule_.first && reach < rule_.period ? Cover::kAll : Cover::kSome;
  }
  bool signature(const TokenSet&, const TokenSet& keys, Signature& out) const override {
    std::uint64_t bits = 0;
    for (std::int64_t k = 0; k < keys.count; ++k)
      bits |= static_cast<std::uint64_t>(contains(0, keys[k])) << k;
    out.push_back(static_cast<std::int64_t>(bits));
    return true;
  }
  bool includes(const Primitive& other) const override {
    const auto* keys = dynamic_cast<const PeriodicKeys*>(&other);
    return keys && keys->rule_.period == rule_.period && keys->rule_.first >= rule_.first;
  }
  const TokenList* key_list() const override { return &tokens_; }

  Instruction instruction() const override {
    Instruction step;
    step.kind = Instruction::Kind::kPeriodic;
    step.periodic = rule_;
    return step;
  }

 private:
  PeriodicRule rule_;
  TokenList tokens_;
};

}  // namespace sparse_attn
