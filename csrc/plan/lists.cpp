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

/// Calls visit(query, key) for the pairs of one tile.
template <class Visit>
void for_each_pair(const Plan& plan, const RowTile& row, const Tile& keys, std::int32_t mask,
                   const Visit& visit) {
  const std::int64_t* tokens = plan.token_list.data();
  for (int k = 0; k < keys.count; ++k) {
    const std::uint64_t seen =
        mask == kFull ? ~std::uint64_t{0}
                      : plan.masks[static_cast<std::size_t>(mask)][static_cast<std::size_t>(k)];
    for (int r = 0; r < row.rows.count; ++r) {
      if ((seen & row.owned) >> r & 1) visit(token(row.rows, tokens, r), token(keys, tokens, k));
    }
  }
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

Lists all_keys(const Plan& plan) {
  std::vector<Pair> by_key;  // in the order of the tiles; sorted by key, then by query
  by_key.reserve(static_cast<std::size_t>(plan.pairs));
  const auto add = [&](std::int64_t query, std::int64_t key) {
    by_key.push_back({static_cast<std::int32_t>(key), static_cast<std::int32_t>(query)});
  };
  for (const Pass& pass : plan.passes) {
    for (const RowTile& row : pass.row_tiles) {
      const Run* runs = pass.runs.data();
      for_each_visit(runs + row.first_run, runs + row.end_run, [&](auto tile, auto mask) {
        for_each_pair(plan, row, pass.key_tiles[static_cast<std::size_t>(tile)], mask, add);
      });
    }
  }
  for (std::size_t i = 1; i < plan.lists->starts.size(); ++i) {
    for (std::int64_t e = plan.lists->starts[i - 1]; e < plan.lists->starts[i]; ++e)
      add(static_cast<std::int64_t>(i) - 1, plan.lists->keys[static_cast<std::size_t>(e)]);
  }
  return transposed(lists_of(by_key, plan.sizes.n_k), plan.sizes.n_q);
}

}  // namespace sparse_attn
