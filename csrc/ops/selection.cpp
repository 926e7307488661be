// The ops that choose keys: schemas, checks, shapes without data, autograd, autocast.
#include "ops/selection.h"

#include <ATen/ATen.h>
#include <ATen/autocast_mode.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <torch/library.h>

#include "ops/checks.h"
#include "ops/tensors.h"

namespace sparse_attn {
namespace {

using TopSchema = ChosenKeys(const at::Tensor&, const at::Tensor&, c10::SymInt,
                             const OptionalTensor&, bool, std::optional<double>, bool);
using AboveSchema = ChosenKeys(const at::Tensor&, const at::Tensor&, const at::Tensor&,
                               const OptionalTensor&, bool, std::optional<double>, bool);
using LseSchema = at::Tensor(const at::Tensor&, const at::Tensor&, const OptionalTensor&, bool,
                             std::optional<double>, bool);

template <class Schema>
c10::TypedOperatorHandle<Schema> find(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Schema>();
}

ChosenKeys call_top(const SelectionArguments& a, c10::SymInt k) {
  static const auto op = find<TopSchema>("sparse_attn::top_keys");
  return op.call(a.query, a.key, k, a.key_padding_mask, a.is_causal, a.scale, a.enable_gqa);
}

ChosenKeys call_above(const SelectionArguments& a, const at::Tensor& bounds) {
  static const auto op = find<AboveSchema>("sparse_attn::keys_above");
  return op.call(a.query, a.key, bounds, a.key_padding_mask, a.is_causal, a.scale, a.enable_gqa);
}

at::Tensor call_lse(const SelectionArguments& a) {
  static const auto op = find<LseSchema>("sparse_attn::keys_logsumexp");
  return op.call(a.query, a.key, a.key_padding_mask, a.is_causal, a.scale, a.enable_gqa);
}

// ---- shapes without data; how long the longest list above a bound is, Python's fake kernel says
// --

ChosenKeys top_meta(const SelectionArguments& a, c10::SymInt k) {
  check_top(a, k);
  return {zeros_of_lists(a, k), zeros_of_rows(a, at::kInt)};
}

at::Tensor lse_meta(const SelectionArguments& a) {
  check_selection(a);
  return zeros_of_rows(a, at::kDouble);
}

// ---- autograd: there is none --------------------------------------------------------------------

ChosenKeys top_autograd(const SelectionArguments& a, c10::SymInt k) {
  const at::AutoDispatchBelowADInplaceOrView below;
  return call_top(a, k);
}

ChosenKeys above_autograd(const SelectionArguments& a, const at::Tensor& bounds) {
  const at::AutoDispatchBelowADInplaceOrView below;
  return call_above(a, bounds);
}

at::Tensor lse_autograd(const SelectionArguments& a) {
  const at::AutoDispatchBelowADInplaceOrView below;
  return call_lse(a);
}

// ---- autocast: the logits are those of the attention that follows -------------------------------

template <c10::DeviceType kDevice>
SelectionArguments cast(const SelectionArguments& a) {
  SelectionArguments cast = a;
  const at::ScalarType type = at::autocast::get_autocast_dtype(kDevice);
  for (at::Tensor* tensor : {&cast.query, &cast.key})
    *tensor = at::autocast::cached_cast(type, *tensor, kDevice);
  return cast;
}

template <c10::DeviceType kDevice>
ChosenKeys top_autocast(const SelectionArguments& a, c10::SymInt k) {
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(
      at::autocast::get_autocast_dispatch_key_from_device_type(kDevice));
  return call_top(cast<kDevice>(a), k);
}

template <c10::DeviceType kDevice>
ChosenKeys above_autocast(const SelectionArguments& a, const at::Tensor& bounds) {
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(
      at::autocast::get_autocast_dispatch_key_from_device_type(kDevice));
  const SelectionArguments with_cast = cast<kDevice>(a);
  return call_above(with_cast, bounds.to(lse_type(with_cast.query)));
}

template <c10::DeviceType kDevice>
at::Tensor lse_autocast(const SelectionArguments& a) {
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(
      at::autocast::get_autocast_dispatch_key_from_device_type(kDevice));
  return call_lse(cast<kDevice>(a));
}

}  // namespace

void check_selection(const SelectionArguments& a) {
  CallOptions options{{}};
  options.key_padding_mask = a.key_padding_mask;
  options.scale = a.scale;
  options.enable_gqa = a.enable_gqa;
  check_inputs({options, a.query, a.key, a.key});
}

void check_top(const SelectionArguments& a, const c10::SymInt& k) {
  check_selection(a);
  TORCH_CHECK_VALUE(k >= 1, "sparse_attn: expected k to be at least 1, got ", k);
}

void check_bounds(const SelectionArguments& a, const at::Tensor& bounds) {
  check_selection(a);
  const at::ScalarType type = lse_type(a.query);
  TORCH_CHECK_TYPE(bounds.scalar_type() == type && bounds.layout() == at::kStrided,
                   "sparse_attn: expected bounds to be a dense tensor of dtype ", type, ", got ",
                   bounds.scalar_type(), " (", bounds.layout(), ")");
  TORCH_CHECK_VALUE(bounds.device() == a.query.device(), "sparse_attn: expected bounds on device ",
                    a.query.device(), ", as query, got ", bounds.device());
  const auto query = a.query.sym_sizes(), given = bounds.sym_sizes();
  TORCH_CHECK_VALUE(
      given.size() == 3 && given[0] == query[0] && given[1] == query[1] && given[2] == query[2],
      "sparse_attn: expected bounds of shape ", query.slice(0, 3), " (batch, heads, queries), got ",
      given);
}

at::Tensor zeros_of_rows(const SelectionArguments& a, at::ScalarType type) {
  return at::zeros_symint(a.query.sym_sizes().slice(0, 3), a.query.options().dtype(type));
}

at::Tensor zeros_of_lists(const SelectionArguments& a, const c10::SymInt& width) {
  const auto rows = a.query.sym_sizes();
  return at::zeros_symint({rows[0], rows[1], rows[2], width}, a.query.options().dtype(at::kInt));
}

SelectionCall::SelectionCall(const SelectionArguments& a)
    : query_(with_unit_stride(a.query)), key_(with_unit_stride(a.key)) {
  params.dtype = data_type(query_.scalar_type());
  params.batch = query_.size(0);
  params.heads = query_.size(1);
  params.heads_kv = key_.size(1);
  params.n_q = query_.size(2);
  params.n_k = key_.size(2);
  params.head_dim = query_.size(3);
  params.scale = a.scale.value_or(default_scale(query_));
  params.is_causal = a.is_causal;
  params.query = const_view(query_);
  params.key = const_view(key_);
  if (!a.key_padding_mask) return;
  padding_ = a.key_padding_mask->contiguous();
  params.key_padding = static_cast<const std::uint8_t*>(padding_.const_data_ptr());
}

TORCH_LIBRARY_FRAGMENT(sparse_attn, m) {
  const std::string inputs = "(Tensor query, Tensor key, ",
                    options =
                        "*, Tensor? key_padding_mask=None, bool is_causal=False, "
                        "float? scale=None, bool enable_gqa=False) -> ",
                    lists = "(Tensor indices, Tensor counts)";
  const auto define = [&](const std::string& text) {
    m.def(torch::schema(text.c_str()), {at::Tag::pt2_compliant_tag});
  };
  define("top_keys" + inputs + "SymInt k, " + options + lists);
  m.def(torch::schema(("keys_above" + inputs + "Tensor bounds, " + options + lists).c_str()),
        {at::Tag::pt2_compliant_tag, at::Tag::dynamic_output_shape});
  define("keys_logsumexp" + inputs + options + "Tensor");
}

TORCH_LIBRARY_IMPL(sparse_attn, Meta, m) {
  m.impl("top_keys", TORCH_FN(top_keys_kernel<top_meta>));
  m.impl("keys_logsumexp", TORCH_FN(keys_logsumexp_kernel<lse_meta>));
}

TORCH_LIBRARY_IMPL(sparse_attn, Autograd, m) {
  implement_selection<top_autograd, above_autograd, lse_autograd>(m);
}

TORCH_LIBRARY_IMPL(sparse_attn, AutocastCPU, m) {
  implement_selection<top_autocast<at::kCPU>, above_autocast<at::kCPU>, lse_autocast<at::kCPU>>(m);
}

TORCH_LIBRARY_IMPL(sparse_attn, AutocastCUDA, m) {
  implement_selection<top_autocast<at::kCUDA>, above_autocast<at::kCUDA>, lse_autocast<at::kCUDA>>(
      m);
}

}  // namespace sparse_attn
