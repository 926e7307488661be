// The kernels of linear attention for one instruction set and storage type, as kernels.cpp.
#include "causal_products.h"
#include "cpu/kernels.h"
#include "features.h"
#include "outer_sums.h"

#define SPARSE_ATTN_JOIN_(a, b, c) a##_##b##_##c
#define SPARSE_ATTN_JOIN(a, b, c) SPARSE_ATTN_JOIN_(a, b, c)

namespace {

using float32 = float;
using float64 = double;
using bfloat16 = BFloat16;
using float16 = Float16;
using Scalar = SPARSE_ATTN_SCALAR;

int64_t products_workspace(const ProductParams& params, int threads) {
  return CausalProducts<Scalar>(params).layout(nullptr, threads);
}

void products(const ProductParams& params, const Parallel& parallel) {
  CausalProducts<Scalar>(params).run(parallel);
}

int64_t sums_workspace(const ProductParams& params, int threads) {
  return OuterSums<Scalar>(params).layout(nullptr, threads);
}

void sums(const ProductParams& params, const Parallel& parallel) {
  OuterSums<Scalar>(params).run(parallel);
}

void features(const FeatureParams& params, const Parallel& parallel) {
  Features<Real<Scalar>>(params).run(parallel);
}

void features_backward(const FeatureParams& params, const Parallel& parallel) {
  Features<Real<Scalar>>(params).backward(parallel);
}

}  // namespace

namespace sparse_attn::cpu {

extern const LinearKernels SPARSE_ATTN_JOIN(linear, SPARSE_ATTN_ISA_NAME, SPARSE_ATTN_SCALAR);
const LinearKernels SPARSE_ATTN_JOIN(linear, SPARSE_ATTN_ISA_NAME, SPARSE_ATTN_SCALAR){
    products_workspace, products, sums_workspace, sums, features, features_backward};

}  // namespace sparse_attn::cpu
