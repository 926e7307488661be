// The parts of a pattern, each with the order of tokens that makes it dense, and what a part allows
// that the parts before it do not.
#pragma once

#include <algorithm>
#include <map>
#include <vector>

#include "patterns/tokens.h"
#include "patterns/union.h"

namespace sparse_attn {

/// A primitive of listed keys, and what else its term asks for.
struct Gather {
  PrimitivePtr keys;
  Term rest;
};

struct Parts {
  explicit Parts(const Terms& terms);

  TokenList positions;                    // global queries: rows of their own
  std::vector<Gather> gathers;            // listed keys: tiles of their own
  std::map<std::int64_t, Terms> ordered;  // by step, 1 = the natural order: a pass for each
  Terms of_lists;                         // terms that bring lists of keys along

  /// Gathers, orders and lists, in the order in which they claim pairs.
  Terms layers() const;

 private:
  void add(const Term& term);
  void add_gather(Gather gather);
};

/// A term without the pairs of earlier ones.
struct Layer {
  const Term& term;
  const Term* earlier;
  std::size_t earlier_count;

  Cover cover(const TokenSet& positions, const TokenSet& keys) const {
    Cover c = sparse_attn::cover(term, positions, keys);
    for (std::size_t i = 0; i < earlier_count && c != Cover::kNone; ++i) {
      const Cover other = complement(sparse_attn::cover(earlier[i], positions, keys));
      if (other != Cover::kAll) c = other;
    }
    return c;
  }

  /// Begins with the layer itself (listed rows have one of their own), whose parameters the words
  /// leave out.
  bool signature(const TokenSet& positions, const TokenSet& keys, Signature& out) const {
    out.push_back(positions.list ? -1 : static_cast<std::int64_t>(earlier_count));
    out.push_back(positions.count);
    out.push_back(keys.count);
    bool repeats = sparse_attn::signature(term, positions, keys, out);
    for (std::size_t i = 0; i < earlier_count; ++i) {
      const bool decides = sparse_attn::cover(earlier[i], positions, keys) == Cover::kSome;
      out.push_back(decides);
      if (decides) repeats = sparse_attn::signature(earlier[i], positions, keys, out) && repeats;
    }
    return repeats;
  }

  void tile(const TokenSet& positions, const TokenSet& keys, std::uint64_t* mask) const {
    sparse_attn::tile(term, positions, keys, mask);
    for (std::size_t i = 0; i < earlier_count; ++i) {
      if (sparse_attn::cover(earlier[i], positions, keys) == Cover::kNone) continue;
      std::uint64_t other[64];
      sparse_attn::tile(earlier[i], positions, keys, other);
      for (std::int64_t k = 0; k < keys.count; ++k) mask[k] &= ~other[k];
    }
  }

  bool contains(std::int64_t position, std::int64_t key) const {
    return sparse_attn::contains(term, position, key) &&
           std::none_of(earlier, earlier + earlier_count, [&](const Term& other) {
             return sparse_attn::contains(other, position, key);
           });
  }
};

}  // namespace sparse_attn
