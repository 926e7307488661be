// The expression that a user wrote, as it crosses the op schema: a short list of integers in prefix
// order.
//
//   kWindow left right dilation
//   kGlobalKeys n (start stop)*n
//   kGlobalQueries n (start stop)*n
//   kUnion n expr*n
//   kIntersection n expr*n
//   kPerHead n expr*n                (outermost only)
//
// Tokens are runs [start, stop) of ascending integers; negative ones count from the end. Full() is
// an unbounded window, Causal() one that is unbounded to the left, Global(t) the union of
// GlobalKeys(t) and GlobalQueries(t).
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "patterns/pattern.h"

namespace sparse_attn {

enum class Word : std::int64_t {
  kWindow = 1,
  kGlobalKeys = 2,
  kGlobalQueries = 3,
  kUnion = 4,
  kIntersection = 5,
  kPerHead = 6,
};

using Words = std::vector<std::int64_t>;

struct Sizes {
  std::int64_t n_q = 0;
  std::int64_t n_k = 0;
  /// Query i stands at position i + offset(): the ends are aligned.
  std::int64_t offset() const { return n_k - n_q; }
  bool operator==(const Sizes& other) const { return n_q == other.n_q && n_k == other.n_k; }
};

struct Expression {
  Word word = Word::kUnion;
  std::vector<std::int64_t>
      values;                     // of a window: left, right, dilation; of tokens: start, stop, ...
  std::vector<Expression> parts;  // of a union, an intersection or a per-head list
};

/// Throws std::invalid_argument on anything but one well-formed expression.
Expression parse(const std::int64_t* words, std::int64_t count);

/// The inverse of `parse`.
Words encode(const Expression& expression);

/// No query sees a later key, whatever the sizes, as far as the form of the expression tells.
bool is_causal(const Expression& expression);

/// How many keys there must be for `token` to exist; of all tokens named, the one that needs most
/// (0 if there is none); and what to say when there are fewer.
std::int64_t keys_needed(std::int64_t token);
std::int64_t most_demanding_token(const Expression& expression);
std::string token_error(std::int64_t token, std::int64_t n_k);

/// The union of intersections that `expression` is for these sizes. Throws std::invalid_argument
/// where a token is out of range.
Terms expand(const Expression& expression, Sizes sizes);

/// (expression ∪ global rows and columns of `tokens`), ∩ Causal() if the expression is causal:
/// section 1 of the interface.
Expression with_global_tokens(const Expression& expression,
                              const std::vector<std::int64_t>& tokens);

}  // namespace sparse_attn
