// The tensor-core kernels of one storage type and head size, SPARSE_ATTN_SCALAR and
// SPARSE_ATTN_HEAD_SIZE, which CMakeLists.txt sets. What is not a product comes from the portable
// kernels of the type.
#include "cuda/instance.h"
#include "cuda/kernels.h"
#include "cuda/launch.cuh"
#include "cuda/mma_backward.cuh"
#include "cuda/mma_forward.cuh"

namespace sparse_attn::cuda {
namespace {

constexpr int kHeadSize = SPARSE_ATTN_HEAD_SIZE;
using S = SPARSE_ATTN_SCALAR;

template <Grad kGrad, bool kGeneral>
using Backward = MmaBackward<S, kHeadSize, kGrad, kGeneral>;
template <bool kGeneral>
using Forward = MmaForward<S, kHeadSize, kGeneral>;

constexpr bool kBoth = kHeadSize <= kMostForBoth;

/// Only what the table asks for is instantiated.
template <bool kGeneral>
Sweeps sweeps() {
  Sweeps all{launch<Forward<kGeneral>>, launch<Backward<Grad::kQuery, kGeneral>>, nullptr, nullptr,
             nullptr};
  if constexpr (kBoth) {
    all.grad_key_value = launch<Backward<Grad::kKeyValue, kGeneral>>;
  } else {
    all.grad_key = launch<Backward<Grad::kKey, kGeneral>>;
    all.grad_value = launch<Backward<Grad::kValue, kGeneral>>;
  }
  return all;
}

}  // namespace

Kernels SPARSE_ATTN_NAME(mma)(const Kernels& portable) {
  using GradQuery = Backward<Grad::kQuery, true>;
  using GradKeyValue = Backward<kBoth ? Grad::kKeyValue : Grad::kKey, true>;
  Kernels kernels = portable;
  kernels.path = "mma";
  kernels.shared_bytes = largest_shared<Forward<true>, GradQuery, GradKeyValue>;
  kernels.in_forward = {Forward<true>::kTilesPerTask, 1};
  kernels.in_backward = {GradQuery::kTilesPerTask, GradKeyValue::kTilesPerTask};
  kernels.planned = sweeps<false>();
  kernels.evaluated = kernels.modified = sweeps<true>();
  return kernels;
}

}  // namespace sparse_attn::cuda
