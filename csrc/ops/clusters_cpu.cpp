#include "cpu/clusters.h"

#include <ATen/ATen.h>
#include <torch/library.h>

#include "ops/checks.h"
#include "ops/clusters.h"
#include "ops/threads.h"

namespace sparse_attn {
namespace {

at::Tensor own_pairs_cpu(const OwnPairsArguments& a) {
  const at::Tensor queries = a.query_members.contiguous(), keys = a.key_members.contiguous();
  const auto mask = [](const std::optional<at::Tensor>& hidden) {
    return hidden ? hidden->contiguous() : at::Tensor();
  };
  const at::Tensor query_hidden = mask(a.query_hidden), key_hidden = mask(a.key_hidden);
  const auto members = [](const at::Tensor& tokens, std::int64_t length, const at::Tensor& hidden) {
    return cpu::Members{tokens.const_data_ptr<std::int64_t>(), tokens.size(2), length,
                        hidden.defined() ? hidden.const_data_ptr<bool>() : nullptr};
  };
  cpu::OwnPairs call;
  call.queries = members(queries, a.n_q, query_hidden);
  call.keys = members(keys, a.n_k, key_hidden);
  call.sets = queries.size(0);
  const std::int64_t batch = query_hidden.defined() ? query_hidden.size(0)
                             : key_hidden.defined() ? key_hidden.size(0)
                                                    : 1;
  call.heads = call.sets / std::max<std::int64_t>(batch, 1);
  call.clusters = queries.size(1);
  call.is_causal = a.is_causal;
  const at::Tensor bias = at::empty({call.sets, call.clusters, queries.size(2), keys.size(2)},
                                    queries.options().dtype(a.dtype));
  AT_DISPATCH_FLOATING_TYPES(a.dtype, "_own_pairs", [&] {
    with_value_errors(
        [&] { cpu::bias_of_own_pairs(call, bias.mutable_data_ptr<scalar_t>(), torch_threads()); });
  });
  return bias;
}

}  // namespace

TORCH_LIBRARY_IMPL(sparse_attn, CPU, m) {
  m.impl("_own_pairs", TORCH_FN(own_pairs_kernel<own_pairs_cpu>));
}

}  // namespace sparse_attn
