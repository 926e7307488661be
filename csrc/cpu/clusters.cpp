#include "cpu/clusters.h"

#include <algorithm>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/for_each.h"

namespace sparse_attn::cpu {
namespace {

using Size = std::size_t;

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

template void bias_of_own_pairs(const OwnPairs&, float*, const Parallel&);
template void bias_of_own_pairs(const OwnPairs&, double*, const Parallel&);

}  // namespace sparse_attn::cpu
