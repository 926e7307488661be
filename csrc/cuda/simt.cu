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
namespace {

template <class S, bool kModified>
constexpr Sweeps sweeps() {
  return {launch<SimtForward<S, kModified>>, launch<SimtGradQuery<S, kModified>>,
          launch<SimtGradKeyValue<S, kModified>>, nullptr, nullptr};
}

template <class S, bool kModified>
constexpr ListSweeps list_sweeps() {
  return {launch<ListedForward<S, kModified>>, launch<ListedGradQuery<S, kModified>>,
          launch<ListedGradKeyValue<S, kModified>>};
}

}  // namespace

const Kernels& SPARSE_ATTN_NAME(simt, SPARSE_ATTN_SCALAR)() {
  using S = SPARSE_ATTN_SCALAR;
  constexpr Sweeps kPlain = sweeps<S, false>();
  static const Kernels kernels{
      "simt",
      largest_shared<SimtForward<S, true>, SimtGradQuery<S, true>, SimtGradKeyValue<S, true>>,
      {1, 1},
      {1, 1},
      kPlain,
      kPlain,
      sweeps<S, true>(),
      launch<MergeStates<S>>,
      launch<FinishStates<S>>,
      launch<Delta<S>>,
      launch<ReduceGradients<S, Side::kRows>>,
      launch<ReduceGradients<S, Side::kKeys>>,
      list_sweeps<S, false>(),
      list_sweeps<S, true>()};
  return kernels;
}

}  // namespace sparse_attn::cuda
