#include "plan/partition.h"

#include <algorithm>
#include <utility>

#include "plan/lists.h"

namespace sparse_attn {
namespace {

/// Enough shares to keep 32 threads busy; a share below 32 tile visits (about 0.2 ms) is not worth
/// its bookkeeping. Their number is a power of two, as that of the threads often is: with 5 shares
/// the fifth keeps one of two threads waiting.
constexpr std::int64_t kTargetShares = 32;
constexpr std::int64_t kLeastVisits = 32;

template <class T>
std::size_t index(T i) {
  return static_cast<std::size_t>(i);
}

class Partitioner {
 public:
  Partitioner(const Pass& pass, Direction direction, int chunks)
      : pass_(pass), backward_(direction == Direction::kBackward), chunks_(chunks) {}

  PassPartition make() {
    out_.runs = pass_.runs;
    weigh();
    cut_short_rows();
    spread_long_rows();
    std::stable_sort(pieces_.begin(), pieces_.end(),
                     [](const Piece& a, const Piece& b) { return a.chunk < b.chunk; });
    lay_out();
    if (backward_ && chunks_ > 1) share_key_tiles();
    return std::move(out_);
  }

 private:
  struct Piece {
    int chunk;
    Segment segment;
  };

  std::int64_t weight(const RowTile& row) const {
    std::int64_t tiles = 0;
    for (std::uint32_t r = row.first_run; r < row.end_run; ++r) tiles += pass_.runs[r].count;
    return tiles;
  }

  /// A row tile is long if it visits half of all keys. It is split along its keys, unless such
  /// tiles are common: then their partial results would need more memory than splitting the rows
  /// among chunks.
  void weigh() {
    const std::int64_t half = std::max<std::int64_t>(pass_.affine_key_tiles / 2, 2);
    std::int64_t count = 0;
    for (const RowTile& row : pass_.row_tiles) {
      weights_.push_back(weight(row));
      count += weights_.back() >= half;
    }
    const auto tiles = static_cast<std::int64_t>(pass_.row_tiles.size());
    const bool split = chunks_ > 1 && (4 * count <= tiles || tiles < chunks_);
    for (const std::int64_t w : weights_) long_.push_back(split && w >= half);
  }

  /// Consecutive row tiles, about as many visits for each chunk. An empty tile still costs its
  /// output.
  void cut_short_rows() {
    std::int64_t total = 0, done = 0;
    for (std::size_t i = 0; i < weights_.size(); ++i) total += long_[i] ? 0 : weights_[i] + 1;
    for (std::size_t i = 0; i < weights_.size(); ++i) {
      if (long_[i]) continue;
      const RowTile& row = pass_.row_tiles[i];
      const auto chunk = static_cast<int>(done * chunks_ / std::max<std::int64_t>(total, 1));
      pieces_.push_back({chunk, {static_cast<std::int32_t>(i), -1, row.first_run, row.end_run}});
      done += weights_[i] + 1;
    }
  }

  /// The chunks that touch each key tile, in order.
  std::vector<std::vector<int>> touched() const {
    std::vector<std::vector<int>> by(pass_.key_tiles.size());
    const Run* runs = out_.runs.data();
    for (const Piece& piece : pieces_) {
      for_each_visit(runs + piece.segment.first_run, runs + piece.segment.end_run,
                     [&](std::int32_t tile, std::int32_t) {
                       std::vector<int>& chunks = by[index(tile)];
                       if (chunks.empty() || chunks.back() != piece.chunk)
                         chunks.push_back(piece.chunk);
                     });
    }
    return by;
  }

  /// How many long row tiles visit each key tile.
  std::vector<std::int64_t> long_visits() const {
    std::vector<std::int64_t> visits(pass_.key_tiles.size());
    for (std::size_t i = 0; i < long_.size(); ++i) {
      if (!long_[i]) continue;
      const RowTile& row = pass_.row_tiles[i];
      for_each_visit(pass_.runs.data() + row.first_run, pass_.runs.data() + row.end_run,
                     [&](std::int32_t tile, std::int32_t) { ++visits[index(tile)]; });
    }
    return visits;
  }

  /// The chunk in which long rows visit each key tile: of those whose short rows touch it, as they
  /// have a place for its gradient, the one with the least to do; a tile that none touches goes
  /// with its share of the keys.
  std::vector<int> homes() const {
    std::vector<std::int64_t> work(index(chunks_));
    for (const Piece& piece : pieces_)
      work[index(piece.chunk)] += weights_[index(piece.segment.row_tile)] + 1;
    const auto has_less = [&](int a, int b) { return work[index(a)] < work[index(b)]; };
    const std::vector<std::vector<int>> by = touched();
    const std::vector<std::int64_t> visits = long_visits();
    std::vector<int> home(by.size());
    for (std::size_t t = 0; t < home.size(); ++t) {
      home[t] = by[t].empty() ? static_cast<int>(t * index(chunks_) / home.size())
                              : *std::min_element(by[t].begin(), by[t].end(), has_less);
      work[index(home[t])] += visits[t];
    }
    return home;
  }

  void spread_long_rows() {
    if (std::find(long_.begin(), long_.end(), true) == long_.end()) return;
    const std::vector<int> home = homes();
    for (std::size_t i = 0; i < long_.size(); ++i) {
      if (long_[i]) spread(static_cast<std::int32_t>(i), home);
    }
  }

