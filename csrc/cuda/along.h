// The kernels of derivatives beyond the first backward pass, for any device and head size. No CUDA
// in here.
#pragma once

#include "cuda/kernels.h"
#include "cuda/tables.h"

namespace sparse_attn::cuda {

struct AlongKernels {
  const Kernels* portable;  // whose plans and reductions serve these, too

  Launch tangent;
  Launch merge_tangents;
  Launch finish_tangents;
  Launch listed_tangent;

  Launch grad_query;
  Launch grad_key_value;
  Launch listed_grad_query;
  Launch listed_grad_key_value;

  TableLaunch table_entries;
  TableLaunch listed_table_entries;
  TableLaunch table_sums;
  TableLaunch listed_table_sums;
  TableLaunch add_strips;
};

/// Threads of a block of add_strips, with an entry each.
constexpr int kStripThreads = 256;

/// Heads have at most kLargestHead columns.
const AlongKernels& along_kernels_for(DataType type);

}  // namespace sparse_attn::cuda
