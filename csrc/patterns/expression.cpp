#include "patterns/expression.h"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "patterns/tokens.h"
#include "patterns/union.h"
#include "patterns/window.h"

namespace sparse_attn {
namespace {

/// An intersection of unions is multiplied out up to here; beyond it the unions stay whole and are
/// tiled in natural order.
constexpr std::size_t kMaxTerms = 64;
constexpr int kMaxDepth = 64;

[[noreturn]] void fail(const std::string& message) { throw std::invalid_argument(message); }

class Parser {
 public:
  Parser(const std::int64_t* words, std::int64_t count) : next_(words), end_(words + count) {}

  Expression whole() {
    Expression expression = one(0);
    if (next_ != end_)
      fail("expected one pattern, got " + std::to_string(end_ - next_) + " more integers after it");
    return expression;
  }

 private:
  std::int64_t take() {
    if (next_ == end_) fail("expected a whole pattern, got a list of integers that ends too early");
    return *next_++;
  }

  std::int64_t take_count() {
    const std::int64_t n = take();
    if (n < 0 || n > end_ - next_)
      fail("expected a count of the integers that follow, got " + std::to_string(n));
    return n;
  }

  Expression one(int depth) {
    if (depth > kMaxDepth)
      fail("expected a pattern nested at most " + std::to_string(kMaxDepth) + " deep");
    Expression e;
    e.word = static_cast<Word>(take());
    switch (e.word) {
      case Word::kWindow:
        window(e);
        break;
      case Word::kGlobalKeys:
      case Word::kGlobalQueries:
        tokens(e);
        break;
      case Word::kPerHead:
        if (depth > 0) fail("expected PerHead to be outermost, got it inside another pattern");
        [[fallthrough]];
      case Word::kUnion:
      case Word::kIntersection: {
        const std::int64_t n = take_count();
        if (n == 0)
          fail("expected a union, an intersection or a PerHead of at least one pattern, got none");
        for (std::int64_t i = 0; i < n; ++i) e.parts.push_back(one(depth + 1));
        break;
      }
      default:
        fail("expected the code of a pattern, got " +
             std::to_string(static_cast<std::int64_t>(e.word)));
    }
    return e;
  }

  void window(Expression& e) {
    for (const char* name : {"left", "right", "dilation"}) {
      const std::int64_t value = take();
      const std::int64_t least = e.values.size() == 2 ? 1 : 0;
      if (value < least) {
        fail(std::string("expected a window's ") + name + " to be at least " +
             std::to_string(least) + ", got " + std::to_string(value));
      }
      e.values.push_back(value);
    }
  }

  void tokens(Expression& e) {
    for (std::int64_t n = 2 * take_count(); n > 0; --n) e.values.push_back(take());
    for (std::size_t i = 0; i < e.values.size(); i += 2) {
      const std::int64_t start = e.values[i], stop = e.values[i + 1];
      const bool crosses_zero = start < 0 && stop > 0;
      const bool ascends = i == 0 || start >= e.values[i - 1];
      const bool reasonable = -kUnbounded < start && stop < kUnbounded;
      if (start >= stop || crosses_zero || !ascends || !reasonable) {
        fail("expected tokens as ascending runs (start, stop) on one side of 0, got (" +
             std::to_string(start) + ", " + std::to_string(stop) + ")");
      }
    }
  }