  /// One segment of the row tile for each chunk that is home to some of its keys.
  void spread(std::int32_t row_tile, const std::vector<int>& home) {
    const RowTile& row = pass_.row_tiles[index(row_tile)];
    std::vector<std::vector<Run>> parts(index(chunks_));
    const Run* runs = pass_.runs.data();
    for_each_visit(
        runs + row.first_run, runs + row.end_run, [&](std::int32_t tile, std::int32_t mask) {
          std::vector<Run>& part = parts[index(home[index(tile)])];
          const bool joins = mask == kFull && !part.empty() && part.back().mask == kFull &&
                             part.back().key_tile + part.back().count == tile;
          if (joins) {
            ++part.back().count;
          } else {
            part.push_back({tile, 1, mask});
          }
        });
    const std::int32_t first_slot = out_.row_slots;
    for (int c = 0; c < chunks_; ++c) {
      const std::vector<Run>& part = parts[index(c)];
      if (part.empty()) continue;
      const auto first = static_cast<std::uint32_t>(out_.runs.size());
      out_.runs.insert(out_.runs.end(), part.begin(), part.end());
      pieces_.push_back(
          {c, {row_tile, out_.row_slots++, first, static_cast<std::uint32_t>(out_.runs.size())}});
    }
    out_.row_reductions.push_back({row_tile, first_slot, out_.row_slots});
  }

  void lay_out() {
    auto piece = pieces_.begin();
    for (int c = 0; c < chunks_; ++c) {
      const auto first = static_cast<std::uint32_t>(out_.segments.size());
      for (; piece != pieces_.end() && piece->chunk == c; ++piece)
        out_.segments.push_back(piece->segment);
      out_.chunks.push_back({first, static_cast<std::uint32_t>(out_.segments.size()), 0, 0});
    }
  }

  /// The first chunk to touch a tile of the partition adds to the gradient itself; the others, and
  /// all that touch a gathered tile, whose keys are in the partition too, get a slot.
  void share_key_tiles() {
    const std::vector<std::vector<int>> by = touched();
    std::vector<std::vector<SharedTile>> shared(index(chunks_));
    for (std::size_t t = 0; t < by.size(); ++t) {
      const bool gathered = static_cast<std::int64_t>(t) >= pass_.affine_key_tiles;
      const std::int32_t first = out_.key_slots;
      for (std::size_t i = gathered ? 0 : 1; i < by[t].size(); ++i) {
        shared[index(by[t][i])].push_back({static_cast<std::int32_t>(t), out_.key_slots++});
      }
      if (out_.key_slots > first)
        out_.key_reductions.push_back({static_cast<std::int32_t>(t), first, out_.key_slots});
    }
    for (int c = 0; c < chunks_; ++c) {
      Chunk& chunk = out_.chunks[index(c)];
      chunk.first_shared = static_cast<std::uint32_t>(out_.shared_tiles.size());
      out_.shared_tiles.insert(out_.shared_tiles.end(), shared[index(c)].begin(),
                               shared[index(c)].end());
      chunk.end_shared = static_cast<std::uint32_t>(out_.shared_tiles.size());
    }
  }

  const Pass& pass_;
  const bool backward_;
  const int chunks_;
  PassPartition out_;
  std::vector<std::int64_t> weights_;
  std::vector<bool> long_;
  std::vector<Piece> pieces_;
};

/// The finest partition of at most `chunks` whose slots need no more memory than the tensors that
/// they add up to.
PassPartition partition(const Pass& pass, Direction direction, int chunks) {
  for (;; chunks /= 2) {
    PassPartition made = Partitioner(pass, direction, chunks).make();
    const auto rows = static_cast<std::int64_t>(pass.row_tiles.size());
    if (chunks == 1 || (made.key_slots <= pass.affine_key_tiles &&
                        made.row_slots <= std::max<std::int64_t>(rows, 64))) {
      return made;
    }
  }
}

template <class T>
Array<T> array(const std::vector<T>& v) {
  return {v.data(), static_cast<std::int64_t>(v.size())};
}

}  // namespace

Schedule::Schedule(std::shared_ptr<const Plan> plan, Direction direction, int chunks)
    : plan_(std::move(plan)) {
  partitions_.reserve(plan_->passes.size());
  for (const Pass& pass : plan_->passes) {
    partitions_.push_back(partition(pass, direction, chunks));
    const PassPartition& p = partitions_.back();
    passes_.push_back({array(pass.row_tiles), array(pass.key_tiles), array(p.runs),
                       array(p.segments), array(p.chunks), array(p.shared_tiles),
                       array(p.row_reductions), array(p.key_reductions), p.row_slots, p.key_slots});
  }
  view_.passes = array(passes_);
  view_.token_list = plan_->token_list.data();
  view_.masks = reinterpret_cast<const std::uint64_t(*)[kMaxTile]>(plan_->masks.data());
  view_.tile_keys = plan_->tile.keys;
  if (plan_->lists->keys.empty()) return;
  view_.keys_of_query = {plan_->lists->starts.data(), plan_->lists->keys.data()};
  if (direction == Direction::kForward) return;
  queries_of_key_ = transposed(*plan_->lists, plan_->sizes.n_k);
  view_.queries_of_key = {queries_of_key_.starts.data(), queries_of_key_.keys.data()};
}

std::int64_t Schedule::bytes() const {
  std::int64_t total =
      plan_->bytes() + bytes_of(queries_of_key_.starts) + bytes_of(queries_of_key_.keys);
  for (const PassPartition& p : partitions_) total += p.bytes();
  return total;
}

int chunk_count(const Plan& plan, std::int64_t heads) {
  std::int64_t visits = 0;
  for (const Pass& pass : plan.passes) {
    for (const Run& run : pass.runs) visits += run.count;
  }
  const std::int64_t wanted = (kTargetShares + heads - 1) / std::max<std::int64_t>(heads, 1);
  int chunks = 1;
  while (chunks < wanted && 2 * chunks * kLeastVisits <= visits) chunks *= 2;
  return chunks;
}

}  // namespace sparse_attn
