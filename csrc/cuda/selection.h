// The kernels that choose keys by their logits, as functions that queue them. No CUDA in here.
#pragma once

#include <cstdint>

#include "selection_params.h"

namespace sparse_attn::cuda {

/// A call with room for candidates of the top kernel; `workspace` holds `room` logits as integers
/// for each row, then as many keys.
struct SelectionArguments {
  SelectionParams call;
  std::int64_t room = 0;
};

using SelectionLaunch = void (*)(std::int64_t blocks, void* stream, const SelectionArguments&);

/// Those of one storage type; a launch wants a block for each tile of queries of each head.
struct SelectionKernels {
  SelectionLaunch top;    // width is k
  SelectionLaunch above;  // counts, or lists
  SelectionLaunch lse;
};

const SelectionKernels& selection_kernels_for(DataType type);

/// Candidates of a row before all but the k best are dropped: room for one more tile at least.
constexpr std::int64_t candidate_room(std::int64_t k) { return k + (k < kMaxTile ? kMaxTile : k); }

}  // namespace sparse_attn::cuda
