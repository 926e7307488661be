// The kernels that choose keys, of one instruction set and storage type: compiled as kernels.cpp.
#include "selection.h"

#include "cpu/kernels.h"
#include "instance.h"

namespace {

template <class Visitor>
int64_t workspace(const SelectionParams& params, int threads) {
  return Selection<Scalar, Visitor>::workspace(params, threads);
}

template <class Visitor>
void run(const SelectionParams& params, const Parallel& parallel) {
  Selection<Scalar, Visitor>(params).run(parallel);
}

template <class Visitor>
constexpr sparse_attn::cpu::SelectionKernel kKernel{workspace<Visitor>, run<Visitor>};

}  // namespace

namespace sparse_attn::cpu {

extern const SelectionKernels SPARSE_ATTN_INSTANCE(selection);
const SelectionKernels SPARSE_ATTN_INSTANCE(selection){kKernel<Chosen<Scalar, ChooseTop<Scalar>>>,
                                                       kKernel<Chosen<Scalar, ChooseAbove<Scalar>>>,
                                                       kKernel<LogitSums<Scalar>>};

}  // namespace sparse_attn::cpu
