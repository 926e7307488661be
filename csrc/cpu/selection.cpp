// The kernels that choose keys, of one instruction set and storage type: compiled as kernels.cpp.
#include "selection.h"

#include "cpu/kernels.h"

#define SPARSE_ATTN_JOIN_(a, b, c) a##_##b##_##c
#define SPARSE_ATTN_JOIN(a, b, c) SPARSE_ATTN_JOIN_(a, b, c)

namespace {

using float32 = float;
using float64 = double;
using bfloat16 = BFloat16;
using float16 = Float16;
using Scalar = SPARSE_ATTN_SCALAR;

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

extern const SelectionKernels SPARSE_ATTN_JOIN(selection, SPARSE_ATTN_ISA_NAME, SPARSE_ATTN_SCALAR);
const SelectionKernels SPARSE_ATTN_JOIN(selection, SPARSE_ATTN_ISA_NAME, SPARSE_ATTN_SCALAR){
    kKernel<Chosen<Scalar, ChooseTop<Scalar>>>, kKernel<Chosen<Scalar, ChooseAbove<Scalar>>>,
    kKernel<LogitSums<Scalar>>};

}  // namespace sparse_attn::cpu
