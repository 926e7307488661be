// torch.vmap: the mapped dimension folds into the batch, so that one call of the kernels serves all
// of it. What cannot be folded (dropout, whose draws count examples; tensors of a pattern) is
// called slice by slice.
#include <ATen/ATen.h>
#include <ATen/functorch/BatchedTensorImpl.h>
#include <torch/library.h>

#include <algorithm>
#include <optional>
#include <type_traits>
#include <utility>
#include <vector>

#include "ops/checks.h"
#include "ops/sink.h"

namespace sparse_attn {
namespace {

// ---- the tensors of a call, by what their first dimension is
// -------------------------------------

/// Tensors that begin with the batch, and tables, whose batch may be 1. Null where there is none.
struct Parts {
  std::vector<at::Tensor*> of_examples;
  std::vector<at::Tensor*> tables;

  void add(at::Tensor& tensor) { of_examples.push_back(&tensor); }
  void add(OptionalTensor& tensor) {
    if (tensor) of_examples.push_back(&*tensor);
  }
  void add_table(OptionalTensor& table) {
    if (table) tables.push_back(&*table);
  }
  void add(Tangents& t) {
    for (OptionalTensor* tangent : {&t.query, &t.key, &t.value}) add(*tangent);
    for (OptionalTensor* tangent : {&t.bias, &t.gate}) add_table(*tangent);
  }
  void add(AttentionArguments& a) {
    for (at::Tensor* tensor : {&a.query, &a.key, &a.value}) add(*tensor);
    for (OptionalTensor* mask : {&a.key_padding_mask, &a.global_mask}) add(*mask);
    for (OptionalTensor* table : {&a.bias, &a.gate}) add_table(*table);
  }
};

Parts parts_of(AttentionArguments& a) {
  Parts parts;
  parts.add(a);
  return parts;
}
Parts parts_of(BackwardArguments& a) {
  Parts parts = parts_of(static_cast<AttentionArguments&>(a));
  for (at::Tensor* tensor : {&a.grad_output, &a.output, &a.logsumexp}) parts.add(*tensor);
  parts.add(a.grad_logsumexp);
  return parts;
}
Parts parts_of(TangentArguments& a) {
  Parts parts = parts_of(static_cast<AttentionArguments&>(a));
  for (at::Tensor* tensor : {&a.output, &a.logsumexp}) parts.add(*tensor);
  parts.add(a.tangents);
  return parts;
}
Parts parts_of(SecondArguments& a) {
  Parts parts = parts_of(static_cast<BackwardArguments&>(a));
  parts.add(a.tangents);
  return parts;
}

// ---- one level of vmap --------------------------------------------------------------------------

struct Mapped {
  at::Tensor tensor;
  std::optional<std::int64_t> dim;
};

/// The innermost level that any tensor of a call is mapped at.
class Level {
 public:
  void meet(const at::Tensor& tensor) {
    if (const auto* impl = at::functorch::maybeGetBatchedImpl(tensor))
      id_ = std::max(id_, impl->level());
  }

  Mapped unwrap(const at::Tensor& tensor) {
    const auto* impl = at::functorch::maybeGetBatchedImpl(tensor);
    if (!impl || impl->level() != id_) return {tensor, std::nullopt};
    size_ = impl->value().sym_size(impl->bdim());
    return {impl->value(), impl->bdim()};
  }
  at::Tensor wrap(const at::Tensor& tensor) const {
    return at::functorch::makeBatched(tensor, 0, id_);
  }
  /// Of the mapped dimension, known once a mapped tensor was unwrapped.
  const c10::SymInt& size() const { return size_; }

