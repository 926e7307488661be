// Builds a plan from the terms of a pattern.
//
// Each part of the pattern is tiled in the order that makes it dense (layers.h): a dilated window
// by residue classes, listed keys gathered into tiles of their own, everything else in natural
// order. Parts of one order share a pass. A pair that several parts allow belongs to the first of
// them: the later ones mask it out. Rows that see (nearly) everything, the global queries, are
// listed into tiles of their own in the first pass and owned by no other tile. Pairs that are
// scattered so thinly that tiles would be almost empty go to lists of keys, one for each query.
#include <algorithm>
#include <unordered_map>
#include <utility>

#include "patterns/tokens.h"
#include "plan/layers.h"
#include "plan/lists.h"
#include "plan/plan.h"

namespace sparse_attn {
namespace {

constexpr std::int32_t kNothing = -2;  // a mask that allows no pair

/// Beyond so many pairs (256 MiB) tiles that others resemble stay tiles; beyond a gigabyte, all.
constexpr std::size_t kMostListed = std::size_t{1} << 26, kMostOfAll = std::size_t{1} << 28;

std::size_t index(std::int64_t i) { return static_cast<std::size_t>(i); }

struct SignatureHash {
  std::size_t operator()(const Signature& words) const {
    std::uint64_t h = 0x9e3779b97f4a7c15u;
    for (const std::int64_t w : words)
      h = (h ^ static_cast<std::uint64_t>(w)) * 0xff51afd7ed558ccdu, h ^= h >> 32;
    return h;
  }
};

std::uint64_t low_bits(std::int64_t n) {
  return n >= 64 ? ~std::uint64_t{0} : (std::uint64_t{1} << n) - 1;
}

class Builder {
 public:
  Builder(const Terms& terms, Sizes sizes, TileShape tile, Listing listing, Target target)
      : all_{std::make_shared<UnionOf>(terms)},
        parts_(terms),
        layers_(parts_.layers()),
        listed_positions_(parts_.positions),
        listing_(listing),
        target_(target),
        listed_pair_(pairs_for_listed(target)) {
    plan_.sizes = sizes;
    plan_.tile = tile;
  }

  Plan build() {
    if (parts_.ordered.empty()) add_pass(1);
    const std::int64_t longest = std::max<std::int64_t>({plan_.sizes.n_q, plan_.sizes.n_k, 1});
    for (const auto& [step, same_order] : parts_.ordered) add_pass(std::min(step, longest));
    add_lists();
    return std::move(plan_);
  }

 private:
  /// How many layers come before those of lists.
  std::size_t tiled_layers() const { return layers_.size() - parts_.of_lists.size(); }

  void add_pass(std::int64_t step) {
    first_pass_ = plan_.passes.empty();
    plan_.passes.emplace_back();
    pass_ = &plan_.passes.back();
    pass_->step = step;
    add_key_tiles();
    if (first_pass_) {
      for (const Gather& g : parts_.gathers) add_gathered_tiles(*g.keys->key_list());
      add_listed_rows();
    }
    for (std::int64_t residue = 0; residue < std::min(step, plan_.sizes.n_q); ++residue) {
      add_residue_rows(residue);
    }
  }

  void add_key_tiles() {
    const std::int64_t n = plan_.sizes.n_k, step = pass_->step;
    residue_tiles_.assign(1, 0);
    for (std::int64_t residue = 0; residue < std::min(step, n); ++residue) {
      const std::int64_t count = (n - residue + step - 1) / step;
      for (std::int64_t i = 0; i < count; i += plan_.tile.keys) {
        pass_->key_tiles.push_back(
            {residue + i * step, static_cast<std::int32_t>(step),
             static_cast<std::int32_t>(std::min<std::int64_t>(plan_.tile.keys, count - i)), -1});
      }
      residue_tiles_.push_back(static_cast<std::int32_t>(pass_->key_tiles.size()));
    }
    pass_->affine_key_tiles = static_cast<std::int64_t>(pass_->key_tiles.size());
  }

  void add_gathered_tiles(const TokenList& keys) {
    gather_tiles_.push_back(static_cast<std::int32_t>(pass_->key_tiles.size()));
    const auto base = static_cast<std::int64_t>(plan_.token_list.size());
    const auto size = static_cast<std::int64_t>(keys.size());
    plan_.token_list.insert(plan_.token_list.end(), keys.begin(), keys.end());
    for (std::int64_t i = 0; i < size; i += plan_.tile.keys) {
      const auto count =
          static_cast<std::int32_t>(std::min<std::int64_t>(plan_.tile.keys, size - i));
      pass_->key_tiles.push_back({0, 1, count, base + i});
    }
  }

