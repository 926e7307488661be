// The ops of listed pairs on a GPU: compositions of ATen's, so many numbers at a time that memory
// stays linear in the pairs. Every sum runs in one order: results are the same bits in each run.
#include <ATen/ATen.h>
#include <c10/core/DeviceGuard.h>
#include <torch/library.h>

#include <algorithm>

#include "ops/checks.h"
#include "ops/pairs.h"

namespace sparse_attn {
namespace {

/// Numbers that are gathered at a time: 64 MiB of float32.
constexpr std::int64_t kGathered = std::int64_t{1} << 24;

std::int64_t parts_of(std::int64_t size) {
  return std::max<std::int64_t>(1, kGathered / std::max<std::int64_t>(1, size));
}

/// Offsets that ascend through all heads, and keys that exist: asserted without waiting for it.
void assert_contents(const at::Tensor& offsets, const PairIndices& pairs) {
  const at::Tensor first = pairs.crow.select(2, 0).flatten(),
                   last = pairs.crow.select(2, -1).flatten();
  const at::Tensor ascend = (pairs.crow.diff() >= 0).all() & (first == offsets.select(1, 0)).all() &
                            (last == offsets.select(1, -1)).all() &
                            (pairs.crow.amax() == pairs.col.size(0));
  at::_assert_async(ascend,
                    "sparse_attn: expected crow_indices that ascend from 0 to the number of pairs "
                    "through all heads, got others");
  at::_assert_async(((pairs.col >= 0) & (pairs.col < pairs.n_k.expect_int())).all(),
                    "sparse_attn: expected col_indices of columns that there are, got others");
}

/// For each pair the places of its row and of its column in tensors (all rows, size).
struct Places {
  at::Tensor row, column;
  at::Tensor row_offsets;  // of all rows, into the pairs
};

Places places_of(const PairIndices& pairs) {
  const std::int64_t heads = pairs.crow.size(1), n_q = pairs.crow.size(2) - 1;
  const std::int64_t group = heads / std::max<std::int64_t>(1, pairs.heads_kv.expect_int());
  const at::Tensor counts = pairs.crow.diff().flatten();
  const at::Tensor offsets = at::constant_pad_nd(counts.cumsum(0), {1, 0});
  assert_contents(offsets.unfold(0, n_q + 1, n_q), pairs);
  const std::optional<std::int64_t> total = pairs.col.size(0);
  const at::Tensor row = at::repeat_interleave(counts, total);
  const at::Tensor head_kv = at::floor_divide(row, n_q * group);
  return {row, head_kv * pairs.n_k.expect_int() + pairs.col, offsets};
}

at::Tensor gathered(const at::Tensor& flat, const at::Tensor& places) {
  return flat.index_select(0, places).to(lse_type(flat));
}

void products(const at::Tensor& result, const at::Tensor& rows, const at::Tensor& columns,
              const Places& places) {
  const std::int64_t step = parts_of(rows.size(1));
  for (std::int64_t e = 0; e < result.size(0); e += step) {
    const std::int64_t count = std::min(step, result.size(0) - e);
    result.narrow(0, e, count)
        .copy_((gathered(rows, places.row.narrow(0, e, count)) *
                gathered(columns, places.column.narrow(0, e, count)))
                   .sum(1));
  }
}

/// result[r] = Σ_e values[e] · flat[places[e]] over the pairs from offsets[r] to offsets[r + 1].
void sums(const at::Tensor& result, const at::Tensor& values, const at::Tensor& flat,
          const at::Tensor& places, const at::Tensor& offsets) {
  const std::int64_t step = parts_of(values.size(0)), size = flat.size(1);
  for (std::int64_t c = 0; c < size; c += step) {
    const std::int64_t count = std::min(step, size - c);
    const at::Tensor terms = gathered(flat.narrow(1, c, count), places) * values.unsqueeze(1);
    result.narrow(1, c, count)
        .copy_(at::segment_reduce(terms, "sum", {}, {}, offsets, 0, /*unsafe=*/true, 0));
  }
}

void column_sums(const at::Tensor& result, const at::Tensor& values, const at::Tensor& rows,
                 const Places& places) {
  const auto [columns, order] = at::sort(places.column, /*stable=*/true, 0, false);
  const at::Tensor ends = at::arange(result.size(0) + 1, columns.options());
  sums(result, values.index_select(0, order), rows, places.row.index_select(0, order),
       at::searchsorted(columns, ends));
}

at::Tensor pairs_cuda(c10::DispatchKeySet, Factor made, const Factors& given,
                      const PairIndices& pairs) {
  check_pairs(made, given, pairs);
  const c10::DeviceGuard guard(pairs.col.device());
  const at::Tensor result = empty_factor(made, given, pairs);
  if (result.numel() == 0) return result;
  if (pairs.crow.size(2) == 1 || pairs.col.size(0) == 0) return result.zero_();
  const Places places = places_of(pairs);
  const auto flat = [](const at::Tensor& tensor) { return tensor.flatten(0, 2); };
  if (made == Factor::kValues) {
    products(result, flat(given.rows), flat(given.columns), places);
  } else if (made == Factor::kRows) {
    sums(flat(result), given.values, flat(given.columns), places.column, places.row_offsets);
  } else {
    column_sums(flat(result), given.values, flat(given.rows), places);
  }
  return result;
}

}  // namespace

// The emulator of tests/native serves another device.
#ifndef SPARSE_ATTN_CUDA_KERNELS_FOR
#define SPARSE_ATTN_CUDA_KERNELS_FOR CUDA
#endif

TORCH_LIBRARY_IMPL(sparse_attn, SPARSE_ATTN_CUDA_KERNELS_FOR, m) { implement_pairs<pairs_cuda>(m); }

}  // namespace sparse_attn
