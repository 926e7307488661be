#include "cpu/shared_keys.h"

#include <algorithm>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/for_each.h"

namespace sparse_attn::cpu {
namespace {

using Size = std::size_t;

/// Queries whose keys are listed by one thread, one after another.
constexpr std::int64_t kBlock = 256;

void check(const char* side, const Groups& g, std::int64_t sets, std::int64_t groups) {
  for (std::int64_t s = 0; s < sets; ++s) {
    const std::int64_t* offsets = g.offsets + s * (groups + 1);
    const bool ascend = offsets[0] >= 0 && std::is_sorted(offsets, offsets + groups + 1) &&
                        offsets[groups] <= g.places;
    if (!ascend) {
      throw std::invalid_argument(std::string("expected ") + side +
                                  "_offsets that ascend from 0 to the number of members, " +
                                  std::to_string(g.places) + ", got others");
    }
    for (std::int64_t i = offsets[0]; i < offsets[groups]; ++i) {
      const std::int64_t member = g.members[s * g.places + i];
      if (member < 0 || member >= g.tokens) {
        throw std::invalid_argument(std::string("expected ") + side + "_members in [0, " +
                                    std::to_string(g.tokens) + "), got " + std::to_string(member));
      }
    }
  }
}

/// The groups of each token of a set: (tokens + 1) starts, then numbers of groups.
struct GroupsOfTokens {
  std::vector<std::int64_t> starts, groups;

  void make(const Groups& g, std::int64_t set, std::int64_t count) {
    const std::int64_t* offsets = g.offsets + set * (count + 1);
    const std::int64_t* members = g.members + set * g.places;
    starts.assign(static_cast<Size>(g.tokens) + 2, 0);
    groups.resize(static_cast<Size>(offsets[count] - offsets[0]));
    for (std::int64_t i = offsets[0]; i < offsets[count]; ++i) ++starts[Size(members[i]) + 2];
    for (Size t = 2; t < starts.size(); ++t) starts[t] += starts[t - 1];
    for (std::int64_t c = 0; c < count; ++c) {
      for (std::int64_t i = offsets[c]; i < offsets[c + 1]; ++i)
        groups[Size(starts[Size(members[i]) + 1]++)] = c;
    }
  }
};

/// Adds up sets of keys; takes them out in ascending order.
class KeySet {
 public:
  explicit KeySet(std::int64_t n_k) : words_(Size(n_k + 63) / 64) {}

  void add(std::int64_t key) {
    std::uint64_t& word = words_[Size(key / 64)];
    const std::uint64_t bit = std::uint64_t{1} << key % 64;
    if ((word & bit) == 0) found_.push_back(static_cast<std::int32_t>(key));
    word |= bit;
  }

  /// Appends the keys, and is empty again. Through all words where they are fewer than what sorting
  /// compares.
  void move_to(std::vector<std::int32_t>& keys) {
    if (words_.size() <= 8 * found_.size()) {
      for (Size w = 0; w < words_.size(); ++w) {
        for (; words_[w] != 0; words_[w] &= words_[w] - 1)
          keys.push_back(static_cast<std::int32_t>(64 * w + Size(__builtin_ctzll(words_[w]))));
      }
    } else {
      std::sort(found_.begin(), found_.end());
      keys.insert(keys.end(), found_.begin(), found_.end());
      for (const std::int32_t key : found_) words_[Size(key / 64)] = 0;
    }
    found_.clear();
  }

 private:
  std::vector<std::uint64_t> words_;  // a bit for each key
  std::vector<std::int32_t> found_;
};

}  // namespace

struct SharedKeys::Lists {
  /// Some queries of a set: their keys, and where the keys of each end.
  struct Block {
    std::vector<std::int32_t> keys;
    std::vector<std::int64_t> ends;
  };

  std::int64_t queries = 0, blocks_of_set = 0, longest = 0;
  std::vector<Block> blocks;  // (sets, blocks of a set)

  void list(const SharedKeysCall& call, const GroupsOfTokens& of_queries, std::int64_t set,
            std::int64_t number, KeySet& seen) {
    Block& block = blocks[Size(set * blocks_of_set + number)];
    const std::int64_t last = std::min(queries, (number + 1) * kBlock);
    const std::int64_t* offsets = call.keys.offsets + set * (call.groups + 1);
    const std::int64_t* members = call.keys.members + set * call.keys.places;
    const bool* padding =
        call.key_padding ? call.key_padding + set / call.heads * call.keys.tokens : nullptr;
    for (std::int64_t i = number * kBlock; i < last; ++i) {
      const std::int64_t limit =
          call.is_causal ? i + call.keys.tokens - queries : call.keys.tokens - 1;
      for (std::int64_t e = of_queries.starts[Size(i)]; e < of_queries.starts[Size(i) + 1]; ++e) {
        const std::int64_t group = of_queries.groups[Size(e)];
        for (std::int64_t k = offsets[group]; k < offsets[group + 1]; ++k) {
          const std::int64_t key = members[k];
          if (key <= limit && !(padding && padding[key])) seen.add(key);
        }
      }
      seen.move_to(block.keys);
      block.ends.push_back(static_cast<std::int64_t>(block.keys.size()));
    }
  }
};

SharedKeys::SharedKeys(const SharedKeysCall& call, const Parallel& parallel)
    : lists_(std::make_unique<Lists>()) {
  check("query", call.queries, call.sets, call.groups);
  check("key", call.keys, call.sets, call.groups);
  Lists& lists = *lists_;
  lists.queries = call.queries.tokens;
  lists.blocks_of_set = (lists.queries + kBlock - 1) / kBlock;
  std::vector<GroupsOfTokens> of_queries(Size(call.sets));
  for_each(call.sets, parallel,
           [&](std::int64_t set) { of_queries[Size(set)].make(call.queries, set, call.groups); });
  lists.blocks.resize(Size(call.sets * lists.blocks_of_set));
  for_each(call.sets * lists.blocks_of_set, parallel, [&](std::int64_t i) {
    const std::int64_t set = i / lists.blocks_of_set;
    KeySet seen(call.keys.tokens);
    lists.list(call, of_queries[Size(set)], set, i % lists.blocks_of_set, seen);
  });
  for (const Lists::Block& block : lists.blocks) {
    std::int64_t begin = 0;
    for (const std::int64_t end : block.ends) {
      lists.longest = std::max(lists.longest, end - begin);
      begin = end;
    }
  }
}

SharedKeys::~SharedKeys() = default;

std::int64_t SharedKeys::longest() const { return lists_->longest; }

void SharedKeys::write(std::int32_t* indices, std::int32_t* counts,
                       const Parallel& parallel) const {
  const Lists& lists = *lists_;
  for_each(static_cast<std::int64_t>(lists.blocks.size()), parallel, [&](std::int64_t number) {
    const Lists::Block& block = lists.blocks[Size(number)];
    std::int64_t row = number / lists.blocks_of_set * lists.queries +
                       number % lists.blocks_of_set * kBlock,
                 begin = 0;
    for (const std::int64_t end : block.ends) {
      std::int32_t* to = indices + row * lists.longest;
      const auto from = block.keys.begin();
      std::fill(std::copy(from + begin, from + end, to), to + lists.longest, 0);
      counts[row++] = static_cast<std::int32_t>(end - begin);
      begin = end;
    }
  });
}

}  // namespace sparse_attn::cpu