  /// Tiles of the global queries: each visits whatever the whole pattern allows.
  void add_listed_rows() {
    const std::int64_t offset = plan_.sizes.offset();
    const auto base = static_cast<std::int64_t>(plan_.token_list.size());
    TokenList positions;
    for (const std::int64_t p : listed_positions_) {
      if (p < offset) continue;  // the token stands before the first query
      positions.push_back(p);
      plan_.token_list.push_back(p - offset);
    }
    listed_positions_ = std::move(positions);
    const auto size = static_cast<std::int64_t>(listed_positions_.size());
    for (std::int64_t i = 0; i < size; i += plan_.tile.rows) {
      const auto count =
          static_cast<std::int32_t>(std::min<std::int64_t>(plan_.tile.rows, size - i));
      begin_row_tile({0, 1, count, base + i}, {0, 1, count, listed_positions_.data() + i},
                     low_bits(count));
      for (std::size_t r = 0; r + 1 < residue_tiles_.size(); ++r) {
        descend({all_, nullptr, 0}, residue_tiles_[r], residue_tiles_[r + 1]);
      }
      end_row_tile();
    }
  }

  void add_residue_rows(std::int64_t residue) {
    const std::int64_t n = plan_.sizes.n_q, step = pass_->step, offset = plan_.sizes.offset();
    const std::int64_t count = (n - residue + step - 1) / step;
    const std::int64_t key_residue = ((residue + offset) % step + step) % step;
    for (std::int64_t i = 0; i < count; i += plan_.tile.rows) {
      const auto rows =
          static_cast<std::int32_t>(std::min<std::int64_t>(plan_.tile.rows, count - i));
      const std::int64_t start = residue + i * step;
      const TokenSet positions{start + offset, step, rows, nullptr};
      const std::uint64_t owned = low_bits(rows) & ~members(listed_positions_, positions);
      if (owned == 0) continue;
      begin_row_tile({start, static_cast<std::int32_t>(step), rows, -1}, positions, owned);
      if (first_pass_) {
        for (std::size_t g = 0; g < parts_.gathers.size(); ++g) {
          const std::int32_t end = g + 1 < gather_tiles_.size()
                                       ? gather_tiles_[g + 1]
                                       : static_cast<std::int32_t>(pass_->key_tiles.size());
          descend({parts_.gathers[g].rest, layers_.data(), g}, gather_tiles_[g], end);
        }
      }
      const auto r = static_cast<std::size_t>(key_residue);
      const std::size_t layer = parts_.gathers.size() + plan_.passes.size() - 1;
      const bool any_keys = r + 1 < residue_tiles_.size();  // there may be fewer than residues
      if (any_keys && layer < tiled_layers()) {
        descend({layers_[layer], layers_.data(), layer}, residue_tiles_[r], residue_tiles_[r + 1]);
      }
      end_row_tile();
    }
  }

  void begin_row_tile(Tile rows, TokenSet positions, std::uint64_t owned) {
    positions_ = positions;
    const auto run = static_cast<std::uint32_t>(pass_->runs.size());
    pass_->row_tiles.push_back({rows, owned, run, run});
  }

  /// Counts the tile's pairs, and drops it from a later pass that has nothing to add to it.
  void end_row_tile() {
    RowTile& tile = pass_->row_tiles.back();
    tile.end_run = static_cast<std::uint32_t>(pass_->runs.size());
    if (!first_pass_ && tile.first_run == tile.end_run) {
      pass_->row_tiles.pop_back();
      return;
    }
    const std::int64_t owned_rows = __builtin_popcountll(tile.owned);
    for (std::uint32_t r = tile.first_run; r < tile.end_run; ++r) {
      const Run& run = pass_->runs[r];
      const std::int64_t keys = token_set(run.key_tile, run.key_tile + run.count).count;
      if (run.mask == kFull) {
        plan_.visited += tile.rows.count * keys;
        plan_.pairs += owned_rows * keys;
      } else {
        plan_.visited += plan_.computed[static_cast<std::size_t>(run.mask)];
        for (const std::uint64_t bits : plan_.masks[static_cast<std::size_t>(run.mask)]) {
          plan_.pairs += __builtin_popcountll(bits & tile.owned);
        }
      }
    }
  }

