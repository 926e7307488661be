#include "patterns/program.h"

#include <algorithm>
#include <stdexcept>
#include <utility>

#include "patterns/part.h"
#include "patterns/tokens.h"

namespace sparse_attn {
namespace {

using Kind = Instruction::Kind;

/// The stack is the 64 bits of a word. Programs of parts are joined to longer ones, which adds up
/// to three.
constexpr int kMostDepth = 60;

int deepest_stack(const Program& program) {
  int depth = 0, deepest = 0;
  for (const Instruction& step : program) {
    const bool joins = step.kind == Kind::kAnd || step.kind == Kind::kOr;
    depth += joins ? -1 : step.kind == Kind::kNot ? 0 : 1;
    deepest = std::max(deepest, depth);
  }
  return deepest;
}

class Compiler {
 public:
  explicit Compiler(Sizes sizes) : sizes_(sizes) {}

  CompiledProgram whole(const Expression& expression) {
    add(expression);
    if (deepest_stack(made_.instructions) > kMostDepth) {
      throw std::invalid_argument(
          "expected a pattern with unions and intersections nested at most " +
          std::to_string(kMostDepth) + " deep on this device");
    }
    return std::move(made_);
  }

 private:
  void add(const Expression& e) {
    switch (e.word) {
      case Word::kUnion:
      case Word::kIntersection:
        if (e.parts.empty()) append(e.word == Word::kUnion ? Kind::kFalse : Kind::kTrue);
        for (std::size_t i = 0; i < e.parts.size(); ++i) {
          add(e.parts[i]);
          if (i > 0) append(e.word == Word::kUnion ? Kind::kOr : Kind::kAnd);
        }
        return;
      case Word::kBlockLayout:
        append(Kind::kLayout).layout = {e.tensor, e.values[0]};
        return;
      case Word::kKeyLists:
        append(Kind::kLists).lists = {e.tensor};
        return;
      default:
        add_terms(expand(e, sizes_));
    }
  }

  void add_terms(const Terms& terms) {
    if (terms.empty()) append(Kind::kFalse);
    for (std::size_t t = 0; t < terms.size(); ++t) {
      if (terms[t].empty()) append(Kind::kTrue);
      for (std::size_t i = 0; i < terms[t].size(); ++i) {
        made_.instructions.push_back(terms[t][i]->instruction());
        if (i > 0) append(Kind::kAnd);
      }
      if (t > 0) append(Kind::kOr);
    }
    made_.primitives.insert(made_.primitives.end(), terms.begin(), terms.end());
  }

  Instruction& append(Kind kind) {
    made_.instructions.emplace_back().kind = kind;
    return made_.instructions.back();
  }

  const Sizes sizes_;
  CompiledProgram made_;
};

void append(CompiledProgram& to, const CompiledProgram& more, std::initializer_list<Kind> joints) {
  to.instructions.insert(to.instructions.end(), more.instructions.begin(), more.instructions.end());
  to.primitives.insert(to.primitives.end(), more.primitives.begin(), more.primitives.end());
  for (const Kind kind : joints) to.instructions.emplace_back().kind = kind;
}

/// Of all pairs whose query stands at one of the positions.
CompiledProgram of_queries(TokenList positions) {
  const auto queries = std::make_shared<const GlobalQueries>(std::move(positions));
  return {{queries->instruction()}, {{queries}}};
}

}  // namespace

CompiledProgram compile(const Expression& expression, Sizes sizes) {
  if (expression.word != Word::kPart) return Compiler(sizes).whole(expression);
  const Part part(expression);
  CompiledProgram made = Compiler(part.whole).whole(expression.parts[0]);
  if (part.blind.empty()) return made;
  return without(std::move(made), of_queries(part.blind_positions()));
}

CompiledProgram both(CompiledProgram a, const CompiledProgram& b) {
  append(a, b, {Kind::kAnd});
  return a;
}

CompiledProgram without(CompiledProgram a, const CompiledProgram& b) {
  append(a, b, {Kind::kNot, Kind::kAnd});
  return a;
}

CompiledProgram global_key(std::int32_t tensor) {
  CompiledProgram made;
  Instruction& step = made.instructions.emplace_back();
  step.kind = Kind::kGlobalKey;
  step.global_key = {tensor};
  return made;
}

}  // namespace sparse_attn
