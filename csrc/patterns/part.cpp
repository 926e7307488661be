#include "patterns/part.h"

#include <algorithm>
#include <stdexcept>
#include <string>

namespace sparse_attn {
namespace {

/// Lists of a plan hold tokens in 32 bits.
constexpr std::int64_t kMostTokens = std::int64_t{1} << 31;

class Numbers {
 public:
  explicit Numbers(const std::vector<std::int64_t>& values) : next_(values.data()) {}
  std::int64_t take() { return *next_++; }

 private:
  const std::int64_t* next_;
};

void check_run(const TokenRuns& before, const TokenRun& run, std::int64_t length) {
  const bool follows = before.empty() || (before.back().place + before.back().count <= run.place &&
                                          before.back().token + before.back().count <= run.token);
  if (run.count > 0 && run.place >= 0 && run.token >= 0 && follows &&
      run.token + run.count <= length && run.place <= kMostTokens) {
    return;
  }
  throw std::invalid_argument("expected the tokens of a part as ascending runs from 0 to " +
                              std::to_string(length) + ", got (" + std::to_string(run.token) +
                              ", " + std::to_string(run.token + run.count) + ")");
}

void check_length(std::int64_t n) {
  if (0 <= n && n <= kMostTokens) return;
  throw std::invalid_argument("expected the lengths of a sequence from 0 to " +
                              std::to_string(kMostTokens) + ", got " + std::to_string(n));
}

/// Places and tokens, one in terms of the other.
std::int64_t renumbered(const TokenRuns& runs, std::int64_t from, std::int64_t TokenRun::* known,
                        std::int64_t TokenRun::* wanted) {
  const auto run = run_of(runs, from, known);
  if (run == runs.end() || from >= (*run).*known + run->count) return kNoToken;
  return (*run).*wanted + from - (*run).*known;
}

}  // namespace

TokenRuns::const_iterator run_of(const TokenRuns& runs, std::int64_t number,
                                 std::int64_t TokenRun::* of) {
  const auto after =
      std::upper_bound(runs.begin(), runs.end(), number,
                       [&](std::int64_t n, const TokenRun& run) { return n < run.*of; });
  return after == runs.begin() ? runs.end() : after - 1;
}

std::int64_t token_at(const TokenRuns& runs, std::int64_t place) {
  return renumbered(runs, place, &TokenRun::place, &TokenRun::token);
}
std::int64_t place_of(const TokenRuns& runs, std::int64_t token) {
  return renumbered(runs, token, &TokenRun::token, &TokenRun::place);
}

Part::Part(const Expression& e) {
  Numbers numbers(e.values);
  whole.n_q = numbers.take();
  whole.n_k = numbers.take();
  check_length(whole.n_q);
  check_length(whole.n_k);
  std::int64_t place = 0;
  for (std::int64_t runs = numbers.take(); runs > 0; --runs) {
    const std::int64_t start = numbers.take(), stop = numbers.take();
    const TokenRun run{place, start, stop - start};
    check_run(queries, run, whole.n_q);
    queries.push_back(run);
    place += run.count;
  }
  for (std::int64_t runs = numbers.take(); runs > 0; --runs) {
    const std::int64_t at = numbers.take(), start = numbers.take(), stop = numbers.take();
    const TokenRun run{at, start, stop - start};
    check_run(keys, run, whole.n_k);
    keys.push_back(run);
  }
  TokenRuns unseeing;
  for (std::int64_t runs = numbers.take(); runs > 0; --runs) {
    const std::int64_t start = numbers.take(), stop = numbers.take();
    const TokenRun run{start, start, stop - start};
    check_run(unseeing, run, whole.n_q);
    unseeing.push_back(run);
    for (std::int64_t query = start; query < stop; ++query) blind.push_back(query);
  }
}

std::vector<std::int64_t> Part::blind_positions() const {
  std::vector<std::int64_t> positions = blind;
  for (std::int64_t& query : positions) query += whole.offset();
  return positions;
}

std::vector<std::int64_t> tokens_at(const TokenRuns& runs, std::int64_t count) {
  std::vector<std::int64_t> tokens(static_cast<std::size_t>(count), kNoToken);
  for (const TokenRun& run : runs) {
    for (std::int64_t i = 0; i < run.count; ++i)
      tokens[static_cast<std::size_t>(run.place + i)] = run.token + i;
  }
  return tokens;
}

Sizes whole_sizes(const Expression& one_head, Sizes sizes) {
  if (one_head.word != Word::kPart) return sizes;
  return {one_head.values[0], one_head.values[1]};
}

}  // namespace sparse_attn
