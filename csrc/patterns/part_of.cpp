#include "patterns/part_of.h"

#include <algorithm>
#include <array>
#include <stdexcept>
#include <string>
#include <utility>

#include "patterns/tokens.h"

namespace sparse_attn {
namespace {

constexpr std::int64_t kTile = 64;

/// Of an arithmetic progression, the members of a run, in the numbers of the whole.
TokenSet within(const TokenSet& set, const TokenRun& run) {
  const std::int64_t before = std::max<std::int64_t>(run.place - set.start, 0);
  const std::int64_t first = (before + set.step - 1) / set.step;
  const std::int64_t room = run.place + run.count - set.start;
  const std::int64_t end = room <= 0 ? 0 : std::min(set.count, (room + set.step - 1) / set.step);
  return {set.start + first * set.step + run.token - run.place, set.step,
          std::max<std::int64_t>(end - first, 0), nullptr};
}

/// The tokens of a tile. Where they are not in arithmetic progression they are listed here.
class MappedTile {
 public:
  MappedTile(const TokenRuns& runs, const TokenSet& set, std::int64_t from_place,
             std::int64_t to_token) {
    const auto run = run_of(runs, set.first() + from_place, &TokenRun::place);
    const bool inside =
        !set.list && run != runs.end() && set.last() + from_place < run->place + run->count;
    if (inside) {
      set_ = {set.start + from_place + run->token - run->place + to_token, set.step, set.count,
              nullptr};
      known_ = set.count == kTile ? ~std::uint64_t{0} : (std::uint64_t{1} << set.count) - 1;
      return;
    }
    std::int64_t count = 0;
    for (std::int64_t i = 0; i < set.count; ++i) {
      const std::int64_t token = token_at(runs, set[i] + from_place);
      if (token == kNoToken) continue;
      known_ |= std::uint64_t{1} << i;
      list_[static_cast<std::size_t>(count++)] = token + to_token;
    }
    set_ = {0, 1, count, list_.data()};
  }
  MappedTile(const MappedTile&) = delete;
  MappedTile& operator=(const MappedTile&) = delete;

  /// In ascending order; those without a token are left out.
  const TokenSet& set() const { return set_; }
  /// Which of the tile's tokens there are.
  std::uint64_t known() const { return known_; }

 private:
  TokenSet set_;
  std::uint64_t known_ = 0;
  std::array<std::int64_t, kTile> list_;
};

/// Both numberings, shared by all primitives of a part.
struct Numbering {
  Part part;
  Sizes sizes;  // of the part

  std::int64_t query(std::int64_t position) const { return position - sizes.offset(); }
  MappedTile positions(const TokenSet& set) const {
    return {part.queries, set, -sizes.offset(), part.whole.offset()};
  }
  MappedTile keys(const TokenSet& set) const { return {part.keys, set, 0, 0}; }

  /// Whether residue classes modulo `step` are the same ones in both numberings.
  bool keeps_classes(std::int64_t step) const {
    const std::int64_t shift = part.whole.offset() - sizes.offset();
    const auto classes = [&](const TokenRuns& runs, std::int64_t more) {
      return std::all_of(runs.begin(), runs.end(), [&](const TokenRun& run) {
        return (run.token - run.place + more - reference(shift)) % step == 0;
      });
    };
    return classes(part.queries, shift) && classes(part.keys, 0);
  }

 private:
  std::int64_t reference(std::int64_t shift) const {
    const TokenRun& first = part.queries.front();
    return first.token - first.place + shift;
  }
};

/// All positions but these: what blind queries are left out with.
class OtherQueries final : public Primitive {
 public:
  explicit OtherQueries(TokenList positions) : positions_(std::move(positions)) {}

