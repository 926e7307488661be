// A pattern with tensors in parts, by what has to be done for them on a device.
#pragma once

#include <vector>

#include "patterns/expression.h"

namespace sparse_attn {

struct SplitPattern {
  /// Needs no tensor: planned on the host. A union of nothing if there is no such part.
  Expression planned;
  /// Of layouts, whose tiles the device looks through. Likewise.
  Expression looked_up;
  /// Parts with lists of keys: `lists` and what else a pair has to fulfil.
  struct Listed {
    Expression lists;
    Expression rest;  // an intersection of nothing if there is nothing else
  };
  std::vector<Listed> listed;
};

/// Unions of nothing and intersections of nothing do not come from users: they stand for no pair
/// and for all pairs.
Expression no_pair();
Expression every_pair();
bool is_no_pair(const Expression& expression);
bool is_every_pair(const Expression& expression);

/// Throws std::invalid_argument where intersections of unions would make too many parts.
SplitPattern split(const Expression& expression);

}  // namespace sparse_attn
