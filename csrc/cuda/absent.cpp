// In the place of the kernels where there is no CUDA compiler: the bridge links, and says so.
#include <stdexcept>

#include "cuda/along.h"
#include "cuda/evaluate.h"
#include "cuda/kernels.h"
#include "cuda/linear.h"
#include "cuda/selection.h"

namespace sparse_attn::cuda {
namespace {

[[noreturn]] void fail() { throw std::runtime_error("sparse_attn was built without CUDA kernels"); }

}  // namespace

const char* built_for() { return ""; }
Device use_device(int) { fail(); }
bool is_capturing(void*) { fail(); }
const Kernels& kernels_for(const KernelChoice&) { fail(); }
const AlongKernels& along_kernels_for(DataType) { fail(); }
const LinearKernels& linear_kernels_for(DataType) { fail(); }
const SelectionKernels& selection_kernels_for(DataType) { fail(); }
void make_global_pass(const GlobalPass&, void*) { fail(); }
void filter_lists(const ListFilter&, void*) { fail(); }

}  // namespace sparse_attn::cuda
