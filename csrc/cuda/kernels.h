// The kernels as functions that queue them, and which of them serve a call. No CUDA in here.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cuda/args.h"
#include "plan/image.h"

namespace sparse_attn::cuda {

using Launch = void (*)(std::int64_t blocks, void* stream, const Arguments& arguments);

/// The sweeps over all visits of a pass.
struct Sweeps {
  Launch forward;
  Launch grad_query;
  Launch grad_key_value;  // null if the sums of both take too many registers: then the next two
  Launch grad_key;
  Launch grad_value;
};

/// Those that go through lists.
struct ListSweeps {
  Launch forward;
  Launch grad_query;
  Launch grad_key_value;
};

/// Those of one storage type and path. Blocks: a launch over tasks, reductions or rows wants
/// `blocks_for_rows(rows)` or (tasks or reductions) * heads of them.
struct Kernels {
  const char* path;     // its name for users
  int shared_bytes;     // the most that any of its kernels asks for
  Grouping in_forward;  // of the tasks
  Grouping in_backward;

  Sweeps planned;    // for visits with masks of the plan
  Sweeps evaluated;  // for those that are left to a program, too
  Sweeps modified;   // for either, in calls with modifiers; none where these are not served

  Launch merge_states;
  Launch finish_states;
  Launch delta;
  Launch reduce_rows;  // slots of dQ
  Launch reduce_keys;  // slots of dK and dV
  ListSweeps listed;
  ListSweeps listed_modified;  // in calls with modifiers
};

/// The most shared memory that any of some kernels asks for.
template <class... Kernel>
constexpr int largest_shared = std::max({Kernel::kSharedBytes...});

/// Warps take a row each in kernels that go row by row.
constexpr int kRowsPerBlock = 8;
inline std::int64_t blocks_for_rows(std::int64_t rows) {
  return (rows + kRowsPerBlock - 1) / kRowsPerBlock;
}

/// What a device has to offer; `arch` is 10 * major + minor.
struct Device {
  int arch = 0;
  int shared_bytes = 0;  // that a block may ask for
};
/// Of the current device.
int multiprocessors();
/// The architectures that this build has kernels for, as CMake names them, with spaces between;
/// empty without any.
const char* built_for();
/// Makes a device the current one. Throws std::runtime_error where there is none.
Device use_device(int index);
/// Whether the stream is being captured into a graph.
bool is_capturing(void* stream);

constexpr std::int64_t kLargestHead = 256;

/// What decides about the kernels of a call.
struct KernelChoice {
  DataType type = DataType::kFloat32;
  std::int64_t head_size = 0;  // at most kLargestHead
  bool tf32 = false;           // float32 may go through TF32
  bool modified = false;       // the call has modifiers
  Device device;
};

/// Tensor cores where the device and the sizes allow them: sm_80 and, for float32, `tf32`; else the
/// portable kernels. On a device of sm_90 with SPARSE_ATTN_SM90=1 in the environment calls
/// without modifiers take the kernels for sm_90a, which have not run on hardware yet.
const Kernels& kernels_for(const KernelChoice& choice);

}  // namespace sparse_attn::cuda
