// Which of the compiled kernels serve a call. CMakeLists.txt passes the instances for tensor cores
// as SPARSE_ATTN_MMA_INSTANCES and SPARSE_ATTN_SM90_INSTANCES, lists of X(scalar, head size), and
// the first architecture that the former were compiled for.
#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <map>
#include <string>
#include <utility>

#include "cuda/along.h"
#include "cuda/kernels.h"
#include "cuda/linear.h"

namespace sparse_attn::cuda {

const Kernels& simt_float32();
const Kernels& simt_float64();
const Kernels& simt_bfloat16();
const Kernels& simt_float16();

AlongKernels simt_along_float32(const Kernels& portable);
AlongKernels simt_along_float64(const Kernels& portable);
AlongKernels simt_along_bfloat16(const Kernels& portable);
AlongKernels simt_along_float16(const Kernels& portable);

LinearKernels linear_float32();
LinearKernels linear_float64();
LinearKernels linear_bfloat16();
LinearKernels linear_float16();

#define X(scalar, size) Kernels mma_##scalar##_##size(const Kernels& portable);
SPARSE_ATTN_MMA_INSTANCES
#undef X
#define X(scalar, size) Kernels sm90_##scalar##_##size(const Kernels& portable);
SPARSE_ATTN_SM90_INSTANCES
#undef X

namespace {

[[maybe_unused]] DataType type_named(const std::string& name) {
  return name == "float32"    ? DataType::kFloat32
         : name == "float64"  ? DataType::kFloat64
         : name == "bfloat16" ? DataType::kBFloat16
                              : DataType::kFloat16;
}

const Kernels& portable(DataType type) {
  switch (type) {
    case DataType::kFloat64:
      return simt_float64();
    case DataType::kBFloat16:
      return simt_bfloat16();
    case DataType::kFloat16:
      return simt_float16();
    case DataType::kFloat32:
      break;
  }
  return simt_float32();
}

using Instances = std::map<std::pair<DataType, std::int64_t>, Kernels>;

/// By type and head size.
const Instances& tensor_core_kernels() {
  static const Instances instances = [] {
    Instances all;
#define X(scalar, size)                                           \
  all.emplace(std::pair(type_named(#scalar), std::int64_t{size}), \
              mma_##scalar##_##size(portable(type_named(#scalar))));
    SPARSE_ATTN_MMA_INSTANCES
#undef X
    return all;
  }();
  return instances;
}

/// Likewise, for sm_90a.
const Instances& sm90_kernels() {
  static const Instances instances = [] {
    Instances all;
#define X(scalar, size)                                           \
  all.emplace(std::pair(type_named(#scalar), std::int64_t{size}), \
              sm90_##scalar##_##size(portable(type_named(#scalar))));
    SPARSE_ATTN_SM90_INSTANCES
#undef X
    return all;
  }();
  return instances;
}

/// Those of the next larger head size; null if there are none, or the device has too little memory.
const Kernels* find(const Instances& instances, const KernelChoice& choice) {
  const auto found = instances.lower_bound({choice.type, choice.head_size});
  const bool serves = found != instances.end() && found->first.first == choice.type &&
                      found->second.shared_bytes <= choice.device.shared_bytes;
  return serves ? &found->second : nullptr;
}

bool wants_sm90() {
  const char* setting = std::getenv("SPARSE_ATTN_SM90");
  return setting != nullptr && std::strcmp(setting, "1") == 0;
}

}  // namespace

const Kernels& kernels_for(const KernelChoice& choice) {
  const Kernels& simt = portable(choice.type);
  if (choice.device.arch < SPARSE_ATTN_FIRST_TENSOR_CORES) return simt;
  if (choice.type == DataType::kFloat32 && !choice.tf32) return simt;
  constexpr int kHopper = 90;  // code for sm_90a runs on no other architecture
  if (choice.device.arch == kHopper && !choice.modified && wants_sm90()) {
    if (const Kernels* kernels = find(sm90_kernels(), choice)) return *kernels;
  }
  const Kernels* kernels = find(tensor_core_kernels(), choice);
  return kernels ? *kernels : simt;
}

const AlongKernels& along_kernels_for(DataType type) {
  static const AlongKernels float32 = simt_along_float32(simt_float32()),
                            float64 = simt_along_float64(simt_float64()),
                            bfloat16 = simt_along_bfloat16(simt_bfloat16()),
                            float16 = simt_along_float16(simt_float16());
  switch (type) {
    case DataType::kFloat64:
      return float64;
    case DataType::kBFloat16:
      return bfloat16;
    case DataType::kFloat16:
      return float16;
    case DataType::kFloat32:
      break;
  }
  return float32;
}

const LinearKernels& linear_kernels_for(DataType type) {
  static const LinearKernels float32 = linear_float32(), float64 = linear_float64(),
                             bfloat16 = linear_bfloat16(), float16 = linear_float16();
  switch (type) {
    case DataType::kFloat64:
      return float64;
    case DataType::kBFloat16:
      return bfloat16;
    case DataType::kFloat16:
      return float16;
    case DataType::kFloat32:
      break;
  }
  return float32;
}

}  // namespace sparse_attn::cuda
