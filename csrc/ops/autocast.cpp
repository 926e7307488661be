// Under autocast query, key and value are cast to its dtype, whatever they come in, and tables of
// another to float32; float64 stays float64, as in torch.
#include <ATen/autocast_mode.h>
#include <torch/library.h>

#include "ops/arguments.h"

namespace sparse_attn {
namespace {

template <c10::DeviceType kDevice>
Outputs attention_autocast(c10::DispatchKeySet, const AttentionArguments& a) {
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(
      at::autocast::get_autocast_dispatch_key_from_device_type(kDevice));
  const at::ScalarType type = at::autocast::get_autocast_dtype(kDevice);
  AttentionArguments cast = a;
  for (at::Tensor* tensor : {&cast.query, &cast.key, &cast.value}) {
    *tensor = at::autocast::cached_cast(type, *tensor, kDevice);
  }
  const bool is_double = cast.query.scalar_type() == at::kDouble;
  for (OptionalTensor* table : {&cast.bias, &cast.gate, &cast.sink}) {
    const bool fits = !*table || is_double || (*table)->scalar_type() == type;
    if (!fits && (*table)->is_floating_point()) *table = (*table)->to(at::kFloat);
  }
  return attention_op().call(cast);
}

}  // namespace

TORCH_LIBRARY_IMPL(sparse_attn, AutocastCPU, m) {
  m.impl("attention", TORCH_FN(AttentionOp::kernel<attention_autocast<at::kCPU>>));
}

TORCH_LIBRARY_IMPL(sparse_attn, AutocastCUDA, m) {
  m.impl("attention", TORCH_FN(AttentionOp::kernel<attention_autocast<at::kCUDA>>));
}

}  // namespace sparse_attn
