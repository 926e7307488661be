// What a pattern is: a set of (position, key) pairs, with just enough structure to be planned
// without a dense mask.
#pragma once

#include <cstdint>
#include <memory>
#include <stdexcept>
#include <vector>

#include "patterns/instruction.h"

namespace sparse_attn {

/// Tokens in ascending order: an arithmetic progression, or a list.
struct TokenSet {
  std::int64_t start = 0;
  std::int64_t step = 1;
  std::int64_t count = 0;
  const std::int64_t* list = nullptr;

  std::int64_t operator[](std::int64_t i) const { return list ? list[i] : start + step * i; }
  std::int64_t first() const { return (*this)[0]; }
  std::int64_t last() const { return (*this)[count - 1]; }
};

/// How much of rows x keys a pattern allows. kSome promises nothing; the others are exact.
enum class Cover { kNone, kSome, kAll };

inline Cover complement(Cover c) {
  return c == Cover::kNone ? Cover::kAll : c == Cover::kAll ? Cover::kNone : Cover::kSome;
}

/// Words that determine the element mask of a tile: equal words, equal mask.
using Signature = std::vector<std::int64_t>;

/// Appends the tokens of `set` relative to `origin`.
inline void describe(const TokenSet& set, std::int64_t origin, Signature& out) {
  if (!set.list) {
    out.insert(out.end(), {set.start - origin, set.step, set.count});
    return;
  }
  for (std::int64_t i = 0; i < set.count; ++i) out.push_back(set.list[i] - origin);
}

/// Keys for each of a number of rows: those of row i are keys[starts[i]], ..., keys[starts[i + 1] -
/// 1]. Empty `starts` stand for rows without keys.
struct Lists {
  std::vector<std::int64_t> starts;
  std::vector<std::int32_t> keys;
};

class Primitive;
using PrimitivePtr = std::shared_ptr<const Primitive>;

/// One elementary pattern. Rows are given as positions: query i stands at position i + n_k - n_q.
class Primitive {
 public:
  virtual ~Primitive() = default;

  /// The definition.
  virtual bool contains(std::int64_t position, std::int64_t key) const = 0;
  /// The same for a tile of at most 64 x 64: bit r of words[k] is set when positions[r] sees
  /// keys[k]. Bits beyond the positions may be anything.
  virtual void tile(const TokenSet& positions, const TokenSet& keys,
                    std::uint64_t* words) const = 0;
  virtual Cover cover(const TokenSet& positions, const TokenSet& keys) const = 0;
  /// False if no other tile is likely to have the same mask: `out` is then of no use.
  virtual bool signature(const TokenSet& positions, const TokenSet& keys, Signature& out) const = 0;

  /// The one primitive equal to this ∩ other, or null.
  virtual PrimitivePtr intersect(const Primitive&) const { return nullptr; }
  /// True only if every pair of `other` is a pair of this one.
  virtual bool includes(const Primitive& other) const { return this == &other; }

  /// The order in which its tiles are dense: residue classes modulo `step`, blocks of `block`
  /// tokens (0 = none), listed keys or positions, or lists of keys of its own for each query.
  virtual std::int64_t step() const { return 1; }
  virtual std::int64_t block() const { return 0; }
  virtual const std::vector<std::int64_t>* key_list() const { return nullptr; }
  virtual const std::vector<std::int64_t>* position_list() const { return nullptr; }
  virtual std::shared_ptr<const Lists> lists() const { return nullptr; }

  /// Its rule for kernels. What reads tensors, and unions, have none: program.cpp writes theirs.
  virtual Instruction instruction() const {
    throw std::logic_error("expected an elementary pattern without tensors");
  }
};

/// Derives tile() from a pattern's inlined `contains`.
template <class Derived>
class PrimitiveBase : public Primitive {
 public:
  void tile(const TokenSet& positions, const TokenSet& keys, std::uint64_t* words) const override {
    const auto& self = static_cast<const Derived&>(*this);
    for (std::int64_t k = 0; k < keys.count; ++k) {
      const std::int64_t key = keys[k];
      std::uint64_t bits = 0;
      for (std::int64_t r = 0; r < positions.count; ++r) {
        bits |= static_cast<std::uint64_t>(self.Derived::contains(positions[r], key)) << r;
      }
      words[k] = bits;
    }
  }
};

/// An intersection of primitives; of none, it allows everything.
using Term = std::vector<PrimitivePtr>;
/// A pattern in disjunctive normal form: a union of terms; of none, it allows nothing.
using Terms = std::vector<Term>;

}  // namespace sparse_attn
