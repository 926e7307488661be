// What patterns and plans tell about themselves: the definition as a dense mask, exact costs, the
// plan in words.
#include <ATen/ATen.h>
#include <torch/library.h>

#include "ops/checks.h"
#include "patterns/union.h"
#include "plan/cache.h"

namespace sparse_attn {
namespace {

/// A plan of this many tokens takes about a gigabyte.
constexpr std::int64_t kMostTokens = std::int64_t{1} << 28;

Sizes check_sizes(std::int64_t n_q, std::int64_t n_k) {
  const auto fits = [](std::int64_t n) { return 0 <= n && n <= kMostTokens; };
  TORCH_CHECK_VALUE(fits(n_q) && fits(n_k), "sparse_attn: expected n_q and n_k from 0 to ",
                    kMostTokens, ", got ", n_q, " and ", n_k);
  return {n_q, n_k};
}

bool pattern_causal(at::IntArrayRef pattern) { return is_causal(check_pattern(pattern)); }

/// (n_q, n_k), or (heads, n_q, n_k) when heads are given.
at::Tensor pattern_mask(at::IntArrayRef words, std::int64_t n_q, std::int64_t n_k,
                        std::optional<std::int64_t> heads) {
  const Expression pattern = check_pattern(words);
  const Sizes sizes = check_sizes(n_q, n_k);
  const auto patterns = head_patterns(pattern);
  const auto count = static_cast<std::int64_t>(patterns.size());
  TORCH_CHECK_VALUE(heads || count == 1,
                    "sparse_attn: expected heads for the mask of a PerHead pattern, got None");
  TORCH_CHECK_VALUE(heads.value_or(1) > 0 && heads.value_or(1) % count == 0,
                    "sparse_attn: expected heads to be a multiple of the ", count,
                    " patterns listed, got ", heads.value_or(1));
  const at::Tensor masks = at::zeros({count, n_q, n_k}, at::kBool);
  bool* data = masks.mutable_data_ptr<bool>();
  with_value_errors([&] {
    for (const Expression& one : patterns) {
      const UnionOf terms(expand(one, sizes));
      for (std::int64_t i = 0; i < n_q; ++i) {
        for (std::int64_t j = 0; j < n_k; ++j) *data++ = terms.contains(i + sizes.offset(), j);
      }
    }
    return 0;
  });
  return heads ? masks.repeat_interleave(*heads / count, 0) : masks.squeeze(0);
}

/// pairs, visited pairs, bytes, passes and masks of the plan; of a PerHead, summed over its
/// patterns.
std::vector<std::int64_t> pattern_cost(at::IntArrayRef words, std::int64_t n_q, std::int64_t n_k,
                                       at::OptionalIntArrayRef tile) {
  const Expression pattern = check_pattern(words);
  const Sizes sizes = check_sizes(n_q, n_k);
  TileShape shape;
  if (tile) {
    const auto fits = [](std::int64_t n) { return n >= 1 && n <= kMaxTile; };
    TORCH_CHECK_VALUE(tile->size() == 2 && fits((*tile)[0]) && fits((*tile)[1]),
                      "sparse_attn: expected tile to be (rows, keys), each from 1 to ", kMaxTile,
                      ", got ", *tile);
    shape = {static_cast<int>((*tile)[0]), static_cast<int>((*tile)[1])};
  }
  std::vector<std::int64_t> total(5, 0);
  for (const Expression& one : head_patterns(pattern)) {
    const std::shared_ptr<const Plan> plan = with_value_errors([&] {
      return tile ? std::make_shared<const Plan>(build_plan(expand(one, sizes), sizes, shape))
                  : cached_plan(one, sizes);
    });
    total[0] += plan->pairs;
    total[1] += plan->visited;
    total[2] += plan->bytes();
    total[3] += static_cast<std::int64_t>(plan->passes.size());
    total[4] += static_cast<std::int64_t>(plan->masks.size());
  }
  return total;
}

std::string pattern_plan(at::IntArrayRef words, std::int64_t n_q, std::int64_t n_k) {
  const Expression pattern = check_pattern(words);
  const Sizes sizes = check_sizes(n_q, n_k);
  std::string text;
  for (const Expression& one : head_patterns(pattern)) {
    text += with_value_errors([&] { return cached_plan(one, sizes)->to_string(); });
  }
  return text;
}

}  // namespace

TORCH_LIBRARY_IMPL(sparse_attn, CompositeImplicitAutograd, m) {
  m.impl("_pattern_causal", TORCH_FN(pattern_causal));
  m.impl("_pattern_mask", TORCH_FN(pattern_mask));
  m.impl("_pattern_cost", TORCH_FN(pattern_cost));
  m.impl("_pattern_plan", TORCH_FN(pattern_plan));
  m.impl("_plan_cache_size", TORCH_FN(plan_cache_size));
  m.impl("_clear_plan_cache", TORCH_FN(clear_plan_cache));
}

}  // namespace sparse_attn
