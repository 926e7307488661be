// The kernels of linear attention for one instruction set and storage type, as kernels.cpp.
#include "causal_products.h"
#include "cpu/kernels.h"
#include "feature_products.h"
#include "features.h"
#include "instance.h"
#include "outer_sums.h"

namespace {

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

int64_t feature_products_workspace(const FeatureProductParams& params, int threads) {
  return FeatureProducts<Real<Scalar>>(params).layout(nullptr, threads);
}

void feature_products(const FeatureProductParams& params, const Parallel& parallel) {
  FeatureProducts<Real<Scalar>>(params).run(parallel);
}

}  // namespace

namespace sparse_attn::cpu {

extern const LinearKernels SPARSE_ATTN_INSTANCE(linear);
const LinearKernels SPARSE_ATTN_INSTANCE(linear){
    products_workspace,         products,        sums_workspace, sums, features, features_backward,
    feature_products_workspace, feature_products};

}  // namespace sparse_attn::cpu
