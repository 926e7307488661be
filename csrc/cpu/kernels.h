// What each build of kernels.cpp offers, and the choice among them.
#pragma once

#include <cstdint>

#include "pair_params.h"
#include "params.h"

namespace sparse_attn::cpu {

struct Kernels {
  std::int64_t (*forward_workspace)(const AttentionParams&, int threads);
  void (*forward)(const AttentionParams&, const Parallel&);
  std::int64_t (*backward_workspace)(const AttentionParams&, int threads);
  void (*backward)(const AttentionParams&, const Parallel&);
  std::int64_t (*pair_workspace)(const PairParams&, int threads);
  void (*pair_products)(const PairParams&, const Parallel&);
  void (*pair_sums)(const PairParams&, const Parallel&);
  void (*pair_column_sums)(const PairParams&, const Parallel&);
};

/// The kernels of the best instruction set of this machine, or of the one named in SPARSE_ATTN_ISA.
/// Throws std::invalid_argument if that one is unknown here.
const Kernels& kernels(DataType dtype);

/// The kernels of one instruction set by name, or null if they are not compiled or this machine
/// lacks it.
const Kernels* kernels(const char* name, DataType dtype);

/// The instruction set in use, and the n-th one compiled (best first; null after the last).
const char* isa_name();
const char* compiled_isa(int n);

}  // namespace sparse_attn::cpu
