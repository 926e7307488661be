#include "plan/sweeps.h"

#include <algorithm>
#include <numeric>
#include <utility>

namespace sparse_attn {
namespace {

/// Tasks to aim for: several for each of the about 500 blocks that run at a time on the largest
/// devices. A task of fewer visits is not worth its own start.
constexpr std::int64_t kTargetTasks = 1024;
constexpr std::int64_t kLeastVisits = 16;

/// A pair of tiles shares what both visit. Below a half in common it would only make tasks longer.
constexpr std::int64_t kLeastInCommon = 2;

template <class T>
std::size_t index(T i) {
  return static_cast<std::size_t>(i);
}

struct Visit {
  std::int32_t tile;
  std::int32_t mask;
};
using VisitsOfTile = std::vector<std::vector<Visit>>;

/// A visit by a pair of tiles.
struct PairVisit {
  std::int32_t tile;
  std::int32_t masks[2];
};

VisitsOfTile visits_by_rows(const Pass& pass) {
  VisitsOfTile visits(pass.row_tiles.size());
  const Run* runs = pass.runs.data();
  for (std::size_t i = 0; i < visits.size(); ++i) {
    const RowTile& row = pass.row_tiles[i];
    for_each_visit(
        runs + row.first_run, runs + row.end_run,
        [&](std::int32_t tile, std::int32_t mask) { visits[i].push_back({tile, mask}); });
    std::sort(visits[i].begin(), visits[i].end(),
              [](const Visit& a, const Visit& b) { return a.tile < b.tile; });
  }
  return visits;
}

VisitsOfTile visits_by_keys(const Pass& pass) {
  VisitsOfTile visits(pass.key_tiles.size());
  const Run* runs = pass.runs.data();
  for (std::size_t i = 0; i < pass.row_tiles.size(); ++i) {
    const RowTile& row = pass.row_tiles[i];
    for_each_visit(runs + row.first_run, runs + row.end_run,
                   [&](std::int32_t tile, std::int32_t mask) {
                     visits[index(tile)].push_back({static_cast<std::int32_t>(i), mask});
                   });
  }
  return visits;
}

/// What either of two tiles visits, in order.
std::vector<PairVisit> merged(const std::vector<Visit>& a, const std::vector<Visit>& b) {
  std::vector<PairVisit> all;
  auto x = a.begin();
  auto y = b.begin();
  while (x != a.end() || y != b.end()) {
    const bool takes_x = x != a.end() && (y == b.end() || x->tile <= y->tile);
    const bool takes_y = y != b.end() && (x == a.end() || y->tile <= x->tile);
    all.push_back(
        {takes_x ? x->tile : y->tile, {takes_x ? x->mask : kSkip, takes_y ? y->mask : kSkip}});
    x += takes_x;
    y += takes_y;
  }
  return all;
}

class SweepBuilder {
 public:
  /// Tiles from `first_shared` on hold tokens of other tiles as well: their results go to slots.
  SweepBuilder(VisitsOfTile visits, std::size_t first_shared, int group, std::int64_t heads)
      : visits_(std::move(visits)), first_shared_(first_shared), group_(group) {
    std::int64_t total = 0;
    for (const auto& v : visits_) total += static_cast<std::int64_t>(v.size());
    longest_ = std::max(kLeastVisits, 2 * total * heads / kTargetTasks);
  }

  SweepArrays make() {
    for (std::size_t i = 0; i < visits_.size();) {
      const bool pair = group_ == 2 && i + 1 < visits_.size() && belong_together(i);
      static const std::vector<Visit> kNone;
      add_tasks(i, pair, merged(visits_[i], pair ? visits_[i + 1] : kNone));
      i += pair ? 2 : 1;
    }
    std::vector<std::size_t> order(out_.tasks.size());
    std::iota(order.begin(), order.end(), std::size_t{0});
    std::stable_sort(order.begin(), order.end(),
                     [&](std::size_t a, std::size_t b) { return lengths_[a] > lengths_[b]; });
    std::vector<Task> sorted;
    for (const std::size_t i : order) sorted.push_back(out_.tasks[i]);
    out_.tasks = std::move(sorted);
    return std::move(out_);
  }

