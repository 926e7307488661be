#include <ATen/ATen.h>
#include <torch/library.h>

#include "cpu/shared_keys.h"
#include "ops/checks.h"
#include "ops/shared_keys.h"
#include "ops/threads.h"

namespace sparse_attn {
namespace {

IndicesAndCounts shared_keys_cpu(const SharedKeysArguments& a) {
  const at::Tensor query_members = a.query_members.contiguous(),
                   query_offsets = a.query_offsets.contiguous(),
                   key_members = a.key_members.contiguous(),
                   key_offsets = a.key_offsets.contiguous(),
                   padding = a.key_padding_mask ? a.key_padding_mask->contiguous() : at::Tensor();
  const std::int64_t batch = query_members.size(0), heads = query_members.size(1);
  cpu::SharedKeysCall call;
  call.queries = {query_members.const_data_ptr<std::int64_t>(),
                  query_offsets.const_data_ptr<std::int64_t>(), query_members.size(2),
                  a.n_q.expect_int()};
  call.keys = {key_members.const_data_ptr<std::int64_t>(),
               key_offsets.const_data_ptr<std::int64_t>(), key_members.size(2), a.n_k.expect_int()};
  call.sets = batch * heads;
  call.heads = heads;
  call.groups = query_offsets.size(2) - 1;
  call.key_padding = padding.defined() ? padding.const_data_ptr<bool>() : nullptr;
  call.is_causal = a.is_causal;
  const Parallel parallel = torch_threads();
  return with_value_errors([&]() -> IndicesAndCounts {
    const cpu::SharedKeys lists(call, parallel);
    const auto options = query_members.options().dtype(at::kInt);
    const at::Tensor indices =
                         at::empty({batch, heads, call.queries.tokens, lists.longest()}, options),
                     counts = at::empty({batch, heads, call.queries.tokens}, options);
    lists.write(indices.mutable_data_ptr<std::int32_t>(), counts.mutable_data_ptr<std::int32_t>(),
                parallel);
    return {indices, counts};
  });
}

}  // namespace

TORCH_LIBRARY_IMPL(sparse_attn, CPU, m) {
  m.impl("shared_keys", TORCH_FN(shared_keys_kernel<shared_keys_cpu>));
}

}  // namespace sparse_attn
