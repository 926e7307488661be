// In the place of csrc/cuda/device.cu: the emulator stands for a device of sm_80.
#include "cuda/kernels.h"

namespace sparse_attn::cuda {

const char* built_for() { return "emulator"; }

Device use_device(int) { return {80, 163 * 1024}; }

bool is_capturing(void*) { return false; }

}  // namespace sparse_attn::cuda
