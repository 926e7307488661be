#include "patterns/expression.h"

#include <algorithm>
#include <limits>
#include <stdexcept>
#include <string>

#include "patterns/window.h"

namespace sparse_attn {
namespace {

constexpr int kMaxDepth = 64;
constexpr std::int64_t kAny = std::numeric_limits<std::int64_t>::min();

[[noreturn]] void fail(const std::string& message) { throw std::invalid_argument(message); }

/// One integer of an elementary pattern, and the least that it may be.
struct Field {
  const char* name;
  std::int64_t least;
};

struct Form {
  Word word;
  const char* name;
  std::vector<Field> fields;
};

const std::vector<Form>& forms() {
  static const std::vector<Form> all = {
      {Word::kWindow, "a window", {{"left", 0}, {"right", 0}, {"dilation", 1}}},
      {Word::kPeriodicKeys, "periodic keys", {{"period", 1}, {"count", 0}}},
      {Word::kEdgeKeys, "edge keys", {{"block", 1}, {"first", 0}, {"last", 0}}},
      {Word::kEdgeQueries, "edge queries", {{"block", 1}, {"first", 0}, {"last", 0}}},
      {Word::kBlockWindow, "a block window", {{"block", 1}, {"back", 0}, {"ahead", 0}}},
      {Word::kCheckerboard, "a checkerboard", {{"block", 1}}},
      {Word::kRadial, "a radial pattern", {{"radius", 0}}},
      {Word::kRandomBlocks, "random blocks", {{"count", 0}, {"block", 1}, {"seed", kAny}}},
      {Word::kRandomTokens, "random tokens", {{"threshold", 0}, {"seed", kAny}}},
      {Word::kBlockLayout, "a block layout", {{"block", 1}}},
      {Word::kKeyLists, "key lists", {{"counted", 0}}},
  };
  return all;
}

const Form* form_of(Word word) {
  for (const Form& form : forms()) {
    if (form.word == word) return &form;
  }
  return nullptr;
}

bool lists_tokens(Word word) { return word == Word::kGlobalKeys || word == Word::kGlobalQueries; }

bool joins(Word word) {
  return word == Word::kUnion || word == Word::kIntersection || word == Word::kPerHead;
}

/// Room for a usual pattern and what its plan is looked up by besides.
constexpr std::size_t kUsualWords = 32;

void append(Words& words, const Expression& e) {
  words.push_back(static_cast<std::int64_t>(e.word));
  if (lists_tokens(e.word)) words.push_back(static_cast<std::int64_t>(e.values.size() / 2));
  if (joins(e.word)) words.push_back(static_cast<std::int64_t>(e.parts.size()));
  words.insert(words.end(), e.values.begin(), e.values.end());
  for (const Expression& part : e.parts) append(words, part);
}

class Parser {
 public:
  Parser(const std::int64_t* words, std::int64_t count) : next_(words), end_(words + count) {}

  Expression whole() {
    Expression expression = one(0);
    if (next_ != end_)
      fail("expected one pattern, got " + std::to_string(end_ - next_) + " more integers after it");
    return expression.word == Word::kPart ? part_of_each_head(std::move(expression)) : expression;
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
    if (const Form* form = form_of(e.word)) {
      fields(e, *form);
    } else if (lists_tokens(e.word)) {
      tokens(e);
    } else if (joins(e.word)) {
      parts(e, depth);
    } else if (e.word == Word::kPart) {
      part(e, depth);
    } else {
      fail("expected the code of a pattern, got " +
           std::to_string(static_cast<std::int64_t>(e.word)));
    }
    e.tensor = tensors_;
    tensors_ += own_tensors(e);
    return e;
  }

  void fields(Expression& e, const Form& form) {
    e.values.reserve(form.fields.size());
    for (const Field& field : form.fields) {
      const std::int64_t value = take();
      if (value < field.least) {
        fail(std::string("expected the ") + field.name + " of " + form.name + " to be at least " +
             std::to_string(field.least) + ", got " + std::to_string(value));
      }
      e.values.push_back(value);
    }
  }

  void parts(Expression& e, int depth) {
    if (e.word == Word::kPerHead && depth > 0)
      fail("expected PerHead to be outermost, got it inside another pattern");
    const std::int64_t n = take_count();
    if (n == 0)
      fail("expected a union, an intersection or a PerHead of at least one pattern, got none");
    e.parts.reserve(static_cast<std::size_t>(n));
    for (std::int64_t i = 0; i < n; ++i) e.parts.push_back(one(depth + 1));
  }

