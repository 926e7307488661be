#include "patterns/expand.h"

#include <algorithm>
#include <stdexcept>

#include "patterns/block_window.h"
#include "patterns/checkerboard.h"
#include "patterns/key_lists.h"
#include "patterns/layout.h"
#include "patterns/part_of.h"
#include "patterns/periodic_keys.h"
#include "patterns/random_blocks.h"
#include "patterns/random_tokens.h"
#include "patterns/tokens.h"
#include "patterns/union.h"
#include "patterns/window.h"

namespace sparse_attn {
namespace {

/// An intersection of unions is multiplied out up to here; beyond it the unions stay whole and are
/// tiled in natural order.
constexpr std::size_t kMaxTerms = 64;

/// 2^32: every 32-bit number is below it.
constexpr std::int64_t kKeepAll = std::int64_t{1} << 32;

using Values = std::vector<std::int64_t>;

template <class T, class... Arguments>
Terms one(Arguments&&... arguments) {
  return {{std::make_shared<T>(std::forward<Arguments>(arguments)...)}};
}

Terms everything() { return {Term{}}; }
Terms nothing() { return {}; }

TokenList resolve_tokens(const Values& runs, std::int64_t n_k) {
  TokenList tokens;
  if (n_k == 0) return tokens;  // there is nothing to use a token on
  for (std::size_t i = 0; i < runs.size(); i += 2) {
    const std::int64_t start = runs[i], stop = runs[i + 1];
    for (const std::int64_t t : {start, stop - 1}) {
      if (keys_needed(t) > n_k) throw std::invalid_argument(token_error(t, n_k));
    }
    for (std::int64_t t = start; t < stop; ++t) tokens.push_back(t < 0 ? t + n_k : t);
  }
  std::sort(tokens.begin(), tokens.end());
  tokens.erase(std::unique(tokens.begin(), tokens.end()), tokens.end());
  return tokens;
}

Terms window(const Values& v) {
  const std::int64_t back = window_reach(v[0], v[2]), ahead = window_reach(v[1], v[2]);
  if (back == kUnbounded && ahead == kUnbounded && v[2] == 1) return everything();
  return one<Window>(back, ahead, v[2]);
}

Terms periodic_keys(std::int64_t period, std::int64_t count, std::int64_t n_k) {
  if (count == 0) return nothing();
  if (count >= period) return everything();
  return one<PeriodicKeys>(period, count, n_k);
}

/// The tokens of the first and of the last blocks.
TokenList edge_tokens(const Values& v, std::int64_t n_k) {
  const std::int64_t block = v[0], blocks = block_count(n_k, block);
  const std::int64_t first = std::min(v[1], blocks), last = std::min(v[2], blocks - first);
  TokenList tokens;
  const auto add_blocks = [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t t = begin * block; t < n_k && t / block < end; ++t) tokens.push_back(t);
  };
  add_blocks(0, first);
  add_blocks(blocks - last, blocks);
  return tokens;
}

/// Window(radius) ∪ a dilated window for each further octave of distances. That of step 2^k reaches
/// radius · 2^k; what it has below radius · 2^(k-1) the others have too.
Terms radial(std::int64_t radius, Sizes sizes) {
  const std::int64_t longest = std::max(sizes.n_q, sizes.n_k);
  radius = std::min(radius, longest);
  Terms octaves = one<Window>(radius, radius, std::int64_t{1});
  for (std::int64_t step = 2; radius > 0 && radius * (step / 2) < longest; step *= 2) {
    octaves.push_back({std::make_shared<Window>(radius * step, radius * step, step)});
  }
  return octaves;
}

Terms random_blocks(const Values& v, Sizes sizes) {
  const std::int64_t count = v[0], block = v[1];
  if (count == 0) return nothing();
  if (count >= block_count(sizes.n_k, block)) {  // all, as if there were one block
    return one<BlockWindow>(std::max<std::int64_t>(sizes.n_k, 1), 0, 0);
  }
  return one<RandomBlocks>(count, block, static_cast<std::uint64_t>(v[2]), sizes.offset(),
                           sizes.n_k);
}

Terms random_tokens(const Values& v) {
  if (v[0] == 0) return nothing();
  if (v[0] >= kKeepAll) return everything();
  return one<RandomTokens>(v[0], static_cast<std::uint64_t>(v[1]));
}

Terms block_layout(const Expression& e, Sizes sizes, const PatternTensor* tensors) {
  const PatternTensor& layout = tensors[e.tensor];
  return one<BlockLayout>(static_cast<const std::uint8_t*>(layout.data), layout.columns,
                          e.values[0], sizes.offset());
}

Terms key_lists(const Expression& e, Sizes sizes, const PatternTensor* tensors) {
  const PatternTensor& indices = tensors[e.tensor];
  const void* counts = own_tensors(e) > 1 ? tensors[e.tensor + 1].data : nullptr;
  const auto lists_of = [&](const auto* data) {
    return one<KeyLists>(data, static_cast<const std::int64_t*>(counts), indices.columns, sizes.n_q,
                         sizes.n_k);
  };
  return indices.is_int32 ? lists_of(static_cast<const std::int32_t*>(indices.data))
                          : lists_of(static_cast<const std::int64_t*>(indices.data));
}

/// a ∩ b with every pair of primitives folded that folds.
Term intersect(const Term& a, const Term& b) {
  Term both = a;
  for (const PrimitivePtr& extra : b) {
    bool folded = false;
    for (PrimitivePtr& present : both) {
      if (PrimitivePtr primitive = present->intersect(*extra)) {
        present = std::move(primitive);
        folded = true;
        break;
      }
    }
    if (!folded) both.push_back(extra);
  }
  return both;
}

bool includes(const Term& big, const Term& small) {
  return std::all_of(big.begin(), big.end(), [&](const PrimitivePtr& p) {
    return std::any_of(small.begin(), small.end(),
                       [&](const PrimitivePtr& q) { return p->includes(*q); });
  });
}

/// Adds a term to a union unless one that is there includes it; drops those that it includes.
void unite(Terms& terms, Term term) {
  for (const Term& present : terms) {
    if (includes(present, term)) return;
  }
  terms.erase(
      std::remove_if(terms.begin(), terms.end(), [&](const Term& t) { return includes(term, t); }),
      terms.end());
  terms.push_back(std::move(term));
}

Terms multiply(const Terms& a, const Terms& b) {
  const auto whole = [](const Terms& terms) {
    return terms.size() == 1 ? terms : Terms{{std::make_shared<UnionOf>(terms)}};
  };
  if (a.size() * b.size() > kMaxTerms) return {intersect(whole(a)[0], whole(b)[0])};
  Terms product;
  for (const Term& x : a) {
    for (const Term& y : b) unite(product, intersect(x, y));
  }
  return product;
}

}  // namespace

