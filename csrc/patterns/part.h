// A part of a problem: some queries of a sequence against some of its keys, for whoever holds no
// more of it (context parallelism). The pattern goes by the tokens of the whole sequence; plans and
// kernels number those that are there from 0 on.
#pragma once

#include <cstdint>
#include <vector>

#include "patterns/expand.h"
#include "patterns/expression.h"
#include "whole.h"

namespace sparse_attn {

/// Consecutive tokens of the whole that stand next to each other in the part, from `place` on.
struct TokenRun {
  std::int64_t place;
  std::int64_t token;
  std::int64_t count;
};

/// Ascending in both numberings. Places that no run holds have no token.
using TokenRuns = std::vector<TokenRun>;

/// The last run that begins at or before `number`, a place or a token by what `of` says; end() if
/// none does.
TokenRuns::const_iterator run_of(const TokenRuns& runs, std::int64_t number,
                                 std::int64_t TokenRun::* of);

/// kNoToken where there is none.
std::int64_t token_at(const TokenRuns& runs, std::int64_t place);
std::int64_t place_of(const TokenRuns& runs, std::int64_t token);

struct Part {
  Sizes whole;
  TokenRuns queries;  // without gaps
  TokenRuns keys;
  std::vector<std::int64_t> blind;  // queries of the whole that see nothing here

  /// Throws std::invalid_argument if the runs overlap, descend or leave the sequence.
  explicit Part(const Expression& expression);

  std::vector<std::int64_t> blind_positions() const;
};

/// The whole's token at each of `count` places.
std::vector<std::int64_t> tokens_at(const TokenRuns& runs, std::int64_t count);

/// The sizes that tokens, tensors and global masks of a pattern refer to.
Sizes whole_sizes(const Expression& one_head, Sizes sizes);

}  // namespace sparse_attn
