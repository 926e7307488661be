// A union of terms as one primitive: for global rows, which see a whole pattern, and for products
// too large to multiply out.
#pragma once

#include <algorithm>
#include <utility>

#include "patterns/pattern.h"

namespace sparse_attn {

inline bool contains(const Term& term, std::int64_t position, std::int64_t key) {
  for (const PrimitivePtr& p : term) {
    if (!p->contains(position, key)) return false;
  }
  return true;
}

inline void tile(const Term& term, const TokenSet& positions, const TokenSet& keys,
                 std::uint64_t* words) {
  std::fill_n(words, keys.count, ~std::uint64_t{0});
  for (const PrimitivePtr& p : term) {
    std::uint64_t own[64];
    p->tile(positions, keys, own);
    for (std::int64_t k = 0; k < keys.count; ++k) words[k] &= own[k];
  }
}

inline Cover cover(const Term& term, const TokenSet& positions, const TokenSet& keys) {
  Cover all = Cover::kAll;
  for (const PrimitivePtr& p : term) {
    const Cover c = p->cover(positions, keys);
    if (c == Cover::kNone) return Cover::kNone;
    if (c == Cover::kSome) all = Cover::kSome;
  }
  return all;
}

/// The covers, and the words of those primitives that decide within the tile.
inline bool signature(const Term& term, const TokenSet& positions, const TokenSet& keys,
                      Signature& out) {
  bool repeats = true;
  for (const PrimitivePtr& p : term) {
    const Cover c = p->cover(positions, keys);
    out.push_back(static_cast<std::int64_t>(c));
    if (c == Cover::kSome) repeats = p->signature(positions, keys, out) && repeats;
  }
  return repeats;
}

class UnionOf final : public Primitive {
 public:
  explicit UnionOf(Terms terms) : terms_(std::move(terms)) {}

  bool contains(std::int64_t position, std::int64_t key) const override {
    for (const Term& term : terms_) {
      if (sparse_attn::contains(term, position, key)) return true;
    }
    return false;
  }
  void tile(const TokenSet& positions, const TokenSet& keys, std::uint64_t* words) const override {
    std::fill_n(words, keys.count, std::uint64_t{0});
    for (const Term& term : terms_) {
      if (sparse_attn::cover(term, positions, keys) == Cover::kNone) continue;
      std::uint64_t own[64];
      sparse_attn::tile(term, positions, keys, own);
      for (std::int64_t k = 0; k < keys.count; ++k) words[k] |= own[k];
    }
  }
  Cover cover(const TokenSet& positions, const TokenSet& keys) const override {
    Cover any = Cover::kNone;
    for (const Term& term : terms_) {
      const Cover c = sparse_attn::cover(term, positions, keys);
      if (c == Cover::kAll) return Cover::kAll;
      if (c == Cover::kSome) any = Cover::kSome;
    }
    return any;
  }
  bool signature(const TokenSet& positions, const TokenSet& keys, Signature& out) const override {
    bool repeats = true;
    for (const Term& term : terms_) {
      const bool decides = sparse_attn::cover(term, positions, keys) == Cover::kSome;
      out.push_back(decides);
      if (decides) repeats = sparse_attn::signature(term, positions, keys, out) && repeats;
    }
    return repeats;
  }

 private:
  Terms terms_;
};

}  // namespace sparse_attn
