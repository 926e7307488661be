// What each build of kernels.cpp offers, and the choice among them.
#pragma once

#include <cstdint>

#include "linear_params.h"
#include "pair_params.h"
#include "params.h"
#include "selection_params.h"

namespace sparse_attn::cpu {

/// A computation: how many bytes it wants in params.workspace, and what runs it.
struct Kernel {
  std::int64_t (*workspace)(const AttentionParams&, int threads);
  void (*run)(const AttentionParams&, const Parallel&);
};

/// Of linear attention. Features are float32 or float64.
struct LinearKernels {
  std::int64_t (*products_workspace)(const ProductParams&, int threads);
  void (*products)(const ProductParams&, const Parallel&);
  std::int64_t (*sums_workspace)(const ProductParams&, int threads);
  void (*sums)(const ProductParams&, const Parallel&);
  void (*features)(const FeatureParams&, const Parallel&);
  void (*features_backward)(const FeatureParams&, const Parallel&);
  std::int64_t (*feature_products_workspace)(const FeatureProductParams&, int threads);
  void (*feature_products)(const FeatureProductParams&, const Parallel&);
};

struct SelectionKernel {
  std::int64_t (*workspace)(const SelectionParams&, int threads);
  void (*run)(const SelectionParams&, const Parallel&);
};

/// Those of selection.cpp.
struct SelectionKernels {
  SelectionKernel top;    // width is k
  SelectionKernel above;  // counts, or lists
  SelectionKernel lse;
};

struct Kernels {
  Kernel forward;
  Kernel backward;
  Kernel tangent;                // of output and log-sum-exp
  Kernel backward_along;         // the tangent of backward
  Kernel table_gradients;        // of bias and gate
  Kernel table_gradients_along;  // the tangent of these

  std::int64_t (*pair_workspace)(const PairParams&, int threads);
  void (*pair_products)(const PairParams&, const Parallel&);
  void (*pair_sums)(const PairParams&, const Parallel&);
  void (*pair_column_sums)(const PairParams&, const Parallel&);

  const LinearKernels* linear;
  const SelectionKernels* selection;
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