  bool contains(std::int64_t position, std::int64_t) const override {
    return !std::binary_search(positions_.begin(), positions_.end(), position);
  }
  void tile(const TokenSet& positions, const TokenSet& keys, std::uint64_t* words) const override {
    std::fill_n(words, keys.count, ~members(positions_, positions));
  }
  Cover cover(const TokenSet& positions, const TokenSet&) const override {
    return complement(cover_of(positions_, positions));
  }
  bool signature(const TokenSet& positions, const TokenSet&, Signature& out) const override {
    out.push_back(static_cast<std::int64_t>(members(positions_, positions)));
    return true;
  }

 private:
  TokenList positions_;
};

class Everything final : public PrimitiveBase<Everything> {
 public:
  bool contains(std::int64_t, std::int64_t) const override { return true; }
  Cover cover(const TokenSet&, const TokenSet&) const override { return Cover::kAll; }
  bool signature(const TokenSet&, const TokenSet&, Signature&) const override { return true; }
};

/// A primitive of the whole as the part numbers its tokens.
class PartOf final : public Primitive {
 public:
  PartOf(PrimitivePtr whole, std::shared_ptr<const Numbering> numbering)
      : whole_(std::move(whole)), numbering_(std::move(numbering)) {
    const Part& part = numbering_->part;
    if (const TokenList* tokens = whole_->key_list()) {
      for (const std::int64_t token : *tokens) add(keys_, place_of(part.keys, token), 0);
    }
    if (const TokenList* positions = whole_->position_list()) {
      for (const std::int64_t position : *positions)
        add(positions_, place_of(part.queries, position - part.whole.offset()),
            numbering_->sizes.offset());
    }
    if (const auto lists = whole_->lists()) lists_ = renumbered_lists(*lists);
  }

  bool contains(std::int64_t position, std::int64_t key) const override {
    const Part& part = numbering_->part;
    const std::int64_t query = token_at(part.queries, numbering_->query(position));
    const std::int64_t token = token_at(part.keys, key);
    return query != kNoToken && token != kNoToken &&
           whole_->contains(query + part.whole.offset(), token);
  }

  void tile(const TokenSet& positions, const TokenSet& keys, std::uint64_t* words) const override {
    const MappedTile rows = numbering_->positions(positions), columns = numbering_->keys(keys);
    std::uint64_t known_words[kTile];
    whole_->tile(rows.set(), columns.set(), known_words);
    const std::uint64_t* next = known_words;
    for (std::int64_t k = 0; k < keys.count; ++k) words[k] = columns.known() >> k & 1 ? *next++ : 0;
  }

  Cover cover(const TokenSet& positions, const TokenSet& keys) const override {
    const MappedTile rows = numbering_->positions(positions);
    std::int64_t seen = 0;  // keys that have a token
    bool any = false, all = true;
    for_each_run(keys, [&](const TokenSet& of_run) {
      seen += of_run.count;
      const Cover c = whole_->cover(rows.set(), of_run);
      any = any || c != Cover::kNone;
      all = all && c == Cover::kAll;
      return all || !any;
    });
    all = all && seen == keys.count;
    return !any ? Cover::kNone : all ? Cover::kAll : Cover::kSome;
  }

  /// Lists and progressions describe themselves in words of their own.
  bool signature(const TokenSet& positions, const TokenSet& keys, Signature& out) const override {
    const MappedTile rows = numbering_->positions(positions), columns = numbering_->keys(keys);
    out.push_back((rows.set().list ? 2 : 0) + (columns.set().list ? 1 : 0));
    out.push_back(static_cast<std::int64_t>(columns.known()));
    return whole_->signature(rows.set(), columns.set(), out);
  }

  bool includes(const Primitive& other) const override {
    const auto* part = dynamic_cast<const PartOf*>(&other);
    return part && part->numbering_ == numbering_ && whole_->includes(*part->whole_);
  }

