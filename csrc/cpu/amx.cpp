// The kernels of bfloat16 that x86_64_amx has of its own; all others are those of x86_64_v4.
#include "amx_backward.h"
#include "amx_forward.h"
#include "cpu/kernels.h"
#include "forward.h"
#include "sweep_kernel.h"

namespace sparse_attn::cpu {

extern const Kernel amx_forward, amx_backward;
const Kernel amx_forward = kKernel<Forward<BFloat16, AmxForwardTile>>;
const Kernel amx_backward = kKernel<Backward<BFloat16, AmxPairGradients>>;

}  // namespace sparse_attn::cpu
