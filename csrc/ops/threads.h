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

}  // namespace sparse_attn
