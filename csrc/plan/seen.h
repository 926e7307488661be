// What a plan says about who meets whom: what a part of a sequence has to receive.
#pragma once

#include <cstdint>
#include <vector>

#include "plan/plan.h"

namespace sparse_attn {

/// 1 for each query that sees a key, and for each key that a query sees.
struct Seen {
  std::vector<std::uint8_t> queries;
  std::vector<std::uint8_t> keys;
};

/// Adds those of a plan.
void add_seen(const Plan& plan, Seen& seen);

/// The queries that the plan lists because they see (nearly) all keys, ascending, and the least
/// common multiple of the steps of its passes.
std::vector<std::int64_t> global_queries(const Terms& terms, Sizes sizes);
std::int64_t common_step(const Terms& terms, Sizes sizes);

}  // namespace sparse_attn
