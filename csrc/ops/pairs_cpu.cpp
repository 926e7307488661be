// The ops of listed pairs on the CPU: the checks of what indices hold, and the kernels.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include "cpu/kernels.h"
#include "ops/pairs.h"
#include "ops/tensors.h"
#include "ops/threads.h"
#include "ops/workspace.h"

namespace sparse_attn {
namespace {

/// The pairs by key: a counting sort for each head, which keeps the order of the queries.
class Transposed {
 public:
  explicit Transposed(PairParams& p, std::int64_t pairs)
      : starts_(at::zeros({p.batch * p.heads, p.n_k + 1}, at::kLong)),
        queries_(at::empty({pairs}, at::kInt)),
        entries_(at::empty({pairs}, at::kLong)) {
    auto* starts = starts_.mutable_data_ptr<std::int64_t>();
    auto* queries = queries_.mutable_data_ptr<std::int32_t>();
    auto* entries = entries_.mutable_data_ptr<std::int64_t>();
    at::parallel_for(0, p.batch * p.heads, 1, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t head = begin; head < end; ++head)
        sort(p, head, starts + head * (p.n_k + 1), queries, entries);
    });
    p.starts = starts;
    p.queries = queries;
    p.entries = entries;
  }

 private:
  static void sort(const PairParams& p, std::int64_t head, std::int64_t* starts,
                   std::int32_t* queries, std::int64_t* entries) {
    const std::int64_t* crow = p.crow + head * (p.n_q + 1);
    for (std::int64_t e = crow[0]; e < crow[p.n_q]; ++e) ++starts[p.col[e]];
    // The places after the last of each key; filled from the back, they end as its first.
    std::int64_t end = crow[0];
    for (std::int64_t j = 0; j <= p.n_k; ++j) starts[j] = end += starts[j];
    for (std::int64_t i = p.n_q; i-- > 0;) {
      for (std::int64_t e = crow[i + 1]; e-- > crow[i];) {
        const std::int64_t place = --starts[p.col[e]];
        queries[place] = static_cast<std::int32_t>(i);
        entries[place] = e;
      }
    }
  }

  at::Tensor starts_, queries_, entries_;
};

at::Tensor pairs_cpu(c10::DispatchKeySet, Factor made, const Factors& given,
                     const PairIndices& pairs) {
  check_pairs(made, given, pairs);
  Factors factors = given;
  factors[made] = empty_factor(made, given, pairs);
  const at::Tensor &result = factors[made],
                   &dense = made == Factor::kRows ? given.columns : given.rows;
  const at::Tensor rows = with_unit_stride(factors.rows),
                   columns = with_unit_stride(factors.columns),
                   values = factors.values.contiguous(), crow = pairs.crow.contiguous(),
                   col = pairs.col.contiguous();
  PairParams params;
  params.dtype = data_type(dense.scalar_type());
  params.batch = crow.size(0);
  params.heads = crow.size(1);
  params.heads_kv = pairs.heads_kv.expect_int();
  params.n_q = crow.size(2) - 1;
  params.n_k = pairs.n_k.expect_int();
  params.size = dense.size(3);
  params.rows = const_view(rows);
  params.columns = const_view(columns);
  params.values = const_cast<void*>(values.const_data_ptr());
  params.crow = crow.const_data_ptr<std::int64_t>();
  params.col = col.const_data_ptr<std::int64_t>();
  check_pair_contents(crow, col, params.n_k);
  if (result.numel() == 0) return result;
  const cpu::Kernels& kernels =
      with_value_errors([&]() -> const cpu::Kernels& { return cpu::kernels(params.dtype); });
  const Parallel parallel = torch_threads();
  const Workspace workspace(kernels.pair_workspace(params, parallel.threads));
  params.workspace = workspace.data();
  if (made == Factor::kColumns) {
    const Transposed by_key(params, col.size(0));
    kernels.pair_column_sums(params, parallel);
  } else {
    (made == Factor::kValues ? kernels.pair_products : kernels.pair_sums)(params, parallel);
  }
  return result;
}

}  // namespace

TORCH_LIBRARY_IMPL(sparse_attn, CPU, m) { implement_pairs<pairs_cpu>(m); }

}  // namespace sparse_attn
