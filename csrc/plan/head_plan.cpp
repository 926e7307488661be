#include "plan/head_plan.h"

#include <utility>

#include "patterns/split.h"
#include "patterns/window.h"
#include "plan/cache.h"

namespace sparse_attn {
namespace {

Expression causal() { return {Word::kWindow, {kUnbounded, 0, 1}, {}, 0}; }

/// A pair belongs to the first part that allows it: each program leaves out what the parts before
/// have. Of a part of a sequence all are such parts.
class Parts {
 public:
  Parts(const Expression& expression, Sizes sizes)
      : expression_(expression),
        parts_(split(pattern_of_whole(expression))),
        sizes_(sizes),
        before_(parts_.planned) {}

  HeadPlan make() {
    HeadPlan head{plan_of(same_part(expression_, parts_.planned), sizes_, nullptr, Target::kGpu)};
    if (!is_no_pair(parts_.looked_up)) head.looked_up = next(parts_.looked_up);
    for (const SplitPattern::Listed& part : parts_.listed) {
      head.listed.push_back(next({Word::kIntersection, {}, {part.lists, part.rest}, 0}));
    }
    return head;
  }

 private:
  CompiledProgram next(const Expression& part) {
    const auto compiled = [&](const Expression& e) {
      return compile(same_part(expression_, e), sizes_);
    };
    CompiledProgram program = compiled(part);
    if (!is_no_pair(before_)) program = without(std::move(program), compiled(before_));
    before_ = is_no_pair(before_) ? part : Expression{Word::kUnion, {}, {before_, part}, 0};
    return program;
  }

  const Expression& expression_;
  const SplitPattern parts_;
  const Sizes sizes_;
  Expression before_;
};

}  // namespace

HeadPlan head_plan(const Expression& expression, Sizes sizes, std::int32_t global_tensor) {
  HeadPlan head = Parts(expression, sizes).make();
  if (global_tensor < 0) return head;
  // The tiles of keys hold global keys alone, and those of queries global queries alone. A pair of
  // two belongs to the keys.
  const Expression others = is_causal(expression) ? causal() : every_pair();
  CompiledProgram added = compile(same_part(expression, others), sizes);
  added = without(std::move(added), compile(expression, sizes));
  head.global_queries = without(added, global_key(global_tensor));
  head.global_keys = std::move(added);
  return head;
}

}  // namespace sparse_attn
