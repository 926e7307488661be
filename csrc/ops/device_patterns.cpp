#include "ops/device_patterns.h"

#include <algorithm>

#include "ops/checks.h"
#include "patterns/key_lists.h"
#include "patterns/part.h"

namespace sparse_attn {
namespace {

/// (batch or 1, heads or 1, ...), contiguous.
ProgramTensor program_tensor(const at::Tensor& tensor, std::int64_t columns) {
  const auto bytes = static_cast<std::int64_t>(tensor.element_size());
  const auto stride = [&](int dim) {
    return tensor.size(dim) == 1 ? 0 : tensor.stride(dim) * bytes;
  };
  return {tensor.const_data_ptr(), stride(0), stride(1), columns};
}

/// Says which index or count is out of range, as planning on the host does.
void report(const at::Tensor& indices, const at::Tensor* counts, std::int64_t n_k) {
  const at::Tensor keys = indices.cpu();
  const at::Tensor lengths = counts ? counts->cpu() : at::Tensor();
  for (std::int64_t b = 0; b < keys.size(0); ++b) {
    for (std::int64_t h = 0; h < keys.size(1); ++h) {
      const at::Tensor one = keys[b][h];
      const std::int64_t* of_one = nullptr;
      if (counts) {
        of_one = lengths[lengths.size(0) == 1 ? 0 : b][lengths.size(1) == 1 ? 0 : h]
                     .const_data_ptr<std::int64_t>();
      }
      with_value_errors([&] {
        KeyLists(one.const_data_ptr<std::int64_t>(), of_one, one.size(1), one.size(0), n_k);
      });
    }
  }
}

/// The keys of each query, ascending; n_k where its list ends.
at::Tensor sorted_lists(const at::Tensor& indices, const at::Tensor* counts, std::int64_t n_k,
                        bool capturing) {
  const std::int64_t columns = indices.size(-1);
  at::Tensor keys = indices;
  at::Tensor valid = (keys >= 0).logical_and(keys < n_k);
  if (counts) {
    const at::Tensor ends = counts->unsqueeze(-1);
    const at::Tensor beyond = at::arange(columns, keys.options()) >= ends;
    valid = valid.logical_or(beyond).logical_and(ends >= 0).logical_and(ends <= columns);
    keys = at::where(beyond, at::scalar_tensor(n_k, keys.options()), keys);
  }
  const at::Tensor all_valid = valid.all();
  if (capturing) {
    at::_assert_async(all_valid);
  } else if (!all_valid.item<bool>()) {
    report(indices, counts, n_k);
  }
  return std::get<0>(keys.sort(-1)).contiguous();
}

/// Along the second dimension; equal elements keep their order.
std::tuple<at::Tensor, at::Tensor> stable_sort(const at::Tensor& tensor) {
  return tensor.sort(std::optional<bool>(true), /*dim=*/1);
}

/// The places of the true ones first, ascending.
at::Tensor places(const at::Tensor& mask) {
  return std::get<1>(stable_sort(mask.logical_not().to(at::kByte))).contiguous();
}

/// Of a part: the numbers of its tokens in the whole.
at::Tensor query_tokens(const cuda::Call& call, const DevicePlans& plans) {
  return plans.tokens(call.image->query_tokens(), call.params.n_q);
}
at::Tensor key_tokens(const cuda::Call& call, const DevicePlans& plans) {
  return plans.tokens(call.image->key_tokens(), call.params.n_k);
}

/// The columns of a mask at some tokens; false where it has none.
at::Tensor columns_at(const at::Tensor& mask, const at::Tensor& tokens) {
  const at::Tensor known = (tokens >= 0).logical_and(tokens < mask.size(1));
  return mask.index_select(1, tokens * known).logical_and(known);
}

/// The place of each of `count` tokens, -1 of those that have none.
at::Tensor places_of(const at::Tensor& tokens, std::int64_t count) {
  const at::Tensor to = at::where(tokens >= 0, tokens, count);  // what has no token goes beyond
  return at::full({count + 1}, -1, tokens.options())
      .scatter_(0, to, at::arange(tokens.size(0), tokens.options()));
}

/// A table of ListsView for `count` lists whose parts lie so many bytes apart.
at::Tensor views_of(const at::Tensor& starts, std::int64_t starts_stride, const at::Tensor& items,
                    std::int64_t items_stride, std::int64_t count) {
  const auto addresses = [&](const at::Tensor& tensor, std::int64_t stride) {
    const auto base = reinterpret_cast<std::int64_t>(tensor.const_data_ptr());
    return at::arange(count, tensor.options().dtype(at::kLong)) * stride + base;
  };
  static_assert(sizeof(ListsView) == 2 * sizeof(std::int64_t));
  return at::stack({addresses(starts, starts_stride), addresses(items, items_stride)}, 1)
      .contiguous();
}

}  // namespace

DevicePatterns::DevicePatterns(const AttentionArguments& a, const Expression& pattern,
                               bool capturing) {
  const Sizes whole = whole_sizes(head_patterns(pattern)[0], {a.query.size(2), a.key.size(2)});
  add_tensors(pattern, a.pattern_tensors, whole.n_k, capturing);
  if (a.global_mask) add_globals(a.global_mask->contiguous());
}

void DevicePatterns::add_tensors(const Expression& pattern, const OptionalTensors& given,
                                 std::int64_t n_k, bool capturing) {
  const PatternTensors own(pattern, given);
  batch_ = own.batch(pattern);
  heads_ = own.heads(pattern);
  const std::vector<at::Tensor> all = own.tensors();
  TORCH_CHECK_NOT_IMPLEMENTED(all.size() < kMostTensors, "sparse_attn: expected fewer than ",
                              kMostTensors, " tensors in a pattern on this device, got ",
                              all.size());
  for (const Expression* user : tensor_users(pattern)) {
    const auto i = static_cast<std::size_t>(user->tensor);
    at::Tensor tensor = all[i];
    if (user->word == Word::kKeyLists) {
      const at::Tensor* counts = own_tensors(*user) > 1 ? &all[i + 1] : nullptr;
      tensor = sorted_lists(tensor.to(at::kLong), counts, n_k, capturing);
      widest_list_ = std::max(widest_list_, tensor.size(-1));
    }
    tensors_[i] = program_tensor(tensor, tensor.size(-1));
    kept_.push_back(tensor);
  }
  next_tensor_ = static_cast<std::int32_t>(all.size());
}

void DevicePatterns::add_globals(const at::Tensor& mask) {
  const std::int64_t n_k = mask.size(1);
  global_tensor_ = next_tensor_;
  tensors_[static_cast<std::size_t>(global_tensor_)] = {mask.const_data_ptr(), n_k, 0, n_k};
  global_mask_ = mask;
}

void DevicePatterns::put_into(cuda::Call& call, const DevicePlans& plans, bool backward) {
  std::copy(tensors_.begin(), tensors_.end(), call.tensors);
  if (global_mask_.defined()) make_globals(call, plans);
  if (widest_list_ > 0) make_lists(call, plans, backward);
}

void DevicePatterns::make_globals(cuda::Call& call, const DevicePlans& plans) {
  const AttentionParams& p = call.params;
  const std::int64_t offset = p.offset();
  at::Tensor of_keys = global_mask_, of_queries = global_mask_;
  std::int64_t first_query = 0;  // that `of_queries` has
  if (p.whole.keys) {
    of_keys = columns_at(global_mask_, key_tokens(call, plans));
    of_queries = columns_at(global_mask_, query_tokens(call, plans) + offset);
  } else if (offset > 0) {
    of_queries = global_mask_.narrow(1, offset, p.n_q);
  } else {
    first_query = -offset;
  }
  const at::Tensor keys = places(of_keys), key_counts = of_keys.sum(1),
                   queries = places(of_queries) + first_query, query_counts = of_queries.sum(1);
  call.global = {keys.const_data_ptr<std::int64_t>(),
                 key_counts.const_data_ptr<std::int64_t>(),
                 queries.const_data_ptr<std::int64_t>(),
                 query_counts.const_data_ptr<std::int64_t>(),
                 of_keys.size(1),
                 of_queries.size(1)};
  kept_.insert(kept_.end(), {keys, key_counts, queries, query_counts});
}

void DevicePatterns::make_lists(cuda::Call& call, const DevicePlans& plans, bool backward) {
  const AttentionParams& p = call.params;
  const std::int64_t heads = heads_ > 1 ? p.heads : call.plan_heads, lists = batch_ * heads;
  const std::int64_t columns = widest_list_;
  const auto parts = static_cast<std::int64_t>(call.image->listed().size());
  const auto options = kept_[0].options();
  const at::Tensor items = at::empty({lists, p.n_q * parts * columns}, options.dtype(at::kInt));
  cuda::ListFilter filter;
  filter.arguments.call = p;
  filter.arguments.plan_heads = call.plan_heads;
  std::copy(tensors_.begin(), tensors_.end(), filter.arguments.tensors);
  if (p.whole.keys) {
    kept_.push_back(places_of(key_tokens(call, plans), p.whole.n_k));
    filter.places = kept_.back().const_data_ptr<std::int64_t>();
  }
  filter.items = items.mutable_data_ptr<std::int32_t>();
  filter.width = parts * columns;
  filter.columns = columns;
  filter.list_batch = batch_;
  filter.list_heads = heads;
  for (const std::int64_t table : call.image->listed()) {
    filter.arguments.passes = reinterpret_cast<const GridPass*>(call.base + table);
    cuda::filter_lists(filter, call.stream);
    filter.first_column += columns;
  }
  const at::Tensor starts = at::arange(p.n_q + 1, options.dtype(at::kLong)) * filter.width;
  const at::Tensor by_query = views_of(starts, 0, items, items.stride(0) * 4, lists);
  call.lists.keys_of_query = static_cast<const ListsView*>(by_query.const_data_ptr());
  call.lists.batch = static_cast<std::int32_t>(batch_);
  call.lists.heads = static_cast<std::int32_t>(heads);
  kept_.insert(kept_.end(), {items, starts, by_query});
  if (!backward) return;
  // The same pairs by key, in the order of the queries. Those that are not allowed come last.
  const at::Tensor keys = at::where(items < 0, static_cast<int>(p.n_k), items);
  const auto [sorted, order] = stable_sort(keys);
  const at::Tensor queries = order.floor_divide(filter.width).to(at::kInt).contiguous();
  const at::Tensor each =
      at::arange(p.n_k + 1, options.dtype(at::kInt)).expand({lists, p.n_k + 1}).contiguous();
  const at::Tensor ends = at::searchsorted(sorted.contiguous(), each).contiguous();
  const at::Tensor by_key =
      views_of(ends, ends.stride(0) * 8, queries, queries.stride(0) * 4, lists);
  call.lists.queries_of_key = static_cast<const ListsView*>(by_key.const_data_ptr());
  kept_.insert(kept_.end(), {queries, ends, by_key});
}

}  // namespace sparse_attn
