// A pattern as a program that kernels run where a plan cannot know the pairs: layouts, lists and
// global tokens that are on the device only.
//
// In postfix order: a rule puts a bit on a stack, kAnd, kOr and kNot take the topmost off and put
// theirs on.
#pragma once

#include <cstdint>
#include <vector>

#include "patterns/expand.h"
#include "patterns/instruction.h"

namespace sparse_attn {

using Program = std::vector<Instruction>;

/// The program of an expression for given sizes; that of a part goes by the tokens of the whole.
/// Its pointers look into `primitives`, which must outlive it.
struct CompiledProgram {
  Program instructions;
  Terms primitives;
};
CompiledProgram compile(const Expression& expression, Sizes sizes);

/// Of the pairs that both allow, and of those that the first allows and the second does not.
CompiledProgram both(CompiledProgram a, const CompiledProgram& b);
CompiledProgram without(CompiledProgram a, const CompiledProgram& b);

/// Of the pairs whose key is global by a tensor of the call.
CompiledProgram global_key(std::int32_t tensor);

}  // namespace sparse_attn
