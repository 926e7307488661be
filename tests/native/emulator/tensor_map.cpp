// In the place of csrc/cuda/tensor_map.cu: a map that the emulator reads, and what the driver
// refuses.
#include "cuda/tensor_map.h"

#include <cstring>
#include <stdexcept>
#include <string>

#include "host/map_contents.h"

namespace sparse_attn::cuda {

namespace {

void refuse(const std::string& what) {
  throw std::runtime_error("sparse_attn: making a tensor map: " + what);
}

/// cuTensorMapEncodeTiled, "bound to the following requirements".
void check(const emulator::MapContents& map) {
  constexpr std::int64_t kLongest = std::int64_t{1} << 32, kFarthest = std::int64_t{1} << 40;
  if (reinterpret_cast<std::uintptr_t>(map.data) % 16 != 0)
    refuse("the data is not aligned to 16 bytes");
  for (const std::int64_t dimension : map.dimensions) {
    if (dimension < 1 || dimension > kLongest)
      refuse("a dimension of " + std::to_string(dimension));
  }
  for (int d = 1; d < 5; ++d) {
    const std::int64_t stride = map.strides[d];
    if (stride % 16 != 0 || stride < 0 || stride >= kFarthest)
      refuse("a stride of " + std::to_string(stride) + " bytes");
  }
}

}  // namespace

TensorMap make_tensor_map(const MappedTensor& tensor, std::int64_t step) {
  if (tensor.type != DataType::kBFloat16 && tensor.type != DataType::kFloat16)
    refuse("elements that do not have 16 bits");
  const TensorView& view = tensor.view;
  const emulator::MapContents contents = {
      emulator::MapContents::kMark,
      static_cast<const char*>(view.data),
      {tensor.columns, step, tensor.tokens / step, tensor.heads, tensor.batch},
      {2, 2 * view.row_stride, 2 * step * view.row_stride, 2 * view.head_stride,
       2 * view.batch_stride}};
  check(contents);
  TensorMap map = {};
  std::memcpy(&map, &contents, sizeof(contents));
  return map;
}

}  // namespace sparse_attn::cuda
