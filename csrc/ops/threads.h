// torch's threads, as the kernels call them.
#pragma once

#include <ATen/Parallel.h>

#include "params.h"

namespace sparse_attn {

inline void run_threads(int threads, void (*body)(void*, int), void* context) {
  at::parallel_for(0, threads, 1, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t t = begin; t < end; ++t) body(context, static_cast<int>(t));
  });
}

inline Parallel torch_threads() { return {at::get_num_threads(), run_threads}; }

/// What a call computes and touches, to see whether it pays for waking threads.
struct Work {
  double flops = 0.0;
  double bytes = 0.0;
};

/// All threads, or the calling one alone if it is done about as soon: a parallel region wakes every
/// thread, which takes 2 to 5 microseconds while they still spin and up to 50 once they sleep. What
/// a call computes does not depend on its threads.
inline Parallel torch_threads(const Work& work) {
  constexpr double kFlops = 100e9, kBytes = 10e9;  // a second, of one core, about
  constexpr double kLeastSeconds = 20e-6;
  if (work.flops / kFlops + work.bytes / kBytes < kLeastSeconds) return {1, run_threads};
  return torch_threads();
}

}  // namespace sparse_attn
