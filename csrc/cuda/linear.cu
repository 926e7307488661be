// The kernels of linear attention for one storage type, SPARSE_ATTN_SCALAR.
#include "cuda/linear.cuh"

#include "cuda/launch.cuh"

#define SPARSE_ATTN_NAME2(path, scalar) path##_##scalar
#define SPARSE_ATTN_NAME(path, scalar) SPARSE_ATTN_NAME2(path, scalar)

namespace sparse_attn::cuda {
namespace {

template <class Kernel>
void queue(const LinearCall& call, void* stream) {
  launch<Kernel>(Kernel::blocks(call), stream, call);
}

}  // namespace

LinearKernels SPARSE_ATTN_NAME(linear, SPARSE_ATTN_SCALAR)() {
  using S = SPARSE_ATTN_SCALAR;
  return {sizeof(Real<S>), SimtProducts<S>::kBlockColumns, queue<LinearSums<S>>,
          queue<LinearPrefix<S>>, queue<LinearProducts<S>>};
}

}  // namespace sparse_attn::cuda
