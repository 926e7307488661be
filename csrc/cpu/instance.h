// For the files that CMake compiles once for each instruction set and storage type: their type, and
// how names are told apart.
#pragma once

#include "scalar.h"

#define SPARSE_ATTN_JOIN_(a, b, c) a##_##b##_##c
#define SPARSE_ATTN_JOIN(a, b, c) SPARSE_ATTN_JOIN_(a, b, c)
/// SPARSE_ATTN_INSTANCE(kernels) is kernels_x86_64_v4_float32, say.
#define SPARSE_ATTN_INSTANCE(name) SPARSE_ATTN_JOIN(name, SPARSE_ATTN_ISA_NAME, SPARSE_ATTN_SCALAR)

namespace {

using float32 = float;
using float64 = double;
using bfloat16 = BFloat16;
using float16 = Float16;
using Scalar = SPARSE_ATTN_SCALAR;

}  // namespace
