// Which plan takes the least time: the shape of the tiles, and whether sparse ones become lists.
#include <algorithm>
#include <array>
#include <cmath>
#include <vector>

#include "patterns/block_window.h"
#include "plan/plan.h"

namespace sparse_attn {
namespace {

/// A plan of large tiles whose pairs take little longer than the needed ones would in full tiles is
/// taken as it is.
constexpr double kGoodOverhead = 1.15;

/// Of plans about as fast as the fastest, the one that visits least: it also loads least.
constexpr double kAsFast = 1.05;

/// Where lists are so many times as fast as tiles, smaller tiles will not catch up.
constexpr double kHopeless = 2.0;

/// Times in nanoseconds of what a plan is made of.
struct Costs {
  double pair;                        // of a tile of 64 rows
  std::array<double, 3> narrow_pair;  // of one of 16, 32, 48 rows
  double masked_pair;                 // that is computed in a tile with a mask, at most
  double mask;                        // for each that differs: it comes from memory
  double tile, row_tile, row;         // for each, besides its pairs
  double listed_pair, listed_row;
};

/// Of the forward pass of one core, measured with AVX-512, float32 and heads of 64 on full, window,
/// radial and random patterns; the backward pass takes 2.5 times as long throughout.
constexpr Costs kCpuCosts{1.6, {2.0, 1.7, 1.65}, 2.0, 1500, 150, 500, 70, 10, 130};

/// Of a whole device, by its rates alone, not measured: 400 TFLOP/s of products of 64 columns
/// against 4 TB/s of single rows of bfloat16. The kernels know tiles of 64 x 64 only.
constexpr Costs kGpuCosts{6.4e-4, {}, 6.4e-4, 0.0, 0.3, 1.5, 0.0, 6.4e-2, 0.3};

const Costs& costs(Target target) { return target == Target::kCpu ? kCpuCosts : kGpuCosts; }

/// A pair of a tile with so many rows.
double pair_time(const Costs& c, std::int64_t rows) {
  const std::int64_t vectors = (rows + kVectorRows - 1) / kVectorRows;
  const bool narrow = vectors < 4 && c.narrow_pair[0] > 0;
  const double pair = narrow ? c.narrow_pair[static_cast<std::size_t>(vectors - 1)] : c.pair;
  return pair * static_cast<double>(kVectorRows * vectors) / static_cast<double>(rows);
}

/// The pairs of the tiles and the lists.
double pairs_time(const Plan& plan, const Costs& c) {
  const std::int64_t keys = std::min<std::int64_t>(plan.tile.keys, plan.sizes.n_k);
  double time = 0;
  for (const Pass& pass : plan.passes) {
    for (const RowTile& row : pass.row_tiles) {
      std::int64_t full = 0, masked = 0;
      for (std::uint32_t r = row.first_run; r < row.end_run; ++r) {
        const Run& run = pass.runs[r];
        if (run.mask == kFull) {
          full += run.count * keys * row.rows.count;
        } else {
          masked += plan.computed[static_cast<std::size_t>(run.mask)];
        }
      }
      time += pair_time(c, row.rows.count) * static_cast<double>(full) +
              c.masked_pair * static_cast<double>(masked);
    }
  }
  for (std::size_t i = 1; i < plan.lists->starts.size(); ++i) {
    const std::int64_t listed = plan.lists->starts[i] - plan.lists->starts[i - 1];
    if (listed > 0) time += c.listed_row + c.listed_pair * static_cast<double>(listed);
  }
  return time;
}

double time_of(const Plan& plan, const Costs& c) {
  double time = pairs_time(plan, c) + c.mask * static_cast<double>(plan.masks.size());
  for (const Pass& pass : plan.passes) {
    std::int64_t tiles = 0;
    for (const Run& run : pass.runs) tiles += run.count;
    time += c.tile * static_cast<double>(tiles);
    for (const RowTile& row : pass.row_tiles) time += c.row_tile + c.row * row.rows.count;
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
std::vector<int> sides(const Terms& terms, Target target) {
  if (target == Target::kGpu) return {kMaxTile};
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
  explicit Candidates(const Costs& costs) : costs_(costs) {}

  /// Returns how many times as long it takes as the fastest before it.
  double add(Plan plan) {
    const double time = time_of(plan, costs_), before = plans_.empty() ? time : least_;
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
  const Costs& costs_;
  std::vector<Candidate> plans_;
  double least_ = 0;
};

}  // namespace

std::int64_t pairs_for_listed(Target target) {
  const Costs& c = costs(target);
  return static_cast<std::int64_t>(std::ceil(c.listed_pair / c.pair));
}

Plan choose_plan(const Terms& terms, Sizes sizes, Target target) {
  const Costs& c = costs(target);
  Candidates candidates(c);
  for (const int side : sides(terms, target)) {
    Plan plan = build_plan(terms, sizes, {side, side}, Listing::kUnique, target);
    const double least = c.pair * static_cast<double>(plan.pairs);
    const bool good = pairs_time(plan, c) <= kGoodOverhead * least;
    if (good && side > 32) return plan;
    const bool stop = is_laborious(plan);
    if (candidates.add(std::move(plan)) > kHopeless || stop) break;
    if (side == kMaxTile) candidates.add(build_plan(terms, sizes, {}, Listing::kAll, target));
  }
  return candidates.take_best();
}

}  // namespace sparse_attn
