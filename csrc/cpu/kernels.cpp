// The kernels of one instruction set and storage type: CMake compiles this file once for each pair.
#include "cpu/kernels.h"

#include "backward.h"
#include "backward_along.h"
#include "forward.h"
#include "instance.h"
#include "pairs.h"
#include "sweep_kernel.h"
#include "table_gradients.h"
#include "tangent.h"

namespace {

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

extern const LinearKernels SPARSE_ATTN_INSTANCE(linear);
extern const SelectionKernels SPARSE_ATTN_INSTANCE(selection);
extern const Kernels SPARSE_ATTN_INSTANCE(kernels);
const Kernels SPARSE_ATTN_INSTANCE(kernels){kKernel<Forward<Scalar>>,
                                            kKernel<Backward<Scalar>>,
                                            kKernel<Tangent<Scalar>>,
                                            kKernel<BackwardAlong<Scalar>>,
                                            kKernel<TableGradients<Scalar, false>>,
                                            kKernel<TableGradients<Scalar, true>>,
                                            Pairs<Scalar>::workspace,
                                            pair_products,
                                            pair_sums,
                                            pair_column_sums,
                                            &SPARSE_ATTN_INSTANCE(linear),
                                            &SPARSE_ATTN_INSTANCE(selection)};

}  // namespace sparse_attn::cpu
