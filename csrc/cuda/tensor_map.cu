#include "cuda/tensor_map.h"

#include <cuda.h>
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "cuda/launch.cuh"

namespace sparse_attn::cuda {
namespace {

using Encode = decltype(&cuTensorMapEncodeTiled);

/// From the driver that is there, which need not be linked.
Encode encode() {
  static const Encode function = [] {
    [[maybe_unused]] constexpr unsigned kFirstVersion = 12000;
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result = cudaDriverEntryPointSymbolNotFound;
    const char* name = "cuTensorMapEncodeTiled";
#if CUDART_VERSION >= 12050
    const cudaError_t error =
        cudaGetDriverEntryPointByVersion(name, &found, kFirstVersion, cudaEnableDefault, &result);
#else
    const cudaError_t error = cudaGetDriverEntryPoint(name, &found, cudaEnableDefault, &result);
#endif
    check(error, "looking for cuTensorMapEncodeTiled");
    if (result != cudaDriverEntryPointSuccess)
      throw std::runtime_error("sparse_attn: expected a driver with cuTensorMapEncodeTiled");
    return reinterpret_cast<Encode>(found);
  }();
  return function;
}

}  // namespace

TensorMap make_tensor_map(const MappedTensor& tensor, std::int64_t step) {
  constexpr cuuint32_t kRank = 5;
  static_assert(sizeof(TensorMap) == sizeof(CUtensorMap) && alignof(TensorMap) == 64);
  const cuuint64_t sizes[kRank] = {
      static_cast<cuuint64_t>(tensor.columns), static_cast<cuuint64_t>(step),
      static_cast<cuuint64_t>(tensor.tokens / step), static_cast<cuuint64_t>(tensor.heads),
      static_cast<cuuint64_t>(tensor.batch)};
  const auto bytes = [](std::int64_t stride) { return static_cast<cuuint64_t>(2 * stride); };
  const cuuint64_t strides[kRank - 1] = {
      bytes(tensor.view.row_stride), bytes(step * tensor.view.row_stride),
      bytes(tensor.view.head_stride), bytes(tensor.view.batch_stride)};
  const cuuint32_t box[kRank] = {kBoxColumns, 1, kBoxTokens, 1, 1};
  const cuuint32_t every[kRank] = {1, 1, 1, 1, 1};
  TensorMap map;
  const CUresult status =
      encode()(reinterpret_cast<CUtensorMap*>(&map),
               tensor.type == DataType::kBFloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                                                  : CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
               kRank, tensor.view.data, sizes, strides, box, every, CU_TENSOR_MAP_INTERLEAVE_NONE,
               CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
               CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (status != CUDA_SUCCESS) {
    throw std::runtime_error("sparse_attn: making a tensor map failed with error " +
                             std::to_string(static_cast<int>(status)) + " of the CUDA driver");
  }
  return map;
}

}  // namespace sparse_attn::cuda
