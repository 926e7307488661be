#include "plan/seen.h"

#include <algorithm>
#include <numeric>

#include "plan/layers.h"

namespace sparse_attn {
namespace {

class Marker {
 public:
  Marker(const Plan& plan, const Pass& pass, Seen& seen)
      : plan_(plan), pass_(pass), seen_(seen), whole_(pass.key_tiles.size()) {}

  void add(const RowTile& row) {
    std::uint64_t rows = 0;  // that see something
    for (std::uint32_t r = row.first_run; r < row.end_run; ++r) {
      const Run& run = pass_.runs[r];
      if (run.mask == kFull) {
        add_whole(run);
        rows |= row.owned;
      } else {
        const auto keys = static_cast<std::size_t>(run.key_tile);
        rows |= add_masked(pass_.key_tiles[keys], run.mask, row.owned);
      }
    }
    mark(row.rows, rows, seen_.queries);
  }

 private:
  /// Most tiles of a dense pattern are marked by the first row already.
  void add_whole(const Run& run) {
    for (std::int32_t t = run.key_tile; t < run.key_tile + run.count; ++t) {
      const auto tile = static_cast<std::size_t>(t);
      if (whole_[tile]) continue;
      whole_[tile] = 1;
      mark(pass_.key_tiles[tile], ~std::uint64_t{0}, seen_.keys);
    }
  }

  /// Of one tile the keys that `owned` rows see; returns which of these see one.
  std::uint64_t add_masked(const Tile& keys, std::int32_t mask, std::uint64_t owned) {
    std::uint64_t seen = 0, rows = 0;
    for (std::int32_t k = 0; k < keys.count; ++k) {
      const std::uint64_t bits = owned & word(mask, k);
      seen |= static_cast<std::uint64_t>(bits != 0) << k;
      rows |= bits;
    }
    mark(keys, seen, seen_.keys);
    return rows;
  }

  std::uint64_t word(std::int32_t mask, std::int32_t key) const {
    return plan_.masks[static_cast<std::size_t>(mask)][static_cast<std::size_t>(key)];
  }

  void mark(const Tile& tile, std::uint64_t members, std::vector<std::uint8_t>& flags) const {
    for (std::int32_t i = 0; i < tile.count; ++i) {
      if (members >> i & 1)
        flags[static_cast<std::size_t>(token(tile, plan_.token_list.data(), i))] = 1;
    }
  }

  const Plan& plan_;
  const Pass& pass_;
  Seen& seen_;
  std::vector<std::uint8_t> whole_;  // by key tile: all of it is marked
};

}  // namespace

void add_seen(const Plan& plan, Seen& seen) {
  seen.queries.resize(static_cast<std::size_t>(plan.sizes.n_q));
  seen.keys.resize(static_cast<std::size_t>(plan.sizes.n_k));
  for (const Pass& pass : plan.passes) {
    Marker marker(plan, pass, seen);
    for (const RowTile& row : pass.row_tiles) marker.add(row);
  }
  const Lists& lists = *plan.lists;
  for (std::size_t i = 1; i < lists.starts.size(); ++i) {
    if (lists.starts[i] > lists.starts[i - 1]) seen.queries[i - 1] = 1;
  }
  for (const std::int32_t key : lists.keys) seen.keys[static_cast<std::size_t>(key)] = 1;
}

std::vector<std::int64_t> global_queries(const Terms& terms, Sizes sizes) {
  std::vector<std::int64_t> queries;
  for (const std::int64_t position : Parts(terms).positions) {
    const std::int64_t query = position - sizes.offset();
    if (query >= 0) queries.push_back(query);
  }
  return queries;
}

std::int64_t common_step(const Terms& terms, Sizes sizes) {
  const std::int64_t longest = std::max<std::int64_t>({sizes.n_q, sizes.n_k, 1});
  std::int64_t common = 1;
  for (const auto& [step, part] : Parts(terms).ordered) {
    const std::int64_t more = step / std::gcd(common, step);
    if (step < longest && common < longest / more) common *= more;
  }
  return common;
}

}  // namespace sparse_attn
