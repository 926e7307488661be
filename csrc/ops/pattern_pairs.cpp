// The pairs that a call allows, listed, and which of them dropout keeps. Both are made on the host.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <limits>
#include <tuple>
#include <vector>

#include "dropout.h"
#include "ops/checks.h"
#include "ops/head_patterns.h"
#include "ops/pairs.h"
#include "plan/cache.h"
#include "plan/lists.h"

namespace sparse_attn {
namespace {

/// Lists hold int32.
constexpr std::int64_t kMostTokens = std::numeric_limits<std::int32_t>::max();

using CrowAndCol = std::tuple<at::Tensor, at::Tensor>;

/// Wherever it is, it is read here.
at::Tensor on_host(const char* name, const at::Tensor& tensor) {
  TORCH_CHECK_VALUE(!tensor.is_meta(), "sparse_attn: expected ", name,
                    " with data to list pairs, got one on device meta");
  return tensor.cpu();
}

OptionalTensor mask_on_host(const char* name, const OptionalTensor& mask, std::int64_t batch,
                            std::int64_t n_k) {
  if (!mask) return std::nullopt;
  TORCH_CHECK_TYPE(mask->scalar_type() == at::kBool, "sparse_attn: expected ", name,
                   " of dtype bool, got ", mask->scalar_type());
  const std::vector<std::int64_t> expected{batch, n_k};
  TORCH_CHECK_VALUE(mask->sizes() == at::IntArrayRef(expected), "sparse_attn: expected ", name,
                    " of shape ", at::IntArrayRef(expected), " (batch, keys), got ", mask->sizes());
  return on_host(name, *mask).contiguous();
}

/// The pairs of all heads, less those whose key is padding.
class Listing {
 public:
  Listing(const HeadPatterns& patterns, Sizes sizes, std::int64_t heads, const bool* padding)
      : numbers_(patterns.numbers()), sizes_(sizes), heads_(heads), padding_(padding) {
    lists_.resize(patterns.size());
    patterns.for_each([&](std::size_t i, const Expression& one, const auto& tensors) {
      lists_[i] = with_value_errors([&] { return all_keys(*plan_of(one, sizes, tensors.data())); });
    });
  }

  /// Fills crow (heads of all examples, n_q + 1); returns the number of pairs.
  std::int64_t offsets(std::int64_t* crow) const {
    for_each_row(
        [&](std::int64_t head, std::int64_t i, const std::int32_t* keys, std::int64_t count) {
          std::int64_t seen = count;
          if (const bool* padding = padding_of(head)) {
            for (std::int64_t k = 0; k < count; ++k) seen -= padding[keys[k]];
          }
          crow[head * (sizes_.n_q + 1) + i + 1] = seen;
        });
    std::int64_t pairs = 0;
    for (std::size_t head = 0; head < numbers_.size(); ++head) {
      *crow++ = pairs;
      for (std::int64_t i = 0; i < sizes_.n_q; ++i, ++crow) *crow = pairs += *crow;
    }
    return pairs;
  }

  void keys(const std::int64_t* crow, std::int64_t* col) const {
    for_each_row(
        [&](std::int64_t head, std::int64_t i, const std::int32_t* keys, std::int64_t count) {
          std::int64_t* to = col + crow[head * (sizes_.n_q + 1) + i];
          const bool* padding = padding_of(head);
          for (std::int64_t k = 0; k < count; ++k) {
            if (!padding || !padding[keys[k]]) *to++ = keys[k];
          }
        });
  }

 private:
  /// Calls visit(head, query, keys, how many) for all rows, heads side by side.
  template <class Visit>
  void for_each_row(const Visit& visit) const {
    const auto heads = static_cast<std::int64_t>(numbers_.size());
    at::parallel_for(0, heads, 1, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t head = begin; head < end; ++head) {
        const Lists& lists = lists_[numbers_[static_cast<std::size_t>(head)]];
        for (std::int64_t i = 0; i < sizes_.n_q; ++i) {
          const std::int64_t first = lists.starts[static_cast<std::size_t>(i)];
          visit(head, i, lists.keys.data() + first,
                lists.starts[static_cast<std::size_t>(i) + 1] - first);
        }
      }
    });
  }

  const bool* padding_of(std::int64_t head) const {
    return padding_ ? padding_ + head / heads_ * sizes_.n_k : nullptr;
  }

  const std::vector<std::size_t>& numbers_;
  const Sizes sizes_;
  const std::int64_t heads_;
  const bool* const padding_;  // (batch, n_k), true = ignore; null = none
  std::vector<Lists> lists_;
};

