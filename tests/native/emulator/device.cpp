// In the place of csrc/cuda/device.cu: the emulator stands for a device of sm_90.
#include "cuda/kernels.h"

namespace sparse_attn::cuda {

const char* built_for() { return "emulator"; }

Device use_device(int) { return {90, 227 * 1024}; }

/// Few: blocks that take several tasks then have some to take.
int multiprocessors() { return 2; }

bool is_capturing(void*) { return false; }

}  // namespace sparse_attn::cuda