  /// Halves a range of key tiles until each part is covered wholly, not at all, or is one tile with
  /// a mask.
  void descend(const Layer& layer, std::int32_t begin, std::int32_t end) {
    if (begin >= end) return;
    const TokenSet keys = token_set(begin, end);
    switch (layer.cover(positions_, keys)) {
      case Cover::kNone:
        return;
      case Cover::kAll:
        emit(begin, end - begin, kFull);
        return;
      case Cover::kSome:
        break;
    }
    if (end - begin > 1) {
      const std::int32_t middle = begin + (end - begin) / 2;
      descend(layer, begin, middle);
      descend(layer, middle, end);
    } else {
      add_partial(layer, begin, keys);
    }
  }

  TokenSet token_set(std::int32_t begin, std::int32_t end) const {
    const Tile& first = pass_->key_tiles[static_cast<std::size_t>(begin)];
    const Tile& last = pass_->key_tiles[static_cast<std::size_t>(end - 1)];
    const std::int64_t count =
        static_cast<std::int64_t>(end - 1 - begin) * plan_.tile.keys + last.count;
    if (first.list < 0) return {first.start, first.step, count, nullptr};
    return {0, 1, count, plan_.token_list.data() + first.list};
  }

  void emit(std::int32_t key_tile, std::int32_t count, std::int32_t mask) {
    const bool first = pass_->runs.size() == pass_->row_tiles.back().first_run;
    if (!first && mask == kFull) {
      Run& last = pass_->runs.back();
      // Only the last tile of a run may be short, so that the run's keys can be counted.
      const Tile& before = pass_->key_tiles[static_cast<std::size_t>(std::max(key_tile - 1, 0))];
      if (last.mask == kFull && last.key_tile + last.count == key_tile &&
          before.count == plan_.tile.keys) {
        last.count += count;
        return;
      }
    }
    pass_->runs.push_back({key_tile, count, mask});
  }

  /// One key tile that the layer covers in part, as far as its cover tells.
  void add_partial(const Layer& layer, std::int32_t key_tile, const TokenSet& keys) {
    words_.clear();
    const bool repeats = layer.signature(positions_, keys, words_);
    if (repeats) {
      const auto found = mask_ids_.find(words_);
      const std::int32_t mask =
          found != mask_ids_.end() ? found->second : add_mask(mask_of(layer, keys), keys);
      if (found == mask_ids_.end()) mask_ids_.emplace(words_, mask);
      if (mask == kNothing) return;
      const bool listed = mask != kFull && listing_ == Listing::kAll &&
                          loose_.size() < kMostListed && is_sparse(plan_.masks[index(mask)], keys);
      listed ? list(plan_.masks[index(mask)], keys) : emit(key_tile, 1, mask);
      return;
    }
    ++plan_.unique;
    const Mask mask = mask_of(layer, keys);
    if (loose_.size() < kMostOfAll && is_sparse(mask, keys)) {
      list(mask, keys);
    } else if (const std::int32_t id = add_mask(mask, keys); id != kNothing) {
      emit(key_tile, 1, id);
    }
  }

  Mask mask_of(const Layer& layer, const TokenSet& keys) const {
    Mask mask{};
    layer.tile(positions_, keys, mask.data());
    for (std::uint64_t& bits : mask) bits &= low_bits(positions_.count);
    return mask;
  }

  /// kNothing, kFull, or the number of the mask.
  std::int32_t add_mask(const Mask& mask, const TokenSet& keys) {
    const std::uint64_t all = low_bits(positions_.count);
    const auto end = mask.begin() + keys.count;
    if (std::all_of(mask.begin(), end, [&](std::uint64_t bits) { return bits == all; }))
      return kFull;
    if (std::all_of(mask.begin(), end, [](std::uint64_t bits) { return bits == 0; }))
      return kNothing;
    plan_.masks.push_back(mask);
    plan_.computed.push_back(computed_pairs(mask, keys.count));
    return static_cast<std::int32_t>(plan_.masks.size() - 1);
  }

