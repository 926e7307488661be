// GlobalKeys(tokens): those keys are seen by all. GlobalQueries(tokens): those positions see all.
// Their union is Longformer's symmetric global attention (section 3.1).
#pragma once

#include <algorithm>
#include <iterator>
#include <utility>

#include "patterns/pattern.h"
#include "patterns/rules.h"

namespace sparse_attn {

using TokenList = std::vector<std::int64_t>;

/// How much of `set` is in the ascending `tokens`.
inline Cover cover_of(const TokenList& tokens, const TokenSet& set) {
  const auto begin = std::lower_bound(tokens.begin(), tokens.end(), set.first());
  const auto end = std::upper_bound(begin, tokens.end(), set.last());
  if (begin == end) return Cover::kNone;
  if (end - begin < set.count) return Cover::kSome;  // too few to be all of it
  if (!set.list && set.step == 1) return Cover::kAll;
  for (std::int64_t i = 0; i < set.count; ++i) {
    if (!std::binary_search(begin, end, set[i])) return Cover::kSome;
  }
  return Cover::kAll;
}

/// Which of the (at most 64) tokens of `set` are in `tokens`.
inline std::uint64_t members(const TokenList& tokens, const TokenSet& set) {
  std::uint64_t bits = 0;
  for (std::int64_t i = 0; i < set.count; ++i) {
    bits |= static_cast<std::uint64_t>(
                is_among(tokens.data(), static_cast<std::int64_t>(tokens.size()), set[i]))
            << i;
  }
  return bits;
}

inline TokenList intersection(const TokenList& a, const TokenList& b) {
  TokenList both;
  std::set_intersection(a.begin(), a.end(), b.begin(), b.end(), std::back_inserter(both));
  return both;
}

class GlobalKeys final : public Primitive {
 public:
  /// `tokens` ascend without repetition.
  explicit GlobalKeys(TokenList tokens) : tokens_(std::move(tokens)) {}

  bool contains(std::int64_t position, std::int64_t key) const override {
    return rule()(position, key);
  }
  void tile(const TokenSet&, const TokenSet& keys, std::uint64_t* words) const override {
    for (std::int64_t k = 0; k < keys.count; ++k)
      words[k] = contains(0, keys[k]) ? ~std::uint64_t{0} : 0;
  }
  Cover cover(const TokenSet&, const TokenSet& keys) const override {
    return cover_of(tokens_, keys);
  }
  bool signature(const TokenSet&, const TokenSet& keys, Signature& out) const override {
    out.push_back(static_cast<std::int64_t>(members(tokens_, keys)));
    return true;
  }
  PrimitivePtr intersect(const Primitive& other) const override {
    const auto* keys = dynamic_cast<const GlobalKeys*>(&other);
    return keys ? std::make_shared<GlobalKeys>(intersection(tokens_, keys->tokens_)) : nullptr;
  }
  bool includes(const Primitive& other) const override {
    const auto* keys = dynamic_cast<const GlobalKeys*>(&other);
    return keys && std::includes(tokens_.begin(), tokens_.end(), keys->tokens_.begin(),
                                 keys->tokens_.end());
  }
  const TokenList* key_list() const override { return &tokens_; }

  Instruction instruction() const override {
    Instruction step;
    step.kind = Instruction::Kind::kKeys;
    step.keys = rule();
    return step;
  }

 private:
  KeysRule rule() const { return {tokens_.data(), static_cast<std::int64_t>(tokens_.size())}; }

  TokenList tokens_;
};

class GlobalQueries final : public Primitive {
 public:
  explicit GlobalQueries(TokenList tokens) : tokens_(std::move(tokens)) {}

  bool contains(std::int64_t position, std::int64_t key) const override {
    return rule()(position, key);
  }
  void tile(const TokenSet& positions, const TokenSet& keys, std::uint64_t* words) const override {
    std::fill_n(words, keys.count, members(tokens_, positions));
  }
  Cover cover(const TokenSet& positions, const TokenSet&) const override {
    return cover_of(tokens_, positions);
  }
  bool signature(const TokenSet& positions, const TokenSet&, Signature& out) const override {
    out.push_back(static_cast<std::int64_t>(members(tokens_, positions)));
    return true;
  }
  PrimitivePtr intersect(const Primitive& other) const override {
    const auto* queries = dynamic_cast<const GlobalQueries*>(&other);
    return queries ? std::make_shared<GlobalQueries>(intersection(tokens_, queries->tokens_))
                   : nullptr;
  }
  bool includes(const Primitive& other) const override {
    const auto* queries = dynamic_cast<const GlobalQueries*>(&other);
    return queries && std::includes(tokens_.begin(), tokens_.end(), queries->tokens_.begin(),
                                    queries->tokens_.end());
  }
  const TokenList* position_list() const override { return &tokens_; }

  Instruction instruction() const override {
    Instruction step;
    step.kind = Instruction::Kind::kQueries;
    step.queries = rule();
    return step;
  }

 private:
  QueriesRule rule() const { return {tokens_.data(), static_cast<std::int64_t>(tokens_.size())}; }

  TokenList tokens_;
};

}  // namespace sparse_attn
