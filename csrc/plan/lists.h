// Lists of keys, one for each query, and of queries, one for each key.
#pragma once

#include <cstdint>
#include <vector>

#include "plan/plan.h"

namespace sparse_attn {

struct Pair {
  std::int32_t query;
  std::int32_t key;
};

/// The keys of each query; those of one query keep their order.
Lists lists_of(const std::vector<Pair>& pairs, std::int64_t n_q);

/// The queries of each of the n_k keys, ascending.
Lists transposed(const Lists& lists, std::int64_t n_k);

/// All keys that each query sees, ascending: every pair of the plan's tiles and lists.
Lists all_keys(const Plan& plan);

}  // namespace sparse_attn