  std::int32_t computed_pairs(const Mask& mask, std::int64_t keys) const {
    const auto rows = static_cast<std::int32_t>(positions_.count);
    const auto key_count = static_cast<std::int32_t>(keys);
    if (target_ == Target::kGpu) return rows * key_count;
    std::int32_t pairs = 0;
    for (std::int32_t first = 0; first < rows; first += kVectorRows) {
      const std::int32_t count = std::min(rows - first, kVectorRows);
      const std::uint64_t group = low_bits(count) << first;
      std::int32_t begin = 0, end = key_count;
      while (begin < end && !(mask[index(begin)] & group)) ++begin;
      while (begin < end && !(mask[index(end - 1)] & group)) --end;
      pairs += count * (end - begin);
    }
    return pairs;
  }

  bool is_sparse(const Mask& mask, const TokenSet& keys) const {
    return listed_pair_ * pairs_in(mask) < positions_.count * keys.count;
  }

  /// Of the rows that the tile at hand owns.
  std::int64_t pairs_in(const Mask& mask) const {
    std::int64_t pairs = 0;
    for (const std::uint64_t bits : mask)
      pairs += __builtin_popcountll(bits & pass_->row_tiles.back().owned);
    return pairs;
  }

  void list(const Mask& mask, const TokenSet& keys) {
    for (std::int64_t k = 0; k < keys.count; ++k) {
      std::uint64_t bits = mask[index(k)] & pass_->row_tiles.back().owned;
      for (; bits != 0; bits &= bits - 1) list(positions_[__builtin_ctzll(bits)], keys[k]);
    }
  }

  void list(std::int64_t position, std::int64_t key) {
    loose_.push_back({static_cast<std::int32_t>(position - plan_.sizes.offset()),
                      static_cast<std::int32_t>(key)});
  }

  /// The lists that terms bring along, less what other layers and the listed rows have, and the
  /// pairs of sparse tiles.
  void add_lists() {
    const bool as_they_are = parts_.of_lists.size() == 1 && layers_.size() == 1 &&
                             parts_.of_lists[0].size() == 1 && listed_positions_.empty();
    if (as_they_are) {
      plan_.lists = parts_.of_lists[0][0]->lists();
    } else {
      for (std::size_t i = tiled_layers(); i < layers_.size(); ++i) list_layer(i);
      if (!loose_.empty())
        plan_.lists = std::make_shared<const Lists>(lists_of(loose_, plan_.sizes.n_q));
    }
    const auto listed = static_cast<std::int64_t>(plan_.lists->keys.size());
    plan_.pairs += listed;
    plan_.visited += listed;
  }

  void list_layer(std::size_t i) {
    const Layer layer{layers_[i], layers_.data(), i};
    const auto brings = [](const PrimitivePtr& p) { return p->lists() != nullptr; };
    const auto owner = std::find_if(layer.term.begin(), layer.term.end(), brings);
    const Lists& lists = *(*owner)->lists();
    for (std::int64_t query = 0; query < plan_.sizes.n_q; ++query) {
      const std::int64_t position = query + plan_.sizes.offset();
      if (std::binary_search(listed_positions_.begin(), listed_positions_.end(), position))
        continue;
      for (auto k = lists.starts[index(query)]; k < lists.starts[index(query + 1)]; ++k) {
        const std::int64_t key = lists.keys[index(k)];
        if (layer.contains(position, key)) list(position, key);
      }
    }
  }

  Plan plan_;
  Term all_;  // the whole pattern, for the listed rows
  Parts parts_;
  Terms layers_;
  TokenList listed_positions_;  // those that queries stand at
  Listing listing_;
  Target target_;
  std::int64_t listed_pair_;
  std::vector<Pair> loose_;  // pairs that no tile holds
  std::unordered_map<Signature, std::int32_t, SignatureHash> mask_ids_;

  bool first_pass_ = true;
  Pass* pass_ = nullptr;
  TokenSet positions_;                       // of the row tile at hand
  std::vector<std::int32_t> residue_tiles_;  // first key tile of each residue class, and the end
  std::vector<std::int32_t> gather_tiles_;   // first key tile of each gather
  Signature words_;
};

}  // namespace

Plan build_plan(const Terms& terms, Sizes sizes, TileShape tile, Listing listing, Target target) {
  return Builder(terms, sizes, tile, listing, target).build();
}

std::int64_t Plan::bytes() const {
  std::int64_t total = bytes_of(token_list) + bytes_of(masks) + bytes_of(computed) +
                       bytes_of(lists->starts) + bytes_of(lists->keys);
  for (const Pass& pass : passes) {
    total += bytes_of(pass.row_tiles) + bytes_of(pass.key_tiles) + bytes_of(pass.runs);
  }
  return total;
}

}  // namespace sparse_attn
