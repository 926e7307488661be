// What patterns and plans tell about themselves: the definition as a dense mask, exact costs, the
// plan in words.
#include <ATen/ATen.h>
#include <torch/library.h>

#include <algorithm>
#include <numeric>
#include <set>

#include "ops/build_info.h"
#include "ops/checks.h"
#include "ops/device_plans.h"
#include "ops/pattern_tensors.h"
#include "patterns/part.h"
#include "patterns/union.h"
#include "plan/cache.h"
#include "plan/seen.h"

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

/// A pattern with its tensors, for each of the heads and examples that it tells apart.
class Inspected {
 public:
  Inspected(at::IntArrayRef words, const OptionalTensors& given, std::int64_t n_q, std::int64_t n_k,
            std::optional<std::int64_t> heads = std::nullopt)
      : pattern_(check_pattern(words)), sizes_(check_sizes(n_q, n_k)) {
    std::vector<at::Tensor> here;  // wherever they are, they are read here
    for (const at::Tensor& tensor : given.value_or(at::ArrayRef<at::Tensor>())) {
      TORCH_CHECK_VALUE(!tensor.is_meta(),
                        "sparse_attn: expected tensors with data to inspect a pattern, got one on "
                        "device meta");
      here.push_back(tensor.cpu());
    }
    const Sizes whole = whole_sizes(head_patterns(pattern_)[0], sizes_);
    check_pattern_tensors(pattern_, OptionalTensors(here), {whole.n_q, whole.n_k});
    tensors_ = PatternTensors(pattern_, OptionalTensors(here));
    const c10::SymInt examples = batch(),
                      of_all = heads.value_or(std::lcm(patterns(), heads_of_tensors()));
    const std::vector<at::Tensor> tensors = tensors_.tensors();
    check_pattern_tensors(pattern_, OptionalTensors(tensors),
                          {whole.n_q, whole.n_k, &examples, &of_all});
  }

  Sizes sizes() const { return sizes_; }
  std::int64_t batch() const { return tensors_.batch(pattern_); }
  std::int64_t heads_of_tensors() const { return tensors_.heads(pattern_); }
  std::int64_t patterns() const {
    return static_cast<std::int64_t>(head_patterns(pattern_).size());
  }

  /// Calls visit(pattern, tensors) for each of `heads` heads of one example.
  template <class Visit>
  void for_each_head(std::int64_t example, std::int64_t heads, const Visit& visit) const {
    with_value_errors([&] {
      for (std::int64_t h = 0; h < heads; ++h) {
        const auto part = static_cast<std::size_t>(h * patterns() / heads);
        visit(head_patterns(pattern_)[part], tensors_.slices(example, h).data());
      }
      return 0;
    });
  }

  /// The same for as many as the pattern tells apart.
  template <class Visit>
  void for_each(const Visit& visit) const {
    for (std::int64_t b = 0; b < batch(); ++b)
      for_each_head(b, std::lcm(patterns(), heads_of_tensors()), visit);
  }

 private:
  Expression pattern_;
  Sizes sizes_;
  PatternTensors tensors_;
};

/// (n_q, n_k), (heads, n_q, n_k) when heads are given, (batch, heads or 1, n_q, n_k) if a tensor of
/// the pattern has examples.
at::Tensor pattern_mask(at::IntArrayRef words, OptionalTensors given, std::int64_t n_q,
                        std::int64_t n_k, std::optional<std::int64_t> heads) {
  const Inspected pattern(words, given, n_q, n_k, heads);
  TORCH_CHECK_VALUE(heads || (pattern.patterns() == 1 && pattern.heads_of_tensors() == 1),
                    "sparse_attn: expected heads for the mask of a pattern that differs among "
                    "heads, got None");
  TORCH_CHECK_VALUE(heads.value_or(1) > 0 && heads.value_or(1) % pattern.patterns() == 0,
                    "sparse_attn: expected heads to be a multiple of the ", pattern.patterns(),
                    " patterns listed, got ", heads.value_or(1));
  const at::Tensor masks = at::zeros({pattern.batch(), heads.value_or(1), n_q, n_k}, at::kBool);
  bool* data = masks.mutable_data_ptr<bool>();
  const Sizes sizes = pattern.sizes();
  for (std::int64_t b = 0; b < pattern.batch(); ++b) {
    pattern.for_each_head(b, heads.value_or(1),
                          [&](const Expression& one, const PatternTensor* tensors) {
                            const UnionOf terms(expand(one, sizes, tensors));
                            for (std::int64_t i = 0; i < n_q; ++i) {
                              for (std::int64_t j = 0; j < n_k; ++j)
                                *data++ = terms.contains(i + sizes.offset(), j);
                            }
                          });
  }
  if (pattern.batch() > 1) return masks;
  return heads ? masks.squeeze(0) : masks.squeeze(0).squeeze(0);
}

