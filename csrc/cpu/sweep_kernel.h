// A class that lays out its workspace and runs, as a kernel.
#pragma once

#include "cpu/kernels.h"

namespace {

template <class Sweep>
int64_t workspace(const sparse_attn::AttentionParams& params, int threads) {
  return Sweep(params).layout(nullptr, threads);
}

template <class Sweep>
void run(const sparse_attn::AttentionParams& params, const sparse_attn::Parallel& parallel) {
  Sweep(params).run(parallel);
}

template <class Sweep>
constexpr sparse_attn::cpu::Kernel kKernel{workspace<Sweep>, run<Sweep>};

}  // namespace
