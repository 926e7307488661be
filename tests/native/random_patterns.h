// Random patterns and sizes, and the definition of a pattern written a second time, pair by pair.
#pragma once

#include <algorithm>
#include <cstdint>
#include <random>
#include <set>
#include <string>
#include <vector>

#include "patterns/expand.h"
#include "patterns/window.h"
#include "philox.h"

/// Numbers that are the same on every platform.
class Random {
 public:
  explicit Random(std::uint64_t seed) : engine_(seed) {}

  std::uint64_t word() { return engine_(); }
  std::int64_t between(std::int64_t least, std::int64_t most) {
    return least + static_cast<std::int64_t>(word() % static_cast<std::uint64_t>(most - least + 1));
  }
  bool chance(int percent) { return between(1, 100) <= percent; }
  /// In [-1, 1).
  double real() { return static_cast<double>(word() >> 11) * 0x1p-52 - 1.0; }
  template <class T>
  T pick(const std::vector<T>& choices) {
    return choices[static_cast<std::size_t>(
        between(0, static_cast<std::int64_t>(choices.size()) - 1))];
  }

 private:
  std::mt19937_64 engine_;
};

inline sparse_attn::Expression window(std::int64_t left, std::int64_t right,
                                      std::int64_t dilation = 1) {
  return {sparse_attn::Word::kWindow, {left, right, dilation}, {}, 0};
}

/// Runs (start, stop) of tokens.
inline sparse_attn::Expression global_keys(std::vector<std::int64_t> runs) {
  return {sparse_attn::Word::kGlobalKeys, std::move(runs), {}, 0};
}

inline sparse_attn::Expression global_queries(std::vector<std::int64_t> runs) {
  return {sparse_attn::Word::kGlobalQueries, std::move(runs), {}, 0};
}

inline sparse_attn::Expression any_of(std::vector<sparse_attn::Expression> parts) {
  return {sparse_attn::Word::kUnion, {}, std::move(parts), 0};
}

inline sparse_attn::Expression all_of(std::vector<sparse_attn::Expression> parts) {
  return {sparse_attn::Word::kIntersection, {}, std::move(parts), 0};
}

inline sparse_attn::Expression full() {
  return window(sparse_attn::kUnbounded, sparse_attn::kUnbounded);
}

inline sparse_attn::Expression causal() { return window(sparse_attn::kUnbounded, 0); }

inline sparse_attn::Expression random_window(Random& random, std::int64_t n) {
  const auto side = [&]() -> std::int64_t {
    if (random.chance(10)) return random.chance(50) ? sparse_attn::kUnbounded : INT64_MAX;
    return random.between(0, random.chance(60) ? std::min<std::int64_t>(n, 12) : n + 3);
  };
  const std::int64_t left = side(), right = random.chance(30) ? 0 : side();
  std::int64_t dilation = 1;
  if (random.chance(45)) dilation = random.between(2, 6);
  if (random.chance(8)) dilation = random.between(1, n + 10);
  if (random.chance(2)) dilation = INT64_MAX - random.between(0, 3);
  return window(left, right, dilation);
}

/// Ascending runs, the negative ones first.
inline std::vector<std::int64_t> random_runs(Random& random, std::int64_t n) {
  std::vector<std::int64_t> runs;
  const std::int64_t most_gap = random.chance(20) ? 3 : n;
  for (const std::int64_t least : {-n, std::int64_t{0}}) {
    std::int64_t at = least;
    while (random.chance(60)) {
      const std::int64_t start = at + random.between(0, most_gap);
      const std::int64_t stop = start + random.between(1, 3);
      if (stop > least + n) break;
      runs.insert(runs.end(), {start, stop});
      at = stop;
    }
  }
  return runs;
}

/// Periods, edges, blocks and random pairs.
inline sparse_attn::Expression random_blocks_or_tokens(Random& random, std::int64_t n) {
  using sparse_attn::Word;
  const std::int64_t block = random.chance(30) ? random.between(1, n + 5) : random.between(1, 9);
  const auto few = [&] { return random.between(0, 3); };
  const auto seed = static_cast<std::int64_t>(random.word());
  switch (random.between(1, 8)) {
    case 1:
      return {Word::kPeriodicKeys, {block, random.between(0, block + 1)}, {}, 0};
    case 2:
      return {Word::kEdgeKeys, {block, few(), few()}, {}, 0};
    case 3:
      return {Word::kEdgeQueries, {block, few(), few()}, {}, 0};
    case 4:
      return {Word::kBlockWindow, {block, few(), few()}, {}, 0};
    case 5:
      return {Word::kCheckerboard, {random.chance(40) ? 1 : block}, {}, 0};
    case 6:
      return {Word::kRadial, {few()}, {}, 0};
    case 7:
      return {Word::kRandomBlocks, {few(), block, seed}, {}, 0};
    default: {
      const std::int64_t percent = random.pick<std::int64_t>({0, 2, 10, 50, 100});
      return {Word::kRandomTokens, {(std::int64_t{1} << 32) * percent / 100, seed}, {}, 0};
    }
  }
}

inline sparse_attn::Expression random_expression(Random& random, std::int64_t n_k, int depth = 3) {
  const std::int64_t kind = random.between(1, depth > 0 ? 10 : 5);
  if (random.chance(25)) return random_blocks_or_tokens(random, n_k);
  if (kind == 1) return global_keys(random_runs(random, n_k));
  if (kind == 2) return global_queries(random_runs(random, n_k));
  if (kind <= 5) return random_window(random, n_k);
  std::vector<sparse_attn::Expression> parts;
  for (std::int64_t i = random.between(1, 3); i > 0; --i)
    parts.push_back(random_expression(random, n_k, depth - 1));
  return kind <= 8 ? any_of(std::move(parts)) : all_of(std::move(parts));
}