at::Tensor tokens_of(const char* name, const at::Tensor& given, std::int64_t n_k) {
  TORCH_CHECK_TYPE(given.scalar_type() == at::kLong && given.dim() == 1, "sparse_attn: expected ",
                   name, " of dtype int64 with one dimension, got ", given.scalar_type(),
                   " of shape ", given.sizes());
  at::Tensor tokens = given.cpu().contiguous();
  const auto* data = tokens.const_data_ptr<std::int64_t>();
  for (std::int64_t i = 0; i < tokens.numel(); ++i)
    TORCH_CHECK_VALUE(0 <= data[i] && data[i] < n_k, "sparse_attn: expected ", name,
                      " from 0 to n_k - 1 = ", n_k - 1, ", got ", data[i]);
  return tokens;
}

/// (positions, keys): who sees whom at chosen places of a sequence of n_k tokens.
at::Tensor pattern_allows(at::IntArrayRef words, const at::Tensor& given_positions,
                          const at::Tensor& given_keys, std::int64_t n_k) {
  const Expression pattern = check_pattern(words);
  TORCH_CHECK_VALUE(tensor_count(pattern) == 0,
                    "sparse_attn: expected a pattern without tensors, whose rows are raw");
  check_sizes(n_k, n_k);
  const at::Tensor positions = tokens_of("positions", given_positions, n_k);
  const at::Tensor keys = tokens_of("keys", given_keys, n_k);
  const at::Tensor allowed = at::empty({positions.numel(), keys.numel()}, at::kBool);
  with_value_errors([&] {
    const UnionOf terms(expand(pattern, {n_k, n_k}));
    bool* data = allowed.mutable_data_ptr<bool>();
    for (std::int64_t i = 0; i < positions.numel(); ++i) {
      const std::int64_t position = positions.const_data_ptr<std::int64_t>()[i];
      for (std::int64_t j = 0; j < keys.numel(); ++j)
        *data++ = terms.contains(position, keys.const_data_ptr<std::int64_t>()[j]);
    }
    return 0;
  });
  return allowed;
}

/// pairs, visited pairs, bytes, passes and masks of the plan, and the number of heads and examples
/// that these are summed over: those that the pattern tells apart.
std::vector<std::int64_t> pattern_cost(at::IntArrayRef words, OptionalTensors given,
                                       std::int64_t n_q, std::int64_t n_k,
                                       at::OptionalIntArrayRef tile) {
  const Inspected pattern(words, given, n_q, n_k);
  const Sizes sizes = pattern.sizes();
  TileShape shape;
  if (tile) {
    const auto fits = [](std::int64_t n) { return n >= 1 && n <= kMaxTile; };
    TORCH_CHECK_VALUE(tile->size() == 2 && fits((*tile)[0]) && fits((*tile)[1]),
                      "sparse_attn: expected tile to be (rows, keys), each from 1 to ", kMaxTile,
                      ", got ", *tile);
    shape = {static_cast<int>((*tile)[0]), static_cast<int>((*tile)[1])};
  }
  std::vector<std::int64_t> total(6, 0);
  pattern.for_each([&](const Expression& one, const PatternTensor* tensors) {
    const std::shared_ptr<const Plan> plan =
        tile ? std::make_shared<const Plan>(build_plan(expand(one, sizes, tensors), sizes, shape))
             : plan_of(one, sizes, tensors);
    total[0] += plan->pairs;
    total[1] += plan->visited;
    total[2] += plan->bytes();
    total[3] += static_cast<std::int64_t>(plan->passes.size());
    total[4] += static_cast<std::int64_t>(plan->masks.size());
    total[5] += 1;
  });
  return total;
}

