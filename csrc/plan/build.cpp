// Builds a plan from the terms of a pattern.
//
// Each term is tiled in the order that makes it dense: a dilated window by residue classes, listed
// keys gathered into tiles of their own, everything else in natural order. Terms of one order share
// a pass. A pair that several terms allow belongs to the first of them: the later ones mask it out.
// Rows that see (nearly) everything, the global queries, are listed into tiles of their own in the
// first pass and owned by no other tile.
#include <algorithm>
#include <map>
#include <unordered_map>
#include <utility>

#include "patterns/tokens.h"
#include "patterns/union.h"
#include "plan/plan.h"

namespace sparse_attn {
namespace {

constexpr std::int32_t kNothing = -2;  // a mask that allows no pair

struct SignatureHash {
  std::size_t operator()(const Signature& words) const {
    std::uint64_t h = 0x9e3779b97f4a7c15u;
    for (const std::int64_t w : words)
      h = (h ^ static_cast<std::uint64_t>(w)) * 0xff51afd7ed558ccdu, h ^= h >> 32;
    return h;
  }
};

/// A term without the pairs of earlier ones.
struct Layer {
  const Term& term;
  const Term* earlier;
  std::size_t earlier_count;

  Cover cover(const TokenSet& positions, const TokenSet& keys) const {
    Cover c = sparse_attn::cover(term, positions, keys);
    for (std::size_t i = 0; i < earlier_count && c != Cover::kNone; ++i) {
      const Cover other = complement(sparse_attn::cover(earlier[i], positions, keys));
      if (other != Cover::kAll) c = other;
    }
    return c;
  }

  /// Begins with the layer itself (listed rows have one of their own), whose parameters the words
  /// leave out.
  void signature(const TokenSet& positions, const TokenSet& keys, Signature& out) const {
    out.push_back(positions.list ? -1 : static_cast<std::int64_t>(earlier_count));
    out.push_back(positions.count);
    out.push_back(keys.count);
    sparse_attn::signature(term, positions, keys, out);
    for (std::size_t i = 0; i < earlier_count; ++i)
      sparse_attn::signature(earlier[i], positions, keys, out);
  }

  std::uint64_t row_bits(const TokenSet& positions, std::int64_t key) const {
    std::uint64_t bits = sparse_attn::row_bits(term, positions, key);
    for (std::size_t i = 0; i < earlier_count; ++i)
      bits &= ~sparse_attn::row_bits(earlier[i], positions, key);
    return bits;
  }
};

std::uint64_t low_bits(std::int64_t n) {
  return n >= 64 ? ~std::uint64_t{0} : (std::uint64_t{1} << n) - 1;
}

/// Listed keys of a term, and what else the term asks for.
struct Gather {
  TokenList keys;
  Term rest;
};

class Builder {
 public:
  Builder(const Terms& terms, Sizes sizes, TileShape tile)
      : all_{std::make_shared<UnionOf>(terms)} {
    plan_.sizes = sizes;
    plan_.tile = tile;
    for (const Term& term : terms) sort_out(term);
    for (const Gather& g : gathers_) {
      layers_.push_back(g.rest);
      layers_.back().push_back(std::make_shared<GlobalKeys>(g.keys));
    }
    for (const auto& [step, same_order] : ordered_) {
      layers_.push_back(same_order.size() == 1 ? same_order[0]
                                               : Term{std::make_shared<UnionOf>(same_order)});
    }
  }

  Plan build() {
    if (ordered_.empty()) add_pass(1);
    const std::int64_t longest = std::max<std::int64_t>({plan_.sizes.n_q, plan_.sizes.n_k, 1});
    for (const auto& [step, same_order] : ordered_) add_pass(std::min(step, longest));
    return std::move(plan_);
  }

 private:
  static std::int64_t step_of(const Term& term) {
    std::int64_t step = 1;
    for (const PrimitivePtr& p : term) step = std::max(step, p->step());
    return step;
  }

  /// Global queries to their list, listed keys to a gather, the rest to the residue order of its
  /// widest step.
  void sort_out(const Term& term) {
    for (const PrimitivePtr& p : term) {
      if (!p->position_list()) continue;
      listed_positions_.insert(listed_positions_.end(), p->position_list()->begin(),
                               p->position_list()->end());
      std::sort(listed_positions_.begin(), listed_positions_.end());
      listed_positions_.erase(std::unique(listed_positions_.begin(), listed_positions_.end()),
                              listed_positions_.end());
      return;  // no other row is in this term
    }
    for (const PrimitivePtr& p : term) {
      if (!p->key_list()) continue;
      Term rest = term;
      rest.erase(std::find(rest.begin(), rest.end(), p));
      add_gather({*p->key_list(), std::move(rest)});
      return;
    }
    ordered_[step_of(term)].push_back(term);
  }

