// A union of terms as one primitive: for global rows, which see a whole pattern, and for products
// too large to multiply out.
#pragma once

#include <utility>

#include "patterns/pattern.h"

namespace sparse_attn {

inline bool contains(const Term& term, std::int64_t position, std::int64_t key) {
  for (const PrimitivePtr& p : term) {
    if (!p->contains(position, key)) return false;
  }
  return true;
}

inline std::uint64_t row_bits(const Term& term, const TokenSet& positions, std::int64_t key) {
  std::uint64_t bits = ~std::uint64_t{0};
  for (const PrimitivePtr& p : term) bits &= p->row_bits(positions, key);
  return bits;
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
inline void signature(const Term& term, const TokenSet& positions, const TokenSet& keys,
                      Signature& out) {
  for (const PrimitivePtr& p : term) {
    const Cover c = p->cover(positions, keys);
    out.push_back(static_cast<std::int64_t>(c));
    if (c == Cover::kSome) p->signature(positions, keys, out);
  }
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
  std::uint64_t row_bits(const TokenSet& positions, std::int64_t key) const override {
    std::uint64_t bits = 0;
    for (const Term& term : terms_) bits |= sparse_attn::row_bits(term, positions, key);
    return bits;
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
  void signature(const TokenSet& positions, const TokenSet& keys, Signature& out) const override {
    for (const Term& term : terms_) sparse_attn::signature(term, positions, keys, out);
  }

 private:
  Terms terms_;
};

}  // namespace sparse_attn
