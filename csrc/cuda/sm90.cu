// The kernels for sm_90a of one storage type and head size, SPARSE_ATTN_SCALAR and
// SPARSE_ATTN_HEAD_SIZE, which CMakeLists.txt sets. They serve calls without modifiers; what is not
// a product comes from the portable kernels of the type.
#include <algorithm>
#include <limits>
#include <type_traits>

#include "cuda/backward_sm90.cuh"
#include "cuda/forward_sm90.cuh"
#include "cuda/instance.h"
#include "cuda/kernels.h"
#include "cuda/launch.cuh"

namespace sparse_attn::cuda {
namespace {

constexpr int kHeadSize = SPARSE_ATTN_HEAD_SIZE;
using S = SPARSE_ATTN_SCALAR;
template <bool kEvaluates>
using Forward = Sm90Forward<S, kHeadSize, kEvaluates>;
template <Grad kGrad, bool kEvaluates>
using Backward = Sm90Backward<S, kHeadSize, kGrad, kEvaluates>;

/// Heads or batches that are one piece of memory seen several times have no map, and neither have
/// sequences that are too long for the coordinates.
bool has_map(const TensorView& view, std::int64_t batch, std::int64_t heads, std::int64_t tokens) {
  constexpr std::int64_t kMostTokens = std::numeric_limits<std::int32_t>::max();
  return (batch == 1 || view.batch_stride > 0) && (heads == 1 || view.head_stride > 0) &&
         (tokens == 1 || view.row_stride > 0) && tokens <= kMostTokens;
}

/// The maps for the steps of the pass. A dimension of one element has a stride of its own choice:
/// what lies before it.
MappedRows map_rows(const TensorView& view, std::int64_t batch, std::int64_t heads,
                    std::int64_t tokens, std::int64_t columns, const Arguments& arguments) {
  MappedRows mapped;
  if (!has_map(view, batch, heads, tokens)) return mapped;
  MappedTensor tensor;
  tensor.view = view;
  tensor.type = std::is_same_v<S, bfloat16> ? DataType::kBFloat16 : DataType::kFloat16;
  tensor.batch = batch;
  tensor.heads = heads;
  tensor.tokens = tokens;
  tensor.columns = columns;
  if (tokens == 1) tensor.view.row_stride = (columns + kChunk<S> - 1) / kChunk<S> * kChunk<S>;
  if (heads == 1) tensor.view.head_stride = tokens * tensor.view.row_stride;
  if (batch == 1) tensor.view.batch_stride = heads * tensor.view.head_stride;
  for (int i = 0; i < kMostSteps; ++i) {
    const std::int32_t step = arguments.steps[i];
    if (step == 0 || step > tokens) continue;
    mapped.steps[i] = step;
    mapped.maps[i] = make_tensor_map(tensor, step);
  }
  return mapped;
}

template <class Kernel>
void launch_sm90(std::int64_t tasks, void* stream, const Arguments& arguments) {
  Sm90Arguments all;
  all.base = arguments;
  all.tasks = tasks;
  const AttentionParams& p = arguments.call;
  all.query = map_rows(p.query, p.batch, p.heads, p.n_q, p.head_dim, arguments);
  all.key = map_rows(p.key, p.batch, p.heads_kv, p.n_k, p.head_dim, arguments);
  all.value = map_rows(p.value, p.batch, p.heads_kv, p.n_k, p.value_dim, arguments);
  if (p.grad_output.data != nullptr)
    all.grad_output = map_rows(p.grad_output, p.batch, p.heads, p.n_q, p.value_dim, arguments);
  check_blocks(tasks);
  launch<Kernel>(std::min<std::int64_t>(tasks, multiprocessors()), stream, all);
}

template <bool kEvaluates>
Sweeps sweeps() {
  return {launch_sm90<Forward<kEvaluates>>, launch_sm90<Backward<Grad::kQuery, kEvaluates>>,
          launch_sm90<Backward<Grad::kKeyValue, kEvaluates>>, nullptr, nullptr};
}

}  // namespace

Kernels SPARSE_ATTN_NAME(sm90)(const Kernels& portable) {
  Kernels kernels = portable;
  kernels.path = "sm90";
  kernels.shared_bytes =
      largest_shared<Forward<true>, Backward<Grad::kQuery, true>, Backward<Grad::kKeyValue, true>>;
  kernels.in_forward = kernels.in_backward = {kConsumers, kConsumers};
  kernels.planned = sweeps<false>();
  kernels.evaluated = sweeps<true>();
  kernels.modified = {};
  return kernels;
}

}  // namespace sparse_attn::cuda
