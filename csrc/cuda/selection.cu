// The kernels that choose keys, for every storage type.
#include "cuda/selection.h"

#include "cuda/launch.cuh"
#include "cuda/selection.cuh"

namespace sparse_attn::cuda {
namespace {

template <class S>
const SelectionKernels& kernels() {
  static_assert(SelectKeys<S, ChooseTop<S>>::kSharedBytes <= 64 * 1024, "every device has as much");
  static const SelectionKernels all{launch<SelectKeys<S, ChooseTop<S>>>,
                                    launch<SelectKeys<S, ChooseAbove<S>>>,
                                    launch<SelectKeys<S, LogitSums<S>>>};
  return all;
}

}  // namespace

const SelectionKernels& selection_kernels_for(DataType type) {
  switch (type) {
    case DataType::kFloat64:
      return kernels<float64>();
    case DataType::kBFloat16:
      return kernels<bfloat16>();
    case DataType::kFloat16:
      return kernels<float16>();
    case DataType::kFloat32:
      break;
  }
  return kernels<float32>();
}

}  // namespace sparse_attn::cuda
