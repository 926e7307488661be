// Patterns: the words that cross the op schema, and the elementary patterns against their own
// definition.
#include <stdexcept>

#include "check.h"
#include "patterns/block_window.h"
#include "patterns/checkerboard.h"
#include "patterns/layout.h"
#include "patterns/periodic_keys.h"
#include "patterns/random_blocks.h"
#include "patterns/random_tokens.h"
#include "patterns/tokens.h"
#include "patterns/union.h"
#include "patterns/window.h"
#include "random_patterns.h"

namespace {

using namespace sparse_attn;

Expression parsed(const Words& words) {
  return parse(words.data(), static_cast<std::int64_t>(words.size()));
}

void test_round_trip() {
  Random random(1);
  for (int i = 0; i < 2000; ++i) {
    const std::int64_t n = random.between(1, 40);
    Expression expression = random_expression(random, n);
    if (random.chance(20)) expression = {Word::kPerHead, {}, {expression, expression}, 0};
    const Words words = encode(expression);
    CHECK(encode(parsed(words)) == words);
    Words longer = words, shorter = words;
    longer.push_back(0);
    shorter.pop_back();
    CHECK_THROWS(parsed(longer), std::invalid_argument);
    CHECK_THROWS(parsed(shorter), std::invalid_argument);
  }
}

void test_malformed_words() {
  const std::vector<Words> malformed{
      {},
      {0},
      {7},
      {7, 0, 0},     // period
      {8, 0, 1, 1},  // block
      {9, 3, -1, 1},
      {10, 3, 1, -1},
      {11, 0},
      {12, -1},
      {13, -1, 3, 0},
      {13, 1, 0, 0},
      {14, -1, 0},
      {15, 0},
      {16, -1},
      {17},
      {-1},
      {INT64_MAX},
      {1},
      {1, 2, 3},
      {1, -1, 3, 1},
      {1, 1, -3, 1},
      {1, 1, 1, 0},
      {1, 1, 1, -1},
      {1, 1, 1, 1, 1},
      {1, INT64_MIN, 0, 1},
      {2},
      {2, -1},
      {2, 1},
      {2, 1, 0},
      {2, INT64_MAX, 0, 1},
      {2, 1, 3, 3},        // empty run
      {2, 1, 4, 3},        // backward run
      {2, 1, -1, 1},       // across 0
      {2, 2, 4, 5, 1, 2},  // descending runs
      {2, 2, 1, 5, 4, 6},  // overlapping runs
      {3, 1, INT64_MIN, INT64_MIN + 1},
      {3, 1, 0, INT64_MAX},
      {4},
      {4, 0},
      {4, 2, 1, 1, 1, 1},
      {4, -2, 1, 1, 1, 1},
      {5, 0},
      {6, 0},
      {4, 1, 6, 1, 1, 1, 1, 1},  // PerHead inside a union
      {6, 1, 6, 1, 1, 1, 1, 1},  // PerHead inside a PerHead
      {17, 4, 4, 0, 0},
      {17, 4, 4, 0, 0, 0},
      {17, 4, 4, 9, 0, 0, 1, 1, 1, 1},
      {4, 1, 17, 4, 4, 0, 0, 0, 1, 1, 1, 1},               // a part inside a union
      {17, 4, 4, 0, 0, 0, 17, 4, 4, 0, 0, 0, 1, 1, 1, 1},  // a part of a part
  };
  for (const Words& words : malformed) CHECK_THROWS(parsed(words), std::invalid_argument);

  // Parts whose runs are not in the sequence, overlap, or do not fit to the sizes.
  const std::vector<Words> misplaced{
      {-1, 4, 0, 0, 0},
      {4, INT64_MAX, 0, 0, 0},
      {4, 4, 1, 0, 5, 1, 0, 0, 4, 0},
      {4, 4, 1, 3, 3, 1, 0, 0, 4, 0},
      {4, 4, 2, 2, 3, 1, 2, 1, 0, 0, 4, 0},
      {4, 4, 1, 0, 4, 1, -1, 0, 4, 0},
      {4, 4, 1, 0, 4, 2, 0, 0, 2, 1, 2, 4, 0},
      {4, 4, 1, 0, 4, 1, 0, 0, 4, 1, 0, 5},
      {4, 4, 1, 0, 3, 1, 0, 0, 4, 0},
      {4, 4, 1, 0, 4, 1, 1, 0, 4, 0},
  };
  for (Words words : misplaced) {
    words.insert(words.begin(), 17);
    words.insert(words.end(), {1, 1, 1, 1});
    CHECK_THROWS(expand(parsed(words), {4, 4}), std::invalid_argument);
  }

  const auto nested = [](int depth) {
    Words words;
    for (int i = 0; i < depth; ++i) words.insert(words.end(), {4, 1});
    words.insert(words.end(), {1, 1, 1, 1});
    return words;
  };
  CHECK(encode(parsed(nested(60))) == nested(60));
  CHECK_THROWS(parsed(nested(100)), std::invalid_argument);
  CHECK_THROWS(parsed(nested(100000)), std::invalid_argument);
}

/// Whatever the words are, they are a pattern, which can be expanded, or std::invalid_argument.
void test_random_words() {
  Random random(2);
  long patterns = 0;
  for (int i = 0; i < 400000; ++i) {
    Words words(static_cast<std::size_t>(random.between(0, 9)));
    for (std::int64_t& word : words) {
      word = random.chance(90) ? random.between(-1, 14) : static_cast<std::int64_t>(random.word());
    }
    try {
      const Expression expression = parsed(words);
      ++patterns;
      CHECK(encode(expression) == words);
      CHECK(most_demanding_token(expression) >= -kUnbounded);
      expand(expression, {5, 4});
    } catch (const std::invalid_argument&) {
    }
  }
  CHECK(patterns > 1000);
}

/// Ascending tokens, some of them before 0: an arithmetic progression, or a list in `storage`.
TokenSet random_set(Random& random, std::int64_t most_count, TokenList& storage) {
  const std::int64_t count = random.between(1, most_count);
  TokenSet set{random.between(-30, 60), random.chance(40) ? 1 : random.between(1, 12), count,
               nullptr};
  if (random.chance(60)) return set;
  storage.clear();
  for (std::int64_t token = set.start; static_cast<std::int64_t>(storage.size()) < count;
       token += random.between(1, 5)) {
    storage.push_back(token);
  }
  set.list = storage.data();
  return set;
}

/// The same without those before 0: keys.
TokenSet random_keys(Random& random, std::int64_t most_count, TokenList& storage) {
  TokenSet set = random_set(random, std::min<std::int64_t>(most_count, 12), storage);
  const std::int64_t shift = std::max<std::int64_t>(0, -set.first());
  set.start += shift;
  for (std::int64_t& token : storage) token += set.list ? shift : 0;
  return set;
}

constexpr int kKinds = 8;

PrimitivePtr random_primitive(Random& random, int kind) {
  if (kind == 0) {
    const auto side = [&] { return random.chance(20) ? kUnbounded : random.between(0, 40); };
    const std::int64_t dilation = random.chance(40) ? 1 : random.between(2, 9);
    return std::make_shared<Window>(window_reach(side(), dilation), window_reach(side(), dilation),
                                    dilation);
  }
  const std::int64_t block = random.chance(40) ? random.between(1, 3) : random.between(4, 30);
  const auto few = [&] { return random.between(0, 3); };
  switch (kind) {
    case 3:
      return std::make_shared<PeriodicKeys>(block, random.between(1, block), 150);
    case 4:
      return std::make_shared<BlockWindow>(block, few(), few());
    case 5:
      return std::make_shared<Checkerboard>(block);
    case 6:
      return std::make_shared<RandomBlocks>(random.between(1, 40), block + 3, random.word(), -30,
                                            1100);
    case 7:
      return std::make_shared<RandomTokens>(std::int64_t{1} << random.between(28, 32),
                                            random.word());
    default:
      break;
  }
  TokenList tokens;
  const int density = static_cast<int>(random.between(2, 98));
  for (std::int64_t token = 0; token < 150; ++token) {
    if (random.chance(density)) tokens.push_back(token);
  }
  if (kind == 1) return std::make_shared<GlobalKeys>(tokens);
  return std::make_shared<GlobalQueries>(tokens);
}

/// cover() and tile() promise what contains() says.
void check_against_definition(const Primitive& primitive, const TokenSet& positions,
                              const TokenSet& keys) {
  const bool fits = positions.count <= 64 && keys.count <= 64;
  std::vector<std::uint64_t> words(static_cast<std::size_t>(keys.count));
  if (fits) primitive.tile(positions, keys, words.data());
  std::int64_t allowed = 0;
  for (std::int64_t k = 0; k < keys.count; ++k) {
    std::uint64_t expected = 0;
    for (std::int64_t p = 0; p < positions.count; ++p) {
      const bool sees = primitive.contains(positions[p], keys[k]);
      allowed += sees;
      if (p < 64) expected |= static_cast<std::uint64_t>(sees) << p;
    }
    if (!fits) continue;
    const std::uint64_t valid = ~std::uint64_t{0} >> (64 - positions.count);
    CHECK_EQUAL(words[static_cast<std::size_t>(k)] & valid, expected);
  }
  const Cover cover = primitive.cover(positions, keys);
  if (cover == Cover::kNone) CHECK_EQUAL(allowed, 0);
  if (cover == Cover::kAll) CHECK_EQUAL(allowed, positions.count * keys.count);
}

void test_covers() {
  Random random(3);
  int covers[kKinds][3] = {};
  TokenList position_storage, key_storage;
  for (int i = 0; i < 80000; ++i) {
    const int kind = i % kKinds;
    const PrimitivePtr primitive = random_primitive(random, kind);
    const std::int64_t most = random.chance(20) ? 80 : random.chance(50) ? 3 : 12;
    const TokenSet positions = random_set(random, most, position_storage);
    const TokenSet keys = random_keys(random, most, key_storage);
    check_against_definition(*primitive, positions, keys);
    ++covers[kind][static_cast<int>(primitive->cover(positions, keys))];
  }
  for (int kind = 0; kind < kKinds; ++kind) {
    const bool scattered = kind == 7;  // single pairs at random: no cover is known
    for (const int times : covers[kind])
      CHECK(scattered || times > 50);  // each answer was really given
  }
}

/// kSome is always allowed, but where a tile is wholly in or out, saying so saves work.
void test_covers_are_sharp() {
  const Window band(6, 6, 1), dilated(6, 6, 3);
  const auto run = [](std::int64_t start, std::int64_t count, std::int64_t step = 1) {
    return TokenSet{start, step, count, nullptr};
  };
  CHECK(band.cover(run(10, 4), run(10, 4)) == Cover::kAll);
  CHECK(band.cover(run(10, 4), run(20, 4)) == Cover::kNone);
  CHECK(band.cover(run(10, 4), run(14, 4)) == Cover::kSome);
  CHECK(dilated.cover(run(12, 3, 3), run(12, 3, 3)) == Cover::kAll);
  CHECK(dilated.cover(run(12, 3, 3), run(13, 3, 3)) == Cover::kNone);
  CHECK(dilated.cover(run(12, 3, 3), run(15, 3, 3)) == Cover::kSome);
  const GlobalKeys keys({3, 4, 5});
  CHECK(keys.cover(run(0, 9), run(3, 3)) == Cover::kAll);
  CHECK(keys.cover(run(0, 9), run(6, 3)) == Cover::kNone);
  CHECK(keys.cover(run(0, 9), run(5, 3)) == Cover::kSome);
}

/// What two primitives say of each other, pair by pair.
void test_intersect_and_includes() {
  Random random(4);
  int folded = 0, included = 0;
  for (int i = 0; i < 12000; ++i) {
    const PrimitivePtr a =
        random_primitive(random, static_cast<int>(random.between(0, kKinds - 1)));
    PrimitivePtr b = random_primitive(random, static_cast<int>(random.between(0, kKinds - 1)));
    if (const PrimitivePtr part = a->intersect(*b); part && random.chance(30)) b = part;
    const PrimitivePtr both = a->intersect(*b);
    const bool includes = a->includes(*b);
    CHECK(a->includes(*a));
    folded += both != nullptr;
    if (both) CHECK(a->includes(*both) && b->includes(*both));
    included += includes;
    for (int pair = 0; pair < 60; ++pair) {
      const std::int64_t position = random.between(-20, 149), key = random.between(0, 149);
      const bool in_a = a->contains(position, key), in_b = b->contains(position, key);
      if (both) CHECK_EQUAL(both->contains(position, key), in_a && in_b);
      if (includes && in_b) CHECK(in_a);
    }
  }
  CHECK(folded > 200);
  CHECK(included > 50);

  // The common step of two large dilations does not overflow.
  const Window huge(kUnbounded, kUnbounded, kUnbounded - 1),
      other(kUnbounded, kUnbounded, kUnbounded - 2);
  const PrimitivePtr both = huge.intersect(other);
  CHECK(both->contains(5, 5));
  CHECK(!both->contains(5, 6));
}

/// A union as one primitive: cover, tile and contains of random terms.
void test_unions() {
  Random random(5);
  TokenList position_storage, key_storage;
  for (int i = 0; i < 4000; ++i) {
    Terms terms(static_cast<std::size_t>(random.between(0, 3)));
    for (Term& term : terms) {
      for (std::int64_t p = random.between(0, 2); p > 0; --p)
        term.push_back(random_primitive(random, static_cast<int>(random.between(0, kKinds - 1))));
    }
    const TokenSet positions = random_set(random, 12, position_storage);
    const TokenSet keys = random_keys(random, 12, key_storage);
    const UnionOf whole(terms);
    check_against_definition(whole, positions, keys);
    for (std::int64_t k = 0; k < keys.count; ++k) {
      const bool expected = std::any_of(terms.begin(), terms.end(), [&](const Term& term) {
        return std::all_of(term.begin(), term.end(), [&](const PrimitivePtr& p) {
          return p->contains(positions[0], keys[k]);
        });
      });
      CHECK_EQUAL(whole.contains(positions[0], keys[k]), expected);
    }
  }
}

void test_expand_is_the_definition() {
  Random random(6);
  for (int i = 0; i < 1500; ++i) {
    const Sizes sizes = random_sizes(random, 30);
    const Expression expression = random.chance(5) ? random_large_product(random, sizes.n_k)
                                                   : random_expression(random, sizes.n_k);
    check::context = to_string(expression, sizes);
    const UnionOf expanded(expand(expression, sizes));
    for (std::int64_t q = 0; q < sizes.n_q; ++q) {
      for (std::int64_t k = 0; k < sizes.n_k; ++k) {
        CHECK_EQUAL(expanded.contains(q + sizes.offset(), k), sees(expression, sizes, q, k));
      }
    }
  }
  check::context.clear();
}

void test_tokens_out_of_range() {
  CHECK_EQUAL(keys_needed(0), 1);
  CHECK_EQUAL(keys_needed(-1), 1);
  CHECK_EQUAL(keys_needed(-5), 5);
  CHECK_EQUAL(most_demanding_token(any_of({global_keys({-3, -2, 0, 2}), global_queries({4, 9})})),
              8);
  CHECK_EQUAL(most_demanding_token(any_of({global_keys({-30, -2}), global_queries({4, 9})})), -30);
  CHECK_EQUAL(most_demanding_token(window(3, 3)), 0);
  CHECK(!expand(global_keys({-4, -3, 3, 4}), {9, 4}).empty());
  CHECK_THROWS(expand(global_keys({-5, -3}), {9, 4}), std::invalid_argument);
  CHECK_THROWS(expand(global_queries({3, 5}), {9, 4}), std::invalid_argument);
  CHECK_THROWS(expand(global_queries({0, kUnbounded - 1}), {9, 4}), std::invalid_argument);
  CHECK_THROWS(expand({Word::kPerHead, {}, {window(1, 1)}, 0}, {9, 4}), std::invalid_argument);
}

/// A pattern that calls itself causal shows no later key; the forms that should, do.
void test_is_causal() {
  CHECK(is_causal(causal()));
  CHECK(is_causal(window(5, 0, 3)));
  CHECK(!is_causal(window(5, 1)));
  CHECK(!is_causal(full()));
  CHECK(!is_causal(global_keys({0, 1})));
  CHECK(!is_causal(any_of({causal(), global_keys({0, 1})})));
  CHECK(is_causal(all_of({causal(), global_keys({0, 1})})));
  CHECK(is_causal(any_of({window(2, 0), all_of({full(), causal()})})));
  CHECK(is_causal({Word::kPerHead, {}, {window(2, 0), causal()}, 0}));
  CHECK(!is_causal({Word::kPerHead, {}, {window(2, 0), full()}, 0}));
  Random random(7);
  for (int i = 0; i < 1000; ++i) {
    const Sizes sizes = random_sizes(random, 20);
    const Expression expression = random_expression(random, sizes.n_k);
    if (!is_causal(expression)) continue;
    for (std::int64_t q = 0; q < sizes.n_q; ++q) {
      for (std::int64_t k = q + sizes.offset() + 1; k < sizes.n_k; ++k) {
        if (k >= 0) CHECK(!sees(expression, sizes, q, k));
      }
    }
  }
}

void test_with_global_tokens() {
  Random random(8);
  for (int i = 0; i < 500; ++i) {
    const Sizes sizes = random_sizes(random, 20);
    const Expression expression = random_expression(random, sizes.n_k);
    std::vector<std::int64_t> tokens;
    for (std::int64_t t = 0; t < sizes.n_k; ++t) {
      if (random.chance(20)) tokens.push_back(t);
    }
    const Expression extended = with_global_tokens(expression, tokens);
    CHECK(encode(parsed(encode(extended))) == encode(extended));
    const auto is_global = [&](std::int64_t token) {
      return std::find(tokens.begin(), tokens.end(), token) != tokens.end();
    };
    for (std::int64_t q = 0; q < sizes.n_q; ++q) {
      const std::int64_t position = q + sizes.offset();
      for (std::int64_t k = 0; k < sizes.n_k; ++k) {
        const bool in_time = !is_causal(expression) || k <= position;
        const bool expected =
            sees(expression, sizes, q, k) || (in_time && (is_global(position) || is_global(k)));
        CHECK_EQUAL(sees(extended, sizes, q, k), expected);
      }
    }
  }
}

/// The test vectors of Random123, whose counters and keys the library fills in part only.
void test_philox() {
  const auto words = [](std::uint64_t seed, std::uint32_t a, std::uint32_t b,
                        std::uint32_t stream) {
    return philox(seed, a, b, static_cast<Stream>(stream));
  };
  const Random4 zero = words(0, 0, 0, 0);
  CHECK(zero.word[0] == 0x6627e8d5 && zero.word[1] == 0xe169c58d);
  CHECK(zero.word[2] == 0xbc57ac4c && zero.word[3] == 0x9b00dbd8);
  CHECK(words(0, 0, 0, 1).word[0] != words(0, 0, 0, 2).word[0]);
  CHECK_EQUAL(below({{~0u, ~0u, 0, 0}}, 10), 9);
  CHECK_EQUAL(below({{~0u, 0, 0, 0}}, 10), 0);
}

/// A layout and a mask, of raw rows.
void test_layouts() {
  Random random(9);
  TokenList position_storage, key_storage;
  int covers[3] = {};
  for (int i = 0; i < 5000; ++i) {
    const std::int64_t block = random.between(1, 5), rows = 14, columns = 30;
    const int density = random.pick<int>({5, 50, 95});
    std::vector<std::uint8_t> layout(static_cast<std::size_t>(rows * columns));
    for (std::uint8_t& byte : layout) byte = random.chance(density);
    const std::int64_t offset = random.between(-20, 20);
    const BlockLayout pattern(layout.data(), columns, block, offset);
    const TokenSet positions{offset + random.between(0, 3), random.between(1, 2),
                             random.between(1, std::min<std::int64_t>(5, 4 * block)), nullptr};
    TokenSet keys = random_keys(random, 4, key_storage);
    if (positions.last() - offset >= rows * block || keys.last() >= columns * block) continue;
    check_against_definition(pattern, positions, keys);
    ++covers[static_cast<int>(pattern.cover(positions, keys))];
    const std::int64_t row = (positions[0] - offset) / block, column = keys[0] / block;
    CHECK_EQUAL(pattern.contains(positions[0], keys[0]),
                layout[static_cast<std::size_t>(row * columns + column)] != 0);
  }
  for (const int times : covers) CHECK(times > 100);
}

}  // namespace

int main() {
  test_philox();
  test_layouts();
  test_round_trip();
  test_malformed_words();
  test_random_words();
  test_covers();
  test_covers_are_sharp();
  test_intersect_and_includes();
  test_unions();
  test_expand_is_the_definition();
  test_tokens_out_of_range();
  test_is_causal();
  test_with_global_tokens();
  return check::report();
}
