// The kernels of one instruction set and storage type: CMake compiles this file once for each pair.
#include "cpu/kernels.h"

#include "backward.h"
#include "forward.h"
#include "pairs.h"

#define SPARSE_ATTN_JOIN_(a, b, c) a##_##b##_##c
#define SPARSE_ATTN_JOIN(a, b, c) SPARSE_ATTN_JOIN_(a, b, c)

namespace {

using float32 = float;
using float64 = double;
using bfloat16 = BFloat16;
using float16 = Float16;
using Scalar = SPARSE_ATTN_SCALAR;

int64_t forward_workspace(const AttentionParams& params, int threads) {
  return Forward<Scalar>(params).layout(nullptr, threads);
}

void forward(const AttentionParams& params, const Parallel& parallel) {
  Forward<Scalar>(params).run(parallel);
}

int64_t backward_workspace(const AttentionParams& params, int threads) {
  return Backward<Scalar>(params).layout(nullptr, threads);
}

void backward(const AttentionParams& params, const Parallel& parallel) {
  Backward<Scalar>(params).run(parallel);
}

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

extern const Kernels SPARSE_ATTN_JOIN(kernels, SPARSE_ATTN_ISA_NAME, SPARSE_ATTN_SCALAR);
const Kernels SPARSE_ATTN_JOIN(kernels, SPARSE_ATTN_ISA_NAME, SPARSE_ATTN_SCALAR){
    forward_workspace,        forward,       backward_workspace, backward,
    Pairs<Scalar>::workspace, pair_products, pair_sums,          pair_column_sums};

}  // namespace sparse_attn::cpu
