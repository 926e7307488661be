// How TMA sees a tensor (batch, heads, tokens, columns), for tiles of tokens first, first + step,
// first + 2 step, ...: the residue classes modulo the step are a dimension of their own, so that a
// tile of one class is a box. No copy, whatever the dilation.
#pragma once

#include <cstdint>

#include "params.h"

namespace sparse_attn::cuda {

/// A CUtensorMap, opaque to all but the driver. Kernels take it as a parameter of the grid.
struct alignas(64) TensorMap {
  std::uint64_t words[16];
};

/// Columns of a box: 128 bytes, the longest row that is swizzled.
constexpr int kBoxColumns = 64;
constexpr int kBoxTokens = 64;

struct MappedTensor {
  TensorView view;  // of 16-bit elements; rows, heads and batches at multiples of 16 bytes
  DataType type = DataType::kBFloat16;
  std::int64_t batch = 1, heads = 1, tokens = 1, columns = 1;
};

/// Boxes of kBoxTokens tokens of one class and kBoxColumns columns. Coordinates are (column, class,
/// token within the class, head, batch). Of each class the first tokens / step are in the map:
/// another `tokens % step` tokens at the end are not. Throws std::runtime_error if the driver
/// refuses, as it does fewer tokens than the step.
TensorMap make_tensor_map(const MappedTensor& tensor, std::int64_t step);

}  // namespace sparse_attn::cuda
