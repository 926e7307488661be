// The portable kernels along a tangent and of tables, for one storage type, SPARSE_ATTN_SCALAR.
#include "cuda/along.h"
#include "cuda/launch.cuh"
#include "cuda/listed_along.cuh"
#include "cuda/simt_along.cuh"
#include "cuda/simt_tables.cuh"
#include "cuda/simt_tangent.cuh"

#define SPARSE_ATTN_NAME2(path, scalar) path##_##scalar
#define SPARSE_ATTN_NAME(path, scalar) SPARSE_ATTN_NAME2(path, scalar)

namespace sparse_attn::cuda {

AlongKernels SPARSE_ATTN_NAME(simt_along, SPARSE_ATTN_SCALAR)(const Kernels& portable) {
  using S = SPARSE_ATTN_SCALAR;
  static_assert(
      largest_shared<SimtTangent<S>, SimtBackwardAlong<S, Side::kRows>, SimtTableSums<S>> <=
          64 * 1024,
      "every device has as much");
  return {&portable,
          launch<SimtTangent<S>>,
          launch<MergeTangents<S>>,
          launch<FinishTangents<S>>,
          launch<ListedTangent<S>>,
          launch<SimtBackwardAlong<S, Side::kRows>>,
          launch<SimtBackwardAlong<S, Side::kKeys>>,
          launch<ListedGradQueryAlong<S>>,
          launch<ListedGradKeyValueAlong<S>>,
          launch<SimtTableEntries<S>>,
          launch<ListedTableEntries<S>>,
          launch<SimtTableSums<S>>,
          launch<ListedTableSums<S>>,
          launch<AddStrips<S>>};
}

}  // namespace sparse_attn::cuda