/// crow (batch, heads, n_q + 1) with offsets into col, whose keys ascend within each query.
CrowAndCol pattern_pairs(at::IntArrayRef words, OptionalTensors given, std::int64_t n_q,
                         std::int64_t n_k, std::int64_t batch, std::int64_t heads,
                         const OptionalTensor& key_padding_mask,
                         const OptionalTensor& global_mask) {
  const Expression pattern = check_pattern(words);
  for (const auto& [name, size] : {std::pair<const char*, std::int64_t>{"n_q", n_q},
                                   {"n_k", n_k},
                                   {"batch", batch},
                                   {"heads", heads}}) {
    TORCH_CHECK_VALUE(size >= 0 && size <= kMostTokens, "sparse_attn: expected ", name,
                      " from 0 to ", kMostTokens, ", got ", size);
  }
  const auto patterns = static_cast<std::int64_t>(head_patterns(pattern).size());
  TORCH_CHECK_VALUE(heads % patterns == 0,
                    "sparse_attn: expected pattern to list a number of patterns that divides the ",
                    heads, " heads, got ", patterns);
  std::vector<at::Tensor> here;
  for (const at::Tensor& tensor : given.value_or(at::ArrayRef<at::Tensor>()))
    here.push_back(on_host("pattern_tensors", tensor));
  const c10::SymInt examples = batch, of_all = heads;
  check_pattern_tensors(pattern, OptionalTensors(here), {n_q, n_k, &examples, &of_all});
  const OptionalTensor padding = mask_on_host("key_padding_mask", key_padding_mask, batch, n_k),
                       globals = mask_on_host("global_mask", global_mask, batch, n_k);

  const at::Tensor crow = at::zeros({batch, heads, n_q + 1}, at::kLong);
  if (crow.numel() == 0 || n_q == 0 || n_k == 0) return {crow, at::empty({0}, at::kLong)};
  const HeadPatterns of_heads(pattern, OptionalTensors(here), globals, batch, heads);
  const Listing listing(of_heads, {n_q, n_k}, heads,
                        padding ? padding->const_data_ptr<bool>() : nullptr);
  auto* offsets = crow.mutable_data_ptr<std::int64_t>();
  const at::Tensor col = at::empty({listing.offsets(offsets)}, at::kLong);
  listing.keys(offsets, col.mutable_data_ptr<std::int64_t>());
  return {crow, col};
}

/// For each of the pairs whether it is kept, on the device of col.
at::Tensor pair_dropout(const at::Tensor& seed, double p, const at::Tensor& crow,
                        const at::Tensor& col) {
  TORCH_CHECK_VALUE(p >= 0.0 && p <= 1.0, "sparse_attn: expected dropout_p in [0, 1], got ", p);
  TORCH_CHECK_TYPE(seed.scalar_type() == at::kLong,
                   "sparse_attn: expected dropout_seed of dtype int64, got ", seed.scalar_type());
  TORCH_CHECK_VALUE(seed.dim() == 0,
                    "sparse_attn: expected dropout_seed of 0 dimensions, got shape ", seed.sizes());
  check_pair_indices(crow, col);
  const DropoutRule rule{
      static_cast<std::uint64_t>(on_host("dropout_seed", seed).item<std::int64_t>()),
      dropout_threshold(p)};
  const at::Tensor rows = on_host("crow_indices", crow).contiguous(),
                   keys = on_host("col_indices", col).contiguous();
  check_pair_contents(rows, keys, kMostTokens);
  const at::Tensor kept = at::empty({keys.size(0)}, at::kBool);
  const std::int64_t heads = rows.size(0) * rows.size(1), n_q = rows.size(2) - 1;
  const auto* offsets = rows.const_data_ptr<std::int64_t>();
  const auto* key = keys.const_data_ptr<std::int64_t>();
  bool* keeps = kept.mutable_data_ptr<bool>();
  at::parallel_for(0, heads * n_q, 64, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t row = begin; row < end; ++row) {
      const std::int64_t head = row / n_q, query = row % n_q;
      const std::int64_t* crow_of = offsets + head * (n_q + 1) + query;
      for (std::int64_t e = crow_of[0]; e < crow_of[1]; ++e)
        keeps[e] = rule.keeps(head, query, key[e]);
    }
  });
  return kept.to(col.device());
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(sparse_attn, m) {
  m.def(
      "_pattern_pairs(int[] pattern, Tensor[]? pattern_tensors, int n_q, int n_k, int batch, int "
      "heads, Tensor? key_padding_mask=None, Tensor? global_mask=None) -> (Tensor crow_indices, "
      "Tensor col_indices)");
  m.def("_pair_dropout(Tensor seed, float p, Tensor crow_indices, Tensor col_indices) -> Tensor");
}

TORCH_LIBRARY_IMPL(sparse_attn, CompositeExplicitAutograd, m) {
  m.impl("_pattern_pairs", TORCH_FN(pattern_pairs));
  m.impl("_pair_dropout", TORCH_FN(pair_dropout));
}

}  // namespace sparse_attn
