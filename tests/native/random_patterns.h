// Random patterns and sizes, and the definition of a pattern written a second time, pair by pair.
#pragma once

#include <algorithm>
#include <cstdint>
#include <random>
#include <string>
#include <vector>

#include "patterns/expression.h"
#include "patterns/window.h"

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
  return {sparse_attn::Word::kWindow, {left, right, dilation}, {}};
}

/// Runs (start, stop) of tokens.
inline sparse_attn::Expression global_keys(std::vector<std::int64_t> runs) {
  return {sparse_attn::Word::kGlobalKeys, std::move(runs), {}};
}

inline sparse_attn::Expression global_queries(std::vector<std::int64_t> runs) {
  return {sparse_attn::Word::kGlobalQueries, std::move(runs), {}};
}

inline sparse_attn::Expression any_of(std::vector<sparse_attn::Expression> parts) {
  return {sparse_attn::Word::kUnion, {}, std::move(parts)};
}

inline sparse_attn::Expression all_of(std::vector<sparse_attn::Expression> parts) {
  return {sparse_attn::Word::kIntersection, {}, std::move(parts)};
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

inline sparse_attn::Expression random_expression(Random& random, std::int64_t n_k, int depth = 3) {
  const std::int64_t kind = random.between(1, depth > 0 ? 10 : 5);
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

/// Whether query i sees key j: the documented meaning, with no help from the library.
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
  switch (expression.word) {
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
