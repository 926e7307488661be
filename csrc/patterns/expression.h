// The expression that a user wrote, as it crosses the op schema: a short list of integers in prefix
// order.
//
//   kWindow left right dilation
//   kGlobalKeys n (start stop)*n            tokens, as runs [start, stop)
//   kGlobalQueries n (start stop)*n
//   kUnion n expr*n
//   kIntersection n expr*n
//   kPerHead n expr*n                       outermost only
//   kPeriodicKeys period count              the last `count` keys of every `period`
//   kEdgeKeys block first last              the keys of the first and the last blocks
//   kEdgeQueries block first last
//   kBlockWindow block back ahead
//   kCheckerboard block
//   kRadial radius
//   kRandomBlocks count block seed
//   kRandomTokens threshold seed            kept if 32 random bits are below the threshold
//   kBlockLayout block                      takes the next of the pattern's tensors
//   kKeyLists counted                       takes the next one, or two: indices, counts
//   kPart n_q n_k q (start stop)*q k (place start stop)*k b (start stop)*b expr
//                                           outermost only; part.h says what it is
//
// Tokens ascend; negative ones count from the end. Full() is an unbounded window, Causal() one that
// is unbounded to the left; whatever else has a name in Python is a union or an intersection of
// these.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace sparse_attn {

enum class Word : std::int64_t {
  kWindow = 1,
  kGlobalKeys = 2,
  kGlobalQueries = 3,
  kUnion = 4,
  kIntersection = 5,
  kPerHead = 6,
  kPeriodicKeys = 7,
  kEdgeKeys = 8,
  kEdgeQueries = 9,
  kBlockWindow = 10,
  kCheckerboard = 11,
  kRadial = 12,
  kRandomBlocks = 13,
  kRandomTokens = 14,
  kBlockLayout = 15,
  kKeyLists = 16,
  kPart = 17,
};

using Words = std::vector<std::int64_t>;

struct Expression {
  Word word = Word::kUnion;
  std::vector<std::int64_t> values;  // the integers after the word; of tokens: start, stop, ...
  std::vector<Expression> parts;     // of a union, an intersection, a per-head list or a part
  int tensor = 0;                    // the first of its tensors
};

/// Throws std::invalid_argument on anything but one well-formed expression.
Expression parse(const std::int64_t* words, std::int64_t count);

/// The inverse of `parse`.
Words encode(const Expression& expression);

/// How many tensors an elementary pattern takes itself, how many the whole expression does, and the
/// expressions that take them, in order.
int own_tensors(const Expression& elementary);
int tensor_count(const Expression& expression);
std::vector<const Expression*> tensor_users(const Expression& expression);

/// No query sees a later key, whatever the sizes, as far as the form of the expression tells.
bool is_causal(const Expression& expression);

/// What a part is of; the expression itself if it is no part.
const Expression& pattern_of_whole(const Expression& one_head);
/// The same part of another pattern; that pattern if `one_head` is no part.
Expression same_part(const Expression& one_head, Expression pattern);

/// How many keys there must be for `token` to exist; of all tokens named, the one that needs most
/// (0 if there is none); and what to say when there are fewer.
std::int64_t keys_needed(std::int64_t token);
std::int64_t most_demanding_token(const Expression& expression);
std::string token_error(std::int64_t token, std::int64_t n_k);

/// (expression ∪ global rows and columns of `tokens`), ∩ Causal() if the expression is causal:
/// section 1 of the interface.
Expression with_global_tokens(const Expression& expression,
                              const std::vector<std::int64_t>& tokens);

}  // namespace sparse_attn