  void part(Expression& e, int depth) {
    if (depth > 0) fail("expected a part of a pattern to be outermost, got it inside another one");
    const auto take_value = [&] { return e.values.emplace_back(take()); };
    take_value();
    take_value();
    for (const int numbers : {2, 3, 2}) {
      const std::int64_t runs = e.values.emplace_back(take_count());
      for (std::int64_t i = 0; i < runs * numbers; ++i) take_value();
    }
    e.parts.push_back(one(0));
  }

  /// The part of a PerHead is a PerHead of parts.
  static Expression part_of_each_head(Expression part) {
    if (part.parts[0].word == Word::kPart) fail("expected a part of a pattern, got one of a part");
    if (part.parts[0].word != Word::kPerHead) return part;
    Expression heads = std::move(part.parts[0]);
    for (Expression& one : heads.parts) one = {Word::kPart, part.values, {std::move(one)}, 0};
    return heads;
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
  int tensors_ = 0;
};

}  // namespace

int own_tensors(const Expression& e) {
  if (e.word == Word::kBlockLayout) return 1;
  return e.word == Word::kKeyLists ? 1 + static_cast<int>(e.values[0] != 0) : 0;
}

std::int64_t keys_needed(std::int64_t token) { return token < 0 ? -token : token + 1; }

std::string token_error(std::int64_t token, std::int64_t n_k) {
  return "expected pattern to have tokens in [" + std::to_string(-n_k) + ", " +
         std::to_string(n_k) + "), the keys, got " + std::to_string(token);
}

Expression parse(const std::int64_t* words, std::int64_t count) {
  return Parser(words, count).whole();
}

Words encode(const Expression& e) {
  Words words;
  words.reserve(kUsualWords);
  append(words, e);
  return words;
}

std::vector<const Expression*> tensor_users(const Expression& e) {
  std::vector<const Expression*> users;
  if (own_tensors(e) > 0) users.push_back(&e);
  for (const Expression& part : e.parts) {
    const std::vector<const Expression*> inner = tensor_users(part);
    users.insert(users.end(), inner.begin(), inner.end());
  }
  return users;
}

int tensor_count(const Expression& e) {
  int count = 0;
  for (const Expression* user : tensor_users(e)) count += own_tensors(*user);
  return count;
}

bool is_causal(const Expression& e) {
  const auto all = [&] { return std::all_of(e.parts.begin(), e.parts.end(), is_causal); };
  switch (e.word) {
    case Word::kWindow:
      return e.values[1] == 0;
    case Word::kUnion:
    case Word::kPerHead:
    case Word::kPart:
      return all();
    case Word::kIntersection:
      return std::any_of(e.parts.begin(), e.parts.end(), is_causal);
    default:
      return false;
  }
}

const Expression& pattern_of_whole(const Expression& one_head) {
  return one_head.word == Word::kPart ? one_head.parts[0] : one_head;
}

Expression same_part(const Expression& one_head, Expression pattern) {
  if (one_head.word != Word::kPart) return pattern;
  return {Word::kPart, one_head.values, {std::move(pattern)}, 0};
}

std::int64_t most_demanding_token(const Expression& e) {
  std::int64_t token = 0;
  if (e.word == Word::kPart) return token;  // its tokens are those of the whole
  const auto consider = [&](std::int64_t t) {
    if (keys_needed(t) > keys_needed(token)) token = t;
  };
  for (const Expression& part : e.parts) consider(most_demanding_token(part));
  for (std::size_t i = 0; lists_tokens(e.word) && i < e.values.size(); i += 2) {
    consider(e.values[i]);
    consider(e.values[i + 1] - 1);
  }
  return token;
}

Expression with_global_tokens(const Expression& expression,
                              const std::vector<std::int64_t>& tokens) {
  if (tokens.empty()) return expression;
  if (expression.word == Word::kPart) {
    return same_part(expression, with_global_tokens(expression.parts[0], tokens));
  }
  std::vector<std::int64_t> runs;
  for (const std::int64_t t : tokens) {
    if (!runs.empty() && runs.back() == t) {
      runs.back() = t + 1;
    } else {
      runs.insert(runs.end(), {t, t + 1});
    }
  }
  Expression all{
      Word::kUnion,
      {},
      {expression, {Word::kGlobalKeys, runs, {}, 0}, {Word::kGlobalQueries, runs, {}, 0}},
      0};
  if (!is_causal(expression)) return all;
  return {Word::kIntersection, {}, {std::move(all), {Word::kWindow, {kUnbounded, 0, 1}, {}, 0}}, 0};
}

}  // namespace sparse_attn
