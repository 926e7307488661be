// Which plan takes the least time: the shape of the tiles, and whether sparse ones become lists.
#include <algorithm>
#include <vector>

#include "patterns/block_window.h"
#include "plan/plan.h"

namespace sparse_attn {
namespace {

/// A plan of large tiles that visits little more than what is needed is taken as it is.
constexpr double kGoodOverhead = 1.15;

/// Of plans about as fast as the fastest, the one that visits least: it also loads least.
constexpr double kAsFast = 1.05;

/// Where lists are so many times as fast as tiles, smaller tiles will not catch up.
constexpr double kHopeless = 2.0;

/// Nanoseconds of the forward pass, measured with AVX-512, float32 and heads of 64 on full, window,
/// radial and random patterns; the backward pass takes 2.5 times as long throughout.
constexpr double kPair = 1.6;                       // of a tile of 64 rows
constexpr double kNarrowPair[] = {2.0, 1.7, 1.65};  // of one of 16, 32, 48 rows
constexpr double kTile = 150, kRowTile = 500, kRow = 70;
constexpr double kListedPair = 10, kListedRow = 130;

double tile_time(std::int64_t rows, std::int64_t keys) {
  const std::int64_t vectors = (rows + 15) / 16;
  const double pair = vectors < 4 ? kNarrowPair[vectors - 1] : kPair;
  return kTile + pair * static_cast<double>(16 * vectors * keys);
}

double time_of(const Plan& plan) {
  double time = 0;
  for (const Pass& pass : plan.passes) {
    for (const RowTile& row : pass.row_tiles) {
      std::int64_t tiles = 0;
      for (std::uint32_t r = row.first_run; r < row.end_run; ++r) tiles += pass.runs[r].count;
      time += kRowTile + kRow * row.rows.count;
      time += static_cast<double>(tiles) *
              tile_time(row.rows.count, std::min<std::int64_t>(plan.tile.keys, plan.sizes.n_k));
    }
  }
  for (std::size_t i = 1; i < plan.lists.starts.size(); ++i) {
    const std::int64_t keys = plan.lists.starts[i] - plan.lists.starts[i - 1];
    if (keys > 0) time += kListedRow + kListedPair * static_cast<double>(keys);
  }
  return time;
}

/// The side of a tile that blocks fill without a rest, or 0.
int side_for(std::int64_t block) {
  if (block <= kMaxTile) return block < 16 ? 0 : static_cast<int>(block);
  const std::int64_t parts = block_count(block, kMaxTile);
  return block % parts == 0 ? static_cast<int>(block / parts) : 0;
}

/// Sides of square tiles that might be the best, the likely ones first.
std::vector<int> sides(const Terms& terms) {
  std::vector<int> all;
  const auto add = [&](int side) {
    if (side > 0 && std::find(all.begin(), all.end(), side) == all.end()) all.push_back(side);
  };
  for (const Term& term : terms) {
    for (const PrimitivePtr& p : term) add(side_for(p->block()));
  }
  for (const int side : {kMaxTile, 32, 16}) add(side);
  return all;
}

/// Most of its work went into tiles that no other resembles: not to be done again.
bool is_laborious(const Plan& plan) {
  return 4 * plan.unique > static_cast<std::int64_t>(plan.passes[0].row_tiles.size());
}

/// The plans tried so far, without those that are clearly slower than the fastest.
class Candidates {
 public:
  /// Returns how many times as long it takes as the fastest before it.
  double add(Plan plan) {
    const double time = time_of(plan), before = plans_.empty() ? time : least_;
    least_ = plans_.empty() ? time : std::min(least_, time);
    plans_.push_back({std::move(plan), time});
    const auto slow = [&](const Candidate& c) { return c.time > kAsFast * least_; };
    plans_.erase(std::remove_if(plans_.begin(), plans_.end(), slow), plans_.end());
    return time / before;
  }

  Plan take_best() {
    const auto best = std::min_element(
        plans_.begin(), plans_.end(),
        [](const Candidate& a, const Candidate& b) { return a.plan.visited < b.plan.visited; });
    return std::move(best->plan);
  }

 private:
  struct Candidate {
    Plan plan;
    double time;
  };
  std::vector<Candidate> plans_;
  double least_ = 0;
};

}  // namespace

Plan choose_plan(const Terms& terms, Sizes sizes) {
  Candidates candidates;
  for (const int side : sides(terms)) {
    Plan plan = build_plan(terms, sizes, {side, side});
    const bool good =
        static_cast<double>(plan.visited) <= kGoodOverhead * static_cast<double>(plan.pairs);
    if (good && side > 32) return plan;
    const bool stop = is_laborious(plan);
    if (candidates.add(std::move(plan)) > kHopeless || stop) break;
    if (side == kMaxTile) candidates.add(build_plan(terms, sizes, {}, Listing::kAll));
  }
  return candidates.take_best();
}

}  // namespace sparse_attn