/// An intersection of two unions with more terms than are multiplied out.
inline sparse_attn::Expression random_large_product(Random& random, std::int64_t n_k) {
  const auto one = [&] {
    std::vector<sparse_attn::Expression> parts;
    for (std::int64_t i = 0; i < 9; ++i) {
      parts.push_back(random.chance(30) ? random_expression(random, n_k, 0)
                                        : window(3 * i, 9 - i, i + 1));
    }
    return any_of(std::move(parts));
  };
  return all_of({one(), one()});
}

inline sparse_attn::Sizes random_sizes(Random& random, std::int64_t most) {
  const std::int64_t n_k = random.between(1, most);
  return {random.chance(50) ? n_k : random.between(1, most), n_k};
}

inline std::string to_string(const sparse_attn::Expression& expression, sparse_attn::Sizes sizes) {
  std::string text;
  for (const std::int64_t word : sparse_attn::encode(expression))
    text += std::to_string(word) + " ";
  return text + "for " + std::to_string(sizes.n_q) + " x " + std::to_string(sizes.n_k);
}

/// Floyd's sample of `count` of `blocks` numbers, as a set.
inline std::set<std::int64_t> drawn_blocks(std::int64_t count, std::int64_t blocks,
                                           std::uint64_t seed, std::int64_t row) {
  std::set<std::int64_t> drawn;
  count = std::min(count, blocks);
  for (std::int64_t t = blocks - count; t < blocks; ++t) {
    const auto draw = static_cast<std::uint32_t>(t - (blocks - count));
    const sparse_attn::Random4 random = sparse_attn::philox(
        seed, draw, static_cast<std::uint32_t>(row), sparse_attn::Stream::kBlocks);
    if (!drawn.insert(sparse_attn::below(random, t + 1)).second) drawn.insert(t);
  }
  return drawn;
}

/// Whether a distance is in a radial pattern: within the radius, or a multiple of 2^k in octave k.
inline bool radial_distance(std::int64_t radius, std::int64_t distance) {
  if (distance <= radius) return true;
  for (std::int64_t step = 2; radius > 0; step *= 2) {
    if (distance <= radius * step) return distance % step == 0;
  }
  return false;
}

/// Whether query i sees key j: the documented meaning, with no help from the library's patterns.
inline bool sees(const sparse_attn::Expression& expression, sparse_attn::Sizes sizes,
                 std::int64_t i, std::int64_t j) {
  using sparse_attn::Word;
  const std::int64_t position = i + sizes.n_k - sizes.n_q;
  const auto& values = expression.values;
  const auto named = [&](std::int64_t token) {
    for (std::size_t r = 0; r < values.size(); r += 2) {
      for (std::int64_t t = values[r]; t < values[r + 1]; ++t) {
        if ((t < 0 ? t + sizes.n_k : t) == token) return true;
      }
    }
    return false;
  };
  const auto part_sees = [&](const sparse_attn::Expression& part) {
    return sees(part, sizes, i, j);
  };
  const auto block_of = [&](std::int64_t token) { return token / values[0]; };
  const auto at_edge = [&](std::int64_t token) {
    const std::int64_t blocks = (sizes.n_k + values[0] - 1) / values[0];
    return token >= 0 && (block_of(token) < values[1] || block_of(token) >= blocks - values[2]);
  };
  switch (expression.word) {
    case Word::kPeriodicKeys:
      return j % values[0] >= values[0] - values[1];
    case Word::kEdgeKeys:
      return at_edge(j);
    case Word::kEdgeQueries:
      return at_edge(position);
    case Word::kBlockWindow:
      return position >= 0 && block_of(j) >= block_of(position) - values[1] &&
             block_of(j) <= block_of(position) + values[2];
    case Word::kCheckerboard:
      return position >= 0 && (block_of(position) + block_of(j)) % 2 == 0;
    case Word::kRadial:
      return radial_distance(values[0], std::abs(position - j));
    case Word::kRandomBlocks: {
      const std::int64_t block = values[1], blocks = (sizes.n_k + block - 1) / block;
      return position >= 0 && drawn_blocks(values[0], blocks, static_cast<std::uint64_t>(values[2]),
                                           position / block)
                                      .count(j / block) > 0;
    }
    case Word::kRandomTokens: {
      const sparse_attn::Random4 random = sparse_attn::philox(
          static_cast<std::uint64_t>(values[1]), static_cast<std::uint32_t>(j / 4),
          static_cast<std::uint32_t>(position), sparse_attn::Stream::kTokens);
      return random.word[j % 4] < values[0];
    }
    case Word::kWindow: {
      const std::int64_t steps = (j - position) / values[2];
      return steps * values[2] == j - position && -values[0] <= steps && steps <= values[1];
    }
    case Word::kGlobalKeys:
      return named(j);
    case Word::kGlobalQueries:
      return named(position);
    case Word::kUnion:
      return std::any_of(expression.parts.begin(), expression.parts.end(), part_sees);
    case Word::kIntersection:
      return std::all_of(expression.parts.begin(), expression.parts.end(), part_sees);
    default:
      return false;
  }
}

/// sees() for all pairs, row by row.
inline std::vector<char> dense(const sparse_attn::Expression& expression,
                               sparse_attn::Sizes sizes) {
  std::vector<char> pairs;
  for (std::int64_t i = 0; i < sizes.n_q; ++i) {
    for (std::int64_t j = 0; j < sizes.n_k; ++j) pairs.push_back(sees(expression, sizes, i, j));
  }
  return pairs;
}
