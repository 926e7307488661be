#include "cpu/clusters.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#include "cpu/for_each.h"

namespace sparse_attn::cpu {
namespace {

using Size = std::size_t;

template <class T>
using Key = std::conditional_t<sizeof(T) == 4, std::uint32_t, std::uint64_t>;

/// An unsigned number in the order of x; NaN comes first.
template <class T>
Key<T> key_of(T x) {
  constexpr int kSign = 8 * sizeof(T) - 1;
  if (x != x) return 0;
  x += T{0};  // -0 to 0
  Key<T> bits;
  std::memcpy(&bits, &x, sizeof(x));
  return bits >> kSign ? ~bits : bits | Key<T>{1} << kSign;
}

/// By the most significant bits first: 2 reads of the row and a selection among the few that are
/// as the last one taken in these bits.
template <class T>
class Selection {
 public:
  void run(const T* row, std::int64_t length, std::int64_t count, std::int64_t* chosen) {
    keys_.resize(Size(length));
    counts_.fill(0);
    for (Size i = 0; i < keys_.size(); ++i) ++counts_[(keys_[i] = key_of(row[i])) >> kShift];
    Size bin = kBins;
    std::int64_t free = count;
    while (free > counts_[--bin]) free -= counts_[bin];
    level_.clear();
    for (const Key<T> key : keys_) {
      if (key >> kShift == bin) level_.push_back(key);
    }
    const auto last = level_.begin() + (free - 1);
    std::nth_element(level_.begin(), last, level_.end(), std::greater<>());
    const Key<T> least = *last;
    free -= std::count_if(level_.begin(), last, [&](Key<T> key) { return key > least; });
    for (Size i = 0; i < keys_.size(); ++i) {
      if (keys_[i] > least || (keys_[i] == least && free-- > 0))
        *chosen++ = static_cast<std::int64_t>(i);
    }
  }

 private:
  static constexpr int kBits = 11, kShift = 8 * sizeof(T) - kBits;
  static constexpr Size kBins = Size{1} << kBits;
  std::array<std::int64_t, kBins> counts_;
  std::vector<Key<T>> keys_, level_;
};

constexpr std::int64_t kWord = 64;

/// For each token of a set the clusters that took it, as bits.
class Memberships {
 public:
  Memberships(const Members& side, std::int64_t set, std::int64_t clusters)
      : words_((clusters + kWord - 1) / kWord), bits_(Size(side.length * words_)) {
    const std::int64_t* token = side.tokens + set * clusters * side.width;
    for (std::int64_t c = 0; c < clusters; ++c) {
      for (std::int64_t i = 0; i < side.width; ++i, ++token)
        bits_[Size(*token * words_ + c / kWord)] |= std::uint64_t{1} << c % kWord;
    }
  }
  std::uint64_t word(std::int64_t token, std::int64_t number) const {
    return bits_[Size(token * words_ + number)];
  }

 private:
  std::int64_t words_;
  std::vector<std::uint64_t> bits_;
};

void check(const char* side, const Members& members, std::int64_t count) {
  for (std::int64_t i = 0; i < count * members.width; ++i) {
    const std::int64_t token = members.tokens[i];
    if (token < 0 || token >= members.length) {
      throw std::invalid_argument(std::string("expected ") + side + "_members in [0, " +
                                  std::to_string(members.length) + "), got " +
                                  std::to_string(token));
    }
  }
}

const bool* hidden_of(const Members& side, const OwnPairs& call, std::int64_t set) {
  return side.hidden ? side.hidden + set / call.heads * side.length : nullptr;
}

/// One cluster of a set.
template <class T>
void fill(const OwnPairs& call, std::int64_t set, std::int64_t cluster, const Memberships& queries,
          const Memberships& keys, T* bias) {
  constexpr T kNever = -std::numeric_limits<T>::infinity();
  const std::int64_t place = set * call.clusters + cluster, width = call.keys.width;
  const std::int64_t* key = call.keys.tokens + place * width;
  const std::int64_t* query = call.queries.tokens + place * call.queries.width;
  const bool *hidden = hidden_of(call.keys, call, set),
             *hidden_query = hidden_of(call.queries, call, set);
  std::vector<T> of_keys(Size(width), T{0});
  std::vector<std::uint64_t> word_of_keys(static_cast<Size>(width));
  for (std::int64_t j = 0; hidden && j < width; ++j) of_keys[Size(j)] = hidden[key[j]] ? kNever : 0;
  for (std::int64_t i = 0; i < call.queries.width; ++i, bias += width) {
    const std::int64_t limit =
        call.is_causal ? query[i] + call.keys.length - call.queries.length : call.keys.length;
    if (hidden_query && hidden_query[query[i]]) {
      std::fill_n(bias, width, kNever);
      continue;
    }
    for (std::int64_t j = 0; j < width; ++j) bias[j] = key[j] > limit ? kNever : of_keys[Size(j)];
  }
  bias -= call.queries.width * width;
  for (std::int64_t w = 0; w <= cluster / kWord; ++w) {
    const std::uint64_t earlier =
        w < cluster / kWord ? ~std::uint64_t{0} : (std::uint64_t{1} << cluster % kWord) - 1;
    for (std::int64_t j = 0; j < width; ++j) word_of_keys[Size(j)] = keys.word(key[j], w);
    for (std::int64_t i = 0; i < call.queries.width; ++i) {
      const std::uint64_t of_query = queries.word(query[i], w) & earlier;
      if (of_query == 0) continue;
      T* row = bias + i * width;
      for (std::int64_t j = 0; j < width; ++j)
        row[j] = (of_query & word_of_keys[Size(j)]) != 0 ? kNever : row[j];
    }
  }
}

}  // namespace

template <class T>
void largest(const T* scores, std::int64_t rows, std::int64_t length, std::int64_t count,
             std::int64_t* chosen, const Parallel& parallel) {
  if (count == 0) return;
  for_each(rows, parallel, [&](std::int64_t row) {
    thread_local Selection<T> selection;
    selection.run(scores + row * length, length, count, chosen + row * count);
  });
}

template <class T>
void bias_of_own_pairs(const OwnPairs& call, T* bias, const Parallel& parallel) {
  check("query", call.queries, call.sets * call.clusters);
  check("key", call.keys, call.sets * call.clusters);
  const std::int64_t pairs = call.queries.width * call.keys.width;
  for_each(call.sets, parallel, [&](std::int64_t set) {
    const Memberships queries(call.queries, set, call.clusters),
        keys(call.keys, set, call.clusters);
    for (std::int64_t c = 0; c < call.clusters; ++c)
      fill(call, set, c, queries, keys, bias + (set * call.clusters + c) * pairs);
  });
}

template void largest(const float*, std::int64_t, std::int64_t, std::int64_t, std::int64_t*,
                      const Parallel&);
template void largest(const double*, std::int64_t, std::int64_t, std::int64_t, std::int64_t*,
                      const Parallel&);
template void bias_of_own_pairs(const OwnPairs&, float*, const Parallel&);
template void bias_of_own_pairs(const OwnPairs&, double*, const Parallel&);

}  // namespace sparse_attn::cpu
