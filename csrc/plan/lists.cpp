#include "plan/lists.h"

namespace sparse_attn {
namespace {

/// A counting sort: visit(put) calls put(row, item) for all items, twice and in the same order.
template <class Visit>
Lists sort_by_row(std::int64_t rows, std::size_t items, const Visit& visit) {
  Lists sorted;
  sorted.starts.assign(static_cast<std::size_t>(rows) + 1, 0);
  sorted.keys.resize(items);
  visit(
      [&](std::int64_t row, std::int64_t) { ++sorted.starts[static_cast<std::size_t>(row) + 1]; });
  for (std::size_t r = 1; r < sorted.starts.size(); ++r) sorted.starts[r] += sorted.starts[r - 1];
  std::vector<std::int64_t> next(sorted.starts.begin(), sorted.starts.end() - 1);
  visit([&](std::int64_t row, std::int64_t item) {
    const auto place = static_cast<std::size_t>(next[static_cast<std::size_t>(row)]++);
    sorted.keys[place] = static_cast<std::int32_t>(item);
  });
  return sorted;
}

}  // namespace

Lists lists_of(const std::vector<Pair>& pairs, std::int64_t n_q) {
  return sort_by_row(n_q, pairs.size(), [&](const auto& put) {
    for (const Pair& pair : pairs) put(pair.query, pair.key);
  });
}

Lists transposed(const Lists& lists, std::int64_t n_k) {
  return sort_by_row(n_k, lists.keys.size(), [&](const auto& put) {
    for (std::size_t query = 0; query + 1 < lists.starts.size(); ++query) {
      for (std::int64_t i = lists.starts[query]; i < lists.starts[query + 1]; ++i)
        put(lists.keys[static_cast<std::size_t>(i)], static_cast<std::int64_t>(query));
    }
  });
}

}  // namespace sparse_attn
