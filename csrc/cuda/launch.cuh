// Starting kernels, and what the host asks of the device. tests/native/emulator has another
// cuda/launch.cuh in this one's place.
#pragma once

#include <cstdint>
#include <limits>
#include <stdexcept>
#include <string>

namespace sparse_attn::cuda {

inline void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  throw std::runtime_error(std::string("sparse_attn: ") + what + ": " + cudaGetErrorString(error));
}

/// A kernel is a class with kThreads (of a block), kBlocksPerSM (to have registers for),
/// kSharedBytes and a static device function run(arguments), which every thread of the grid calls.
template <class Kernel, class Arguments>
__global__ void __launch_bounds__(Kernel::kThreads, Kernel::kBlocksPerSM)
    entry(const __grid_constant__ Arguments arguments) {
  Kernel::run(arguments);
}

/// Blocks, or tasks that blocks take in turn.
inline void check_blocks(std::int64_t blocks) {
  if (blocks <= std::numeric_limits<std::int32_t>::max()) return;
  throw std::runtime_error("sparse_attn: expected at most 2^31 - 1 blocks of threads, got " +
                           std::to_string(blocks) + ": too many heads and tokens for one call");
}

/// Queues `blocks` blocks of the kernel on the stream.
template <class Kernel, class Arguments>
void launch(std::int64_t blocks, void* stream, const Arguments& arguments) {
  if (blocks == 0) return;
  check_blocks(blocks);
  constexpr int kMostWithoutAsking = 48 * 1024;
  if (Kernel::kSharedBytes > kMostWithoutAsking) {
    check(cudaFuncSetAttribute(entry<Kernel, Arguments>,
                               cudaFuncAttributeMaxDynamicSharedMemorySize, Kernel::kSharedBytes),
          "setting the shared memory of a kernel");
  }
  entry<Kernel, Arguments><<<static_cast<unsigned>(blocks), Kernel::kThreads, Kernel::kSharedBytes,
                             static_cast<cudaStream_t>(stream)>>>(arguments);
  check(cudaGetLastError(), "launching a kernel");
}

}  // namespace sparse_attn::cuda