std::string pattern_plan(at::IntArrayRef words, OptionalTensors given, std::int64_t n_q,
                         std::int64_t n_k) {
  const Inspected pattern(words, given, n_q, n_k);
  std::string text;
  pattern.for_each([&](const Expression& one, const PatternTensor* tensors) {
    text += plan_of(one, pattern.sizes(), tensors)->to_string();
  });
  return text;
}

/// (n_q) and (n_k) bool: who sees a key, and who is seen, in any head and example.
std::tuple<at::Tensor, at::Tensor> pattern_seen(at::IntArrayRef words, OptionalTensors given,
                                                std::int64_t n_q, std::int64_t n_k) {
  const Inspected pattern(words, given, n_q, n_k);
  const Sizes sizes = pattern.sizes();
  Seen seen{std::vector<std::uint8_t>(static_cast<std::size_t>(n_q)),
            std::vector<std::uint8_t>(static_cast<std::size_t>(n_k))};
  pattern.for_each([&](const Expression& one, const PatternTensor* tensors) {
    add_seen(build_plan(expand(one, sizes, tensors), sizes), seen);
  });
  const auto flags = [](const std::vector<std::uint8_t>& bytes) {
    const at::Tensor made = at::empty({static_cast<std::int64_t>(bytes.size())}, at::kBool);
    std::copy(bytes.begin(), bytes.end(), made.mutable_data_ptr<bool>());
    return made;
  };
  return {flags(seen.queries), flags(seen.keys)};
}

/// The queries that see (nearly) all keys in some head or example, ascending.
at::Tensor pattern_global_queries(at::IntArrayRef words, OptionalTensors given, std::int64_t n_q,
                                  std::int64_t n_k) {
  const Inspected pattern(words, given, n_q, n_k);
  std::set<std::int64_t> all;
  pattern.for_each([&](const Expression& one, const PatternTensor* tensors) {
    const auto some = global_queries(expand(one, pattern.sizes(), tensors), pattern.sizes());
    all.insert(some.begin(), some.end());
  });
  const at::Tensor made = at::empty({static_cast<std::int64_t>(all.size())}, at::kLong);
  std::copy(all.begin(), all.end(), made.mutable_data_ptr<std::int64_t>());
  return made;
}

/// A number that all dilations of the pattern divide, if it is not longer than the sequence.
std::int64_t pattern_step(at::IntArrayRef words, OptionalTensors given, std::int64_t n_q,
                          std::int64_t n_k) {
  const Inspected pattern(words, given, n_q, n_k);
  std::int64_t common = 1;
  pattern.for_each([&](const Expression& one, const PatternTensor* tensors) {
    const std::int64_t step = common_step(expand(one, pattern.sizes(), tensors), pattern.sizes());
    const std::int64_t more = step / std::gcd(common, step);
    if (common < std::max(n_q, n_k) / more) common *= more;
  });
  return common;
}

void clear_caches() {
  clear_plan_cache();
  clear_device_plans();
}

std::vector<std::string> cuda_archs() { return build_info().cuda_archs; }

}  // namespace

TORCH_LIBRARY_IMPL(sparse_attn, CompositeImplicitAutograd, m) {
  m.impl("_pattern_causal", TORCH_FN(pattern_causal));
  m.impl("_pattern_mask", TORCH_FN(pattern_mask));
  m.impl("_pattern_allows", TORCH_FN(pattern_allows));
  m.impl("_pattern_cost", TORCH_FN(pattern_cost));
  m.impl("_pattern_plan", TORCH_FN(pattern_plan));
  m.impl("_pattern_seen", TORCH_FN(pattern_seen));
  m.impl("_pattern_global_queries", TORCH_FN(pattern_global_queries));
  m.impl("_pattern_step", TORCH_FN(pattern_step));
  m.impl("_cuda_archs", TORCH_FN(cuda_archs));
  m.impl("_plan_cache_size", TORCH_FN(plan_cache_size));
  m.impl("_clear_plan_cache", TORCH_FN(clear_caches));
}

}  // namespace sparse_attn
