// The portable kernels of one storage type, SPARSE_ATTN_SCALAR, which CMakeLists.txt sets.
#include "cuda/kernels.h"
#include "cuda/launch.cuh"
#include "cuda/listed.cuh"
#include "cuda/simt_backward.cuh"
#include "cuda/simt_forward.cuh"
#include "cuda/states.cuh"

#define SPARSE_ATTN_NAME2(path, scalar) path##_##scalar
#define SPARSE_ATTN_NAME(path, scalar) SPARSE_ATTN_NAME2(path, scalar)

namespace sparse_attn::cuda {

const Kernels& SPARSE_ATTN_NAME(simt, SPARSE_ATTN_SCALAR)() {
  using S = SPARSE_ATTN_SCALAR;
  constexpr Sweeps kSweeps{launch<SimtForward<S>>, launch<SimtGradQuery<S>>,
                           launch<SimtGradKeyValue<S>>, nullptr, nullptr};
  static const Kernels kernels{
      "simt",
      largest_shared<SimtForward<S>, SimtGradQuery<S>, SimtGradKeyValue<S>>,
      {1, 1},
      {1, 1},
      kSweeps,
      kSweeps,
      launch<MergeStates<S>>,
      launch<FinishStates<S>>,
      launch<Delta<S>>,
      launch<ReduceGradients<S, Side::kRows>>,
      launch<ReduceGradients<S, Side::kKeys>>,
      launch<ListedForward<S>>,
      launch<ListedGradQuery<S>>,
      launch<ListedGradKeyValue<S>>};
  return kernels;
}

}  // namespace sparse_attn::cuda
