#include "patterns/split.h"

#include <algorithm>
#include <stdexcept>
#include <string>
#include <utility>

namespace sparse_attn {
namespace {

/// An intersection of unions is multiplied out up to here.
constexpr std::size_t kMostParts = 64;

using Factors = std::vector<Expression>;  // an intersection
using Sum = std::vector<Factors>;         // a union of them

Sum multiplied_out(const Expression& e) {
  if (tensor_count(e) == 0) return {{e}};  // the plan takes it whole
  if (e.word == Word::kUnion) {
    Sum sum;
    for (const Expression& part : e.parts) {
      Sum inner = multiplied_out(part);
      std::move(inner.begin(), inner.end(), std::back_inserter(sum));
    }
    return sum;
  }
  if (e.word != Word::kIntersection) return {{e}};
  Sum product{{}};
  for (const Expression& part : e.parts) {
    Sum next;
    for (const Factors& right : multiplied_out(part)) {
      for (const Factors& left : product) {
        next.push_back(left);
        next.back().insert(next.back().end(), right.begin(), right.end());
      }
    }
    if (next.size() > kMostParts) {
      throw std::invalid_argument(
          "expected a pattern with tensors that multiplies out into at "
          "most " +
          std::to_string(kMostParts) + " parts on this device, got more");
    }
    product = std::move(next);
  }
  return product;
}

Expression joined(Word word, std::vector<Expression> parts) {
  if (parts.size() == 1) return std::move(parts[0]);
  return {word, {}, std::move(parts), 0};
}

}  // namespace

Expression no_pair() { return {Word::kUnion, {}, {}, 0}; }
Expression every_pair() { return {Word::kIntersection, {}, {}, 0}; }
bool is_no_pair(const Expression& e) { return e.word == Word::kUnion && e.parts.empty(); }
bool is_every_pair(const Expression& e) { return e.word == Word::kIntersection && e.parts.empty(); }

SplitPattern split(const Expression& expression) {
  std::vector<Expression> planned, looked_up;
  SplitPattern made;
  for (Factors& factors : multiplied_out(expression)) {
    const auto lists = std::find_if(factors.begin(), factors.end(),
                                    [](const Expression& e) { return e.word == Word::kKeyLists; });
    if (lists != factors.end()) {
      Expression of_keys = *lists;
      factors.erase(lists);
      made.listed.push_back({std::move(of_keys), joined(Word::kIntersection, std::move(factors))});
      continue;
    }
    Expression whole = joined(Word::kIntersection, std::move(factors));
    (tensor_count(whole) > 0 ? looked_up : planned).push_back(std::move(whole));
  }
  made.planned = joined(Word::kUnion, std::move(planned));
  made.looked_up = joined(Word::kUnion, std::move(looked_up));
  return made;
}

}  // namespace sparse_attn