Terms expand(const Expression& e, Sizes sizes, const PatternTensor* tensors) {
  const Values& v = e.values;
  switch (e.word) {
    case Word::kWindow:
      return window(v);
    case Word::kGlobalKeys:
      return one<GlobalKeys>(resolve_tokens(v, sizes.n_k));
    case Word::kGlobalQueries:
      return one<GlobalQueries>(resolve_tokens(v, sizes.n_k));
    case Word::kPeriodicKeys:
      return periodic_keys(v[0], v[1], sizes.n_k);
    case Word::kEdgeKeys:
      return one<GlobalKeys>(edge_tokens(v, sizes.n_k));
    case Word::kEdgeQueries:
      return one<GlobalQueries>(edge_tokens(v, sizes.n_k));
    case Word::kBlockWindow:
      return one<BlockWindow>(v[0], v[1], v[2]);
    case Word::kCheckerboard:
      return one<Checkerboard>(v[0]);
    case Word::kRadial:
      return radial(v[0], sizes);
    case Word::kRandomBlocks:
      return random_blocks(v, sizes);
    case Word::kRandomTokens:
      return random_tokens(v);
    case Word::kBlockLayout:
      return block_layout(e, sizes, tensors);
    case Word::kKeyLists:
      return key_lists(e, sizes, tensors);
    case Word::kUnion: {
      Terms terms;
      for (const Expression& part : e.parts) {
        for (Term& term : expand(part, sizes, tensors)) unite(terms, std::move(term));
      }
      return terms;
    }
    case Word::kIntersection: {
      Terms terms = expand(e.parts[0], sizes, tensors);
      for (std::size_t i = 1; i < e.parts.size(); ++i)
        terms = multiply(terms, expand(e.parts[i], sizes, tensors));
      return terms;
    }
    case Word::kPart: {
      const Part part(e);
      return take_part(part, sizes, expand(e.parts[0], part.whole, tensors));
    }
    case Word::kPerHead:
      break;
  }
  throw std::invalid_argument("expected one head's pattern, got a PerHead");
}

}  // namespace sparse_attn