 private:
  std::int64_t id_ = -1;
  c10::SymInt size_ = 1;
};

/// The mapped dimension in front; a tensor that is not mapped is repeated.
at::Tensor in_front(const Mapped& mapped, const c10::SymInt& size) {
  if (mapped.dim) return mapped.tensor.movedim(*mapped.dim, 0);
  std::vector<c10::SymInt> sizes = mapped.tensor.sym_sizes().vec();
  sizes.insert(sizes.begin(), size);
  return mapped.tensor.unsqueeze(0).expand_symint(sizes);
}

/// A table for each slice and example, or as it is if all share it.
at::Tensor fold_table(const Mapped& mapped, const c10::SymInt& size, const c10::SymInt& batch,
                      bool for_gradients) {
  if (!mapped.dim && !for_gradients && mapped.tensor.sym_size(0) == 1) return mapped.tensor;
  at::Tensor table = in_front(mapped, size);
  std::vector<c10::SymInt> sizes = table.sym_sizes().vec();
  sizes[1] = batch;
  return table.expand_symint(sizes).flatten(0, 1);
}

at::Tensor unfold(const at::Tensor& result, const c10::SymInt& size, const c10::SymInt& batch) {
  return result.unflatten_symint(0, {size, batch});
}

/// Gradients of tables are summed over the examples that share one.
at::Tensor unfold_table(const at::Tensor& result, const std::optional<c10::SymInt>& own_batch,
                        const c10::SymInt& size, const c10::SymInt& batch) {
  const at::Tensor all = unfold(result, size, batch);
  return own_batch && *own_batch == 1 ? all.sum(1, /*keepdim=*/true) : all;
}

/// Whether the call's other tensors are the same for all slices, and no tensor of the pattern tells
/// examples apart.
bool can_fold(Level& level, const CallOptions& a) {
  if (a.dropout_p > 0.0) return false;  // slices with one seed drop the same pairs
  bool alike = true;
  for (const at::Tensor& tensor : a.pattern_tensors.value_or(at::ArrayRef<at::Tensor>()))
    alike = alike && !level.unwrap(tensor).dim;
  if (!alike || !a.pattern_tensors || a.pattern_tensors->empty()) return alike;
  const Expression pattern = check_pattern(a.pattern);
  for (const Expression* user : tensor_users(pattern)) {
    for (int i = 0; i < own_tensors(*user); ++i) {
      const at::Tensor& tensor = (*a.pattern_tensors)[static_cast<std::size_t>(user->tensor + i)];
      const bool is_count = user->word == Word::kKeyLists && i == 1;
      if (tensor.dim() >= (is_count ? 3 : 4) && tensor.sym_size(0) != 1) return false;
    }
  }
  return true;
}

// ---- ops ----------------------------------------------------------------------------------------

/// Which results of an op are gradients of tables: those of bias and gate, from `first` on.
template <class Arguments, class Result>
constexpr std::size_t kFirstTable = std::tuple_size_v<Result>;
template <>
constexpr std::size_t kFirstTable<BackwardArguments, TableGradients> = 0;
template <>
constexpr std::size_t kFirstTable<SecondArguments, SecondGradients> = 5;

template <class Result, class Arguments, class Call>
Result fold(Level& level, Arguments a, const Call& call) {
  constexpr std::size_t kTables = kFirstTable<Arguments, Result>;
  constexpr bool kMakesTables = kTables < std::tuple_size_v<Result>;
  Parts parts = parts_of(a);
  std::vector<Mapped> examples, tables;
  for (const at::Tensor* tensor : parts.of_examples) examples.push_back(level.unwrap(*tensor));
  for (const at::Tensor* table : parts.tables) tables.push_back(level.unwrap(*table));
  const c10::SymInt size = level.size(), batch = in_front(examples[0], size).sym_size(1);
  std::optional<c10::SymInt> batch_of_bias, batch_of_gate;
  if (a.bias) batch_of_bias = in_front(level.unwrap(*a.bias), size).sym_size(1);
  if (a.gate) batch_of_gate = in_front(level.unwrap(*a.gate), size).sym_size(1);
  // A table and its tangent, of which one may be mapped, are to have the same sizes.
  const bool repeat_tables = kMakesTables || std::is_same_v<Arguments, TangentArguments>;
  for (std::size_t i = 0; i < examples.size(); ++i)
    *parts.of_examples[i] = in_front(examples[i], size).flatten(0, 1);
  for (std::size_t i = 0; i < tables.size(); ++i)
    *parts.tables[i] = fold_table(tables[i], size, batch, repeat_tables);
  std::vector<at::Tensor> pattern_tensors;
  for (const at::Tensor& tensor : a.pattern_tensors.value_or(at::ArrayRef<at::Tensor>()))
    pattern_tensors.push_back(level.unwrap(tensor).tensor);
  a.pattern_tensors = at::ArrayRef<at::Tensor>(pattern_tensors);
  if (a.dropout_seed) a.dropout_seed = level.unwrap(*a.dropout_seed).tensor;
  std::size_t i = 0;
  const auto one = [&](const at::Tensor& result) {
    const std::size_t number = i++;
    if (number < kTables) return level.wrap(unfold(result, size, batch));
    const auto& own_batch = number == kTables ? batch_of_bias : batch_of_gate;
    return own_batch ? level.wrap(unfold_table(result, own_batch, size, batch)) : result;
  };
  return std::apply([&](const auto&... result) { return Result{one(result)...}; }, call(a));
}

template <class Result, class Arguments, class Call>
Result slice_by_slice(Level& level, const Arguments& given, const Call& call) {
  std::vector<std::vector<at::Tensor>> results(std::tuple_size_v<Result>);
  const auto count = level.size().guard_int(__FILE__, __LINE__);
  for (std::int64_t v = 0; v < count; ++v) {
    const auto slice = [&](const at::Tensor& tensor) {
      const Mapped mapped = level.unwrap(tensor);
      return mapped.dim ? mapped.tensor.select(*mapped.dim, v) : mapped.tensor;
    };
    Arguments a = given;
    const Parts parts = parts_of(a);
    for (at::Tensor* tensor : parts.of_examples) *tensor = slice(*tensor);
    for (at::Tensor* table : parts.tables) *table = slice(*table);
    std::vector<at::Tensor> pattern_tensors;
    for (const at::Tensor& tensor : a.pattern_tensors.value_or(at::ArrayRef<at::Tensor>()))
      pattern_tensors.push_back(slice(tensor));
    a.pattern_tensors = at::ArrayRef<at::Tensor>(pattern_tensors);
    if (a.dropout_seed) a.dropout_seed = slice(*a.dropout_seed);
    std::size_t i = 0;
    std::apply([&](const auto&... result) { (results[i++].push_back(result), ...); }, call(a));
  }
  std::size_t i = 0;
  const auto stacked = [&] { return level.wrap(at::stack(results[i++])); };
  return std::apply([&](auto... each) { return Result{(static_cast<void>(each), stacked())...}; },
                    Result{});
}

template <class Result, class Arguments, class Call>
Result map(const Arguments& a, const Call& call) {
  Level level;
  Arguments copy = a;
  const Parts parts = parts_of(copy);
  std::vector<at::Tensor> tensors = a.pattern_tensors.value_or(at::ArrayRef<at::Tensor>()).vec();
  for (const at::Tensor* tensor : parts.of_examples) tensors.push_back(*tensor);
  for (const at::Tensor* table : parts.tables) tensors.push_back(*table);
  if (a.dropout_seed) tensors.push_back(*a.dropout_seed);
  for (const at::Tensor& tensor : tensors) level.meet(tensor);
  for (const at::Tensor& tensor : tensors) level.unwrap(tensor);
  const c10::impl::ExcludeDispatchKeyGuard below(c10::DispatchKey::FuncTorchBatched);
  return can_fold(level, a) ? fold<Result>(level, a, call) : slice_by_slice<Result>(level, a, call);
}

Outputs attention_batched(c10::DispatchKeySet, const AttentionArguments& a) {
  if (a.sink) return with_sink(attention_op().call(without_sink(a)), *a.sink);
  return map<Outputs>(a, [](const AttentionArguments& b) { return attention_op().call(b); });
}
Gradients backward_batched(c10::DispatchKeySet, const BackwardArguments& a) {
  if (a.sink) return backward_op().call(over_keys(a));
  return map<Gradients>(a, [](const BackwardArguments& b) { return backward_op().call(b); });
}
TableGradients table_backward_batched(c10::DispatchKeySet, const BackwardArguments& a) {
  if (a.sink) return table_backward_op().call(over_keys(a));
  return map<TableGradients>(
      a, [](const BackwardArguments& b) { return table_backward_op().call(b); });
}
Outputs tangent_batched(c10::DispatchKeySet, const TangentArguments& a) {
  return map<Outputs>(a, [](const TangentArguments& b) { return tangent_op().call(b); });
}
SecondGradients second_batched(c10::DispatchKeySet, const SecondArguments& a) {
  return map<SecondGradients>(a, [](const SecondArguments& b) { return second_op().call(b); });
}

}  // namespace

TORCH_LIBRARY_IMPL(sparse_attn, FuncTorchBatched, m) {
  m.impl("attention", TORCH_FN(AttentionOp::kernel<attention_batched>));
  m.impl("attention_backward", TORCH_FN(BackwardOp::kernel<backward_batched>));
  m.impl("attention_table_backward", TORCH_FN(TableBackwardOp::kernel<table_backward_batched>));
  m.impl("attention_tangent", TORCH_FN(TangentOp::kernel<tangent_batched>));
  m.impl("attention_backward_backward", TORCH_FN(SecondOp::kernel<second_batched>));
}

}  // namespace sparse_attn
