// The kernels of one instruction set and storage type: CMake compiles this file once for each pair.
#include "cpu/kernels.h"

#include "backward.h"
#include "backward_along.h"
#include "forward.h"
#include "pairs.h"
#include "table_gradients.h"
#include "tangent.h"

#define SPARSE_ATTN_JOIN_(a, b, c) a##_##b##_##c
#define SPARSE_ATTN_JOIN(a, b, c) SPARSE_ATTN_JOIN_(a, b, c)

namespace {

using float32 = float;
using float64 = double;
using bfloat16 = BFloat16;
using float16 = Float16;
using Scalar = SPARSE_ATTN_SCALAR;

template <class Sweep>
int64_t workspace(const AttentionParams& params, int threads) {
  return Sweep(params).layout(nullptr, threads);
}

template <class Sweep>
void run(const AttentionParams& params, const Parallel& parallel) {
  Sweep(params).run(parallel);
}

template <class Sweep>
constexpr sparse_attn::cpu::Kernel kKernel{workspace<Sweep>, run<Sweep>};

void pair_products(const PairParams& params, const Parallel& parallel) {
  Pairs<Scalar>(params).products(parallel);
}

void pair_sums(const PairParams& params, const Parallel& parallel) {
  Pairs<Scalar>(params).sums(parallel);
}

void pair_column_sums(const PairParams& params, const Parallel& parallel) {
  Pairs<Scalar>(params).column_sums(parallel);
}

}  // namespace

namespace sparse_attn::cpu {

extern const LinearKernels SPARSE_ATTN_JOIN(linear, SPARSE_ATTN_ISA_NAME, SPARSE_ATTN_SCALAR);
extern const SelectionKernels SPARSE_ATTN_JOIN(selection, SPARSE_ATTN_ISA_NAME, SPARSE_ATTN_SCALAR);
extern const Kernels SPARSE_ATTN_JOIN(kernels, SPARSE_ATTN_ISA_NAME, SPARSE_ATTN_SCALAR);
const Kernels SPARSE_ATTN_JOIN(kernels, SPARSE_ATTN_ISA_NAME, SPARSE_ATTN_SCALAR){
    kKernel<Forward<Scalar>>,
    kKernel<Backward<Scalar>>,
    kKernel<Tangent<Scalar>>,
    kKernel<BackwardAlong<Scalar>>,
    kKernel<TableGradients<Scalar, false>>,
    kKernel<TableGradients<Scalar, true>>,
    Pairs<Scalar>::workspace,
    pair_products,
    pair_sums,
    pair_column_sums,
    &SPARSE_ATTN_JOIN(linear, SPARSE_ATTN_ISA_NAME, SPARSE_ATTN_SCALAR),
    &SPARSE_ATTN_JOIN(selection, SPARSE_ATTN_ISA_NAME, SPARSE_ATTN_SCALAR)};

}  // namespace sparse_attn::cpu