  const std::int64_t* next_;
  const std::int64_t* end_;
};

TokenList resolve_tokens(const std::vector<std::int64_t>& runs, std::int64_t n_k) {
  TokenList tokens;
  if (n_k == 0) return tokens;  // there is nothing to use a token on
  for (std::size_t i = 0; i < runs.size(); i += 2) {
    const std::int64_t start = runs[i], stop = runs[i + 1];
    for (const std::int64_t t : {start, stop - 1}) {
      if (keys_needed(t) > n_k) fail(token_error(t, n_k));
    }
    for (std::int64_t t = start; t < stop; ++t) tokens.push_back(t < 0 ? t + n_k : t);
  }
  std::sort(tokens.begin(), tokens.end());
  tokens.erase(std::unique(tokens.begin(), tokens.end()), tokens.end());
  return tokens;
}

/// a ∩ b with every pair of primitives folded that folds.
Term intersect(const Term& a, const Term& b) {
  Term both = a;
  for (const PrimitivePtr& extra : b) {
    bool folded = false;
    for (PrimitivePtr& present : both) {
      if (PrimitivePtr one = present->intersect(*extra)) {
        present = std::move(one);
        folded = true;
        break;
      }
    }
    if (!folded) both.push_back(extra);
  }
  return both;
}

bool includes(const Term& big, const Term& small) {
  return std::all_of(big.begin(), big.end(), [&](const PrimitivePtr& p) {
    return std::any_of(small.begin(), small.end(),
                       [&](const PrimitivePtr& q) { return p->includes(*q); });
  });
}

/// Adds a term to a union unless one that is there includes it; drops those that it includes.
void unite(Terms& terms, Term term) {
  for (const Term& present : terms) {
    if (includes(present, term)) return;
  }
  terms.erase(
      std::remove_if(terms.begin(), terms.end(), [&](const Term& t) { return includes(term, t); }),
      terms.end());
  terms.push_back(std::move(term));
}

Terms multiply(const Terms& a, const Terms& b) {
  const auto whole = [](const Terms& terms) {
    return terms.size() == 1 ? terms : Terms{{std::make_shared<UnionOf>(terms)}};
  };
  if (a.size() * b.size() > kMaxTerms) return {intersect(whole(a)[0], whole(b)[0])};
  Terms product;
  for (const Term& x : a) {
    for (const Term& y : b) unite(product, intersect(x, y));
  }
  return product;
}

Terms expand_window(const std::vector<std::int64_t>& v) {
  const std::int64_t back = window_reach(v[0], v[2]), ahead = window_reach(v[1], v[2]);
  if (back == kUnbounded && ahead == kUnbounded && v[2] == 1) return {Term{}};  // Full()
  return {{std::make_shared<Window>(back, ahead, v[2])}};
}

}  // namespace

std::int64_t keys_needed(std::int64_t token) { return token < 0 ? -token : token + 1; }

std::string token_error(std::int64_t token, std::int64_t n_k) {
  return "expected pattern to have tokens in [" + std::to_string(-n_k) + ", " +
         std::to_string(n_k) + "), the keys, got " + std::to_string(token);
}

Expression parse(const std::int64_t* words, std::int64_t count) {
  return Parser(words, count).whole();
}

Words encode(const Expression& e) {
  Words words{static_cast<std::int64_t>(e.word)};
  const bool tokens = e.word == Word::kGlobalKeys || e.word == Word::kGlobalQueries;
  if (tokens) words.push_back(static_cast<std::int64_t>(e.values.size() / 2));
  if (!e.parts.empty()) words.push_back(static_cast<std::int64_t>(e.parts.size()));
  words.insert(words.end(), e.values.begin(), e.values.end());
  for (const Expression& part : e.parts) {
    const Words inner = encode(part);
    words.insert(words.end(), inner.begin(), inner.end());
  }
  return words;
}

bool is_causal(const Expression& e) {
  const auto all = [&] { return std::all_of(e.parts.begin(), e.parts.end(), is_causal); };
  switch (e.word) {
    case Word::kWindow:
      return e.values[1] == 0;
    case Word::kUnion:
    case Word::kPerHead:
      return all();
    case Word::kIntersection:
      return std::any_of(e.parts.begin(), e.parts.end(), is_causal);
    default:
      return false;
  }
}

std::int64_t most_demanding_token(const Expression& e) {
  std::int64_t token = 0;
  const auto consider = [&](std::int64_t t) {
    if (keys_needed(t) > keys_needed(token)) token = t;
  };
  for (const Expression& part : e.parts) consider(most_demanding_token(part));
  if (e.word == Word::kGlobalKeys || e.word == Word::kGlobalQueries) {
    for (std::size_t i = 0; i < e.values.size(); i += 2) {
      consider(e.values[i]);
      consider(e.values[i + 1] - 1);
    }
  }
  return token;
}

Terms expand(const Expression& e, Sizes sizes) {
  switch (e.word) {
    case Word::kWindow:
      return expand_window(e.values);
    case Word::kGlobalKeys:
      return {{std::make_shared<GlobalKeys>(resolve_tokens(e.values, sizes.n_k))}};
    case Word::kGlobalQueries:
      return {{std::make_shared<GlobalQueries>(resolve_tokens(e.values, sizes.n_k))}};
    case Word::kUnion: {
      Terms terms;
      for (const Expression& part : e.parts) {
        for (Term& term : expand(part, sizes)) unite(terms, std::move(term));
      }
      return terms;
    }
    case Word::kIntersection: {
      Terms terms = expand(e.parts[0], sizes);
      for (std::size_t i = 1; i < e.parts.size(); ++i)
        terms = multiply(terms, expand(e.parts[i], sizes));
      return terms;
    }
    default:
      fail("expected one head's pattern, got a PerHead");
  }
}

Expression with_global_tokens(const Expression& expression,
                              const std::vector<std::int64_t>& tokens) {
  if (tokens.empty()) return expression;
  std::vector<std::int64_t> runs;
  for (const std::int64_t t : tokens) {
    if (!runs.empty() && runs.back() == t) {
      runs.back() = t + 1;
    } else {
      runs.insert(runs.end(), {t, t + 1});
    }
  }
  Expression all{Word::kUnion,
                 {},
                 {expression, {Word::kGlobalKeys, runs, {}}, {Word::kGlobalQueries, runs, {}}}};
  if (!is_causal(expression)) return all;
  return {Word::kIntersection, {}, {std::move(all), {Word::kWindow, {kUnbounded, 0, 1}, {}}}};
}

}  // namespace sparse_attn