  std::int64_t step() const override {
    return numbering_->keeps_classes(whole_->step()) ? whole_->step() : 1;
  }
  std::int64_t block() const override { return whole_->block(); }
  const TokenList* key_list() const override { return whole_->key_list() ? &keys_ : nullptr; }
  const TokenList* position_list() const override {
    return whole_->position_list() ? &positions_ : nullptr;
  }
  std::shared_ptr<const Lists> lists() const override { return lists_; }

 private:
  static void add(TokenList& list, std::int64_t place, std::int64_t shift) {
    if (place != kNoToken) list.push_back(place + shift);
  }

  /// Calls visit(tokens of the whole) for the keys of each run, until it returns false.
  template <class Visit>
  void for_each_run(const TokenSet& keys, const Visit& visit) const {
    const TokenRuns& runs = numbering_->part.keys;
    auto run = run_of(runs, keys.first(), &TokenRun::place);
    if (run == runs.end()) run = runs.begin();
    std::vector<std::int64_t> listed;
    std::int64_t next = 0;
    for (; run != runs.end() && run->place <= keys.last(); ++run) {
      TokenSet of_run = keys.list ? TokenSet{} : within(keys, *run);
      if (keys.list) {
        const std::int64_t end = run->place + run->count;
        listed.clear();
        for (; next < keys.count && keys[next] < end; ++next) {
          if (keys[next] >= run->place) listed.push_back(keys[next] - run->place + run->token);
        }
        of_run = {0, 1, static_cast<std::int64_t>(listed.size()), listed.data()};
      }
      if (of_run.count > 0 && !visit(of_run)) return;
    }
  }

  std::shared_ptr<const Lists> renumbered_lists(const Lists& whole) const {
    const Part& part = numbering_->part;
    auto made = std::make_shared<Lists>();
    made->starts.push_back(0);
    for (const TokenRun& run : part.queries) {
      for (std::int64_t query = run.token; query < run.token + run.count; ++query) {
        const auto row = static_cast<std::size_t>(query);
        for (std::int64_t k = whole.starts[row]; k < whole.starts[row + 1]; ++k) {
          const std::int64_t key = place_of(part.keys, whole.keys[static_cast<std::size_t>(k)]);
          if (key != kNoToken) made->keys.push_back(static_cast<std::int32_t>(key));
        }
        made->starts.push_back(static_cast<std::int64_t>(made->keys.size()));
      }
    }
    return made;
  }

  PrimitivePtr whole_;
  std::shared_ptr<const Numbering> numbering_;
  TokenList keys_, positions_;
  std::shared_ptr<const Lists> lists_;
};

void check_sizes(const Part& part, Sizes sizes) {
  const auto end = [](const TokenRuns& runs) {
    return runs.empty() ? 0 : runs.back().place + runs.back().count;
  };
  if (end(part.queries) == sizes.n_q && end(part.keys) <= sizes.n_k) return;
  throw std::invalid_argument("expected a part of " + std::to_string(end(part.queries)) +
                              " queries and at least " + std::to_string(end(part.keys)) +
                              " keys, got " + std::to_string(sizes.n_q) + " and " +
                              std::to_string(sizes.n_k));
}

}  // namespace

Terms take_part(const Part& part, Sizes sizes, Terms whole) {
  check_sizes(part, sizes);
  if (part.queries.empty() || part.keys.empty()) return {};
  const auto numbering = std::make_shared<const Numbering>(Numbering{part, sizes});
  const TokenRun& last = part.keys.back();
  std::int64_t held = 0;
  for (const TokenRun& run : part.keys) held += run.count;
  const bool gaps = held < sizes.n_k || last.place + last.count > held;
  const auto others =
      std::make_shared<OtherQueries>(part.blind_positions());  // one for all terms: they are alike
  for (Term& term : whole) {
    if (!part.blind.empty()) term.push_back(others);
    if (term.empty() && gaps) term.push_back(std::make_shared<Everything>());
    for (PrimitivePtr& p : term) p = std::make_shared<PartOf>(std::move(p), numbering);
  }
  return whole;
}

}  // namespace sparse_attn