  void add_gather(Gather gather) {
    const auto equal = [](const Term& a, const Term& b) {
      return a.size() == b.size() &&
             std::equal(a.begin(), a.end(), b.begin(), [](const auto& p, const auto& q) {
               return p->includes(*q) && q->includes(*p);
             });
    };
    for (Gather& present : gathers_) {
      if (!equal(present.rest, gather.rest)) continue;
      TokenList both;
      std::set_union(present.keys.begin(), present.keys.end(), gather.keys.begin(),
                     gather.keys.end(), std::back_inserter(both));
      present.keys = std::move(both);
      return;
    }
    gathers_.push_back(std::move(gather));
  }

  void add_pass(std::int64_t step) {
    first_pass_ = plan_.passes.empty();
    plan_.passes.emplace_back();
    pass_ = &plan_.passes.back();
    pass_->step = step;
    add_key_tiles();
    if (first_pass_) {
      for (const Gather& g : gathers_) add_gathered_tiles(g.keys);
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
        for (std::size_t g = 0; g < gathers_.size(); ++g) {
          const std::int32_t end = g + 1 < gather_tiles_.size()
                                       ? gather_tiles_[g + 1]
                                       : static_cast<std::int32_t>(pass_->key_tiles.size());
          descend({layers_[g], layers_.data(), g}, gather_tiles_[g], end);
        }
      }
      const auto r = static_cast<std::size_t>(key_residue);
      const std::size_t layer = gathers_.size() + plan_.passes.size() - 1;
      const bool any_keys = r + 1 < residue_tiles_.size();  // there may be fewer than residues
      if (any_keys && layer < layers_.size()) {
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
      plan_.visited += tile.rows.count * keys;
      if (run.mask == kFull) {
        plan_.pairs += owned_rows * keys;
      } else {
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
    } else if (const std::int32_t mask = mask_id(layer, keys); mask != kNothing) {
      emit(begin, 1, mask);
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

  std::int32_t mask_id(const Layer& layer, const TokenSet& keys) {
    words_.clear();
    layer.signature(positions_, keys, words_);
    const auto [found, is_new] = mask_ids_.try_emplace(words_, kNothing);
    if (!is_new) return found->second;
    Mask mask{};
    const std::uint64_t valid = low_bits(positions_.count);
    bool any = false, all = true;
    for (std::int64_t k = 0; k < keys.count; ++k) {
      const std::uint64_t bits = layer.row_bits(positions_, keys[k]) & valid;
      mask[static_cast<std::size_t>(k)] = bits;
      any = any || bits != 0;
      all = all && bits == valid;
    }
    if (all) return found->second = kFull;
    if (!any) return kNothing;
    plan_.masks.push_back(mask);
    return found->second = static_cast<std::int32_t>(plan_.masks.size() - 1);
  }

  Plan plan_;
  Term all_;                               // the whole pattern, for the listed rows
  std::vector<Gather> gathers_;            // terms of listed keys
  std::map<std::int64_t, Terms> ordered_;  // terms in residue order, by step: a pass for each
  Terms layers_;                           // both, in the order in which they claim pairs
  TokenList listed_positions_;
  std::unordered_map<Signature, std::int32_t, SignatureHash> mask_ids_;

  bool first_pass_ = true;
  Pass* pass_ = nullptr;
  TokenSet positions_;                       // of the row tile at hand
  std::vector<std::int32_t> residue_tiles_;  // first key tile of each residue class, and the end
  std::vector<std::int32_t> gather_tiles_;   // first key tile of each gather
  Signature words_;
};

}  // namespace

Plan build_plan(const Terms& terms, Sizes sizes, TileShape tile) {
  return Builder(terms, sizes, tile).build();
}

std::int64_t Plan::bytes() const {
  std::int64_t total = bytes_of(token_list) + bytes_of(masks);
  for (const Pass& pass : passes) {
    total += bytes_of(pass.row_tiles) + bytes_of(pass.key_tiles) + bytes_of(pass.runs);
  }
  return total;
}

}  // namespace sparse_attn