 private:
  bool belong_together(std::size_t i) const {
    const auto& a = visits_[i];
    const auto& b = visits_[i + 1];
    if ((i < first_shared_) != (i + 1 < first_shared_)) return false;
    std::int64_t common = 0;
    for (auto x = a.begin(), y = b.begin(); x != a.end() && y != b.end();) {
      common += x->tile == y->tile;
      const bool x_first = x->tile <= y->tile, y_first = y->tile <= x->tile;
      x += x_first;
      y += y_first;
    }
    return kLeastInCommon * common >= static_cast<std::int64_t>(std::max(a.size(), b.size()));
  }

  /// Cuts the visits into tasks of about equal length.
  void add_tasks(std::size_t tile, bool pair, const std::vector<PairVisit>& visits) {
    const bool shared = tile >= first_shared_;
    if (shared && visits.empty()) return;
    const auto count = static_cast<std::int64_t>(visits.size());
    const std::int64_t pieces = std::max<std::int64_t>(1, (count + longest_ - 1) / longest_);
    const bool in_slots = shared || pieces > 1;
    const auto first = static_cast<std::int32_t>(tile), step = static_cast<std::int32_t>(pieces);
    for (std::int64_t p = 0; p < pieces; ++p) {
      Task task{{first, pair ? first + 1 : -1}, -1, 0, 0, 0};
      if (in_slots) {
        task.slot = out_.slots + static_cast<std::int32_t>(p);
        task.slot_step = step;
      }
      const auto begin = visits.begin() + p * count / pieces,
                 end = visits.begin() + (p + 1) * count / pieces;
      task.first_visit = static_cast<std::uint32_t>(out_.visits.size());
      for (auto v = begin; v != end; ++v) add_visit(*v, v == begin);
      task.end_visit = static_cast<std::uint32_t>(out_.visits.size());
      out_.tasks.push_back(task);
      lengths_.push_back(end - begin);
    }
    if (!in_slots) return;
    for (std::int32_t g = 0; g < (pair ? 2 : 1); ++g) {
      out_.reductions.push_back({first + g, out_.slots, out_.slots + step});
      out_.slots += step;
    }
  }

  void add_visit(const PairVisit& v, bool first) {
    const bool plain = v.masks[0] < 0 && v.masks[1] < 0;
    if (!first && plain) {
      Visits& last = out_.visits.back();
      if (last.tile + last.count == v.tile && last.masks[0] == v.masks[0] &&
          last.masks[1] == v.masks[1]) {
        ++last.count;
        return;
      }
    }
    out_.visits.push_back({v.tile, 1, {v.masks[0], v.masks[1]}});
  }

  const VisitsOfTile visits_;
  const std::size_t first_shared_;
  const int group_;
  std::int64_t longest_;
  SweepArrays out_;
  std::vector<std::int64_t> lengths_;
};

/// Puts the reductions into rounds within which no token comes twice.
void order_by_rounds(SweepArrays& sweep, const std::vector<Tile>& tiles,
                     const std::vector<std::int64_t>& token_list, std::int64_t tokens) {
  std::vector<std::int32_t> next(index(tokens), 0);  // the first round free for each token
  std::vector<std::vector<Reduction>> rounds;
  for (const Reduction& reduction : sweep.reductions) {
    const Tile& tile = tiles[index(reduction.tile)];
    std::int32_t round = 0;
    for (int i = 0; i < tile.count; ++i)
      round = std::max(round, next[index(token(tile, token_list.data(), i))]);
    for (int i = 0; i < tile.count; ++i) next[index(token(tile, token_list.data(), i))] = round + 1;
    rounds.resize(std::max(rounds.size(), index(round) + 1));
    rounds[index(round)].push_back(reduction);
  }
  sweep.reductions.clear();
  for (const auto& round : rounds) {
    sweep.reductions.insert(sweep.reductions.end(), round.begin(), round.end());
    sweep.round_ends.push_back(static_cast<std::int32_t>(sweep.reductions.size()));
  }
}

}  // namespace

PassArrays sweeps_of(const Plan& plan, const Pass& pass, Grouping grouping, std::int64_t heads,
                     bool backward) {
  PassArrays made;
  made.rows =
      SweepBuilder(visits_by_rows(pass), pass.row_tiles.size(), grouping.rows, heads).make();
  made.rows.round_ends.assign(made.rows.reductions.empty() ? 0 : 1,
                              static_cast<std::int32_t>(made.rows.reductions.size()));
  if (!backward) return made;
  made.keys =
      SweepBuilder(visits_by_keys(pass), index(pass.affine_key_tiles), grouping.keys, heads).make();
  order_by_rounds(made.keys, pass.key_tiles, plan.token_list, plan.sizes.n_k);
  return made;
}

}  // namespace sparse_attn
