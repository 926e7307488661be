// The CUDA kernels of causal linear attention, on the emulator, against the definition.
#include <cstdint>
#include <random>
#include <string>
#include <vector>

#include "check.h"
#include "cuda/linear.h"
#include "scalar_types.h"

namespace {

using namespace sparse_attn;

struct BFloat16 {
  std::uint16_t bits;
};
struct Float16 {
  std::uint16_t bits;
};

double to_double(float x) { return x; }
double to_double(double x) { return x; }
double to_double(BFloat16 x) { return half_to_double(x.bits, kBFloat16Format); }
double to_double(Float16 x) { return half_to_double(x.bits, kFloat16Format); }

template <class S>
S from_double(double x) {
  return static_cast<S>(x);
}
template <>
BFloat16 from_double<BFloat16>(double x) {
  return {double_to_half(x, kBFloat16Format)};
}
template <>
Float16 from_double<Float16>(double x) {
  return {double_to_half(x, kFloat16Format)};
}

struct Sizes {
  std::int64_t n_q, n_k, size, value_dim;
};

template <class S>
struct Tensor {
  Tensor(std::int64_t n_heads, std::int64_t n_rows, std::int64_t n_columns)
      : heads(n_heads), rows(n_rows), size(n_columns), data(n_heads * n_rows * n_columns) {}

  S& at(std::int64_t head, std::int64_t row, std::int64_t column) {
    return data[(head * rows + row) * size + column];
  }
  TensorView view() { return {data.data(), heads * rows * size, rows * size, size}; }

  std::int64_t heads, rows, size;
  std::vector<S> data;
};

/// Small integers: every sum is exact in every type that the kernels sum in.
template <class S>
Tensor<S> random_integers(std::mt19937& random, std::int64_t heads, std::int64_t rows,
                          std::int64_t size) {
  Tensor<S> tensor(heads, rows, size);
  std::uniform_int_distribution<int> draw(-1, 1);
  for (S& x : tensor.data) x = from_double<S>(draw(random));
  return tensor;
}

template <class S>
void run_case(DataType type, const Sizes& sizes, bool reverse) {
  constexpr std::int64_t kHeads = 2;
  std::mt19937 random(static_cast<unsigned>(sizes.n_q * 1000 + sizes.n_k));
  auto query = random_integers<S>(random, kHeads, sizes.n_q, sizes.size);
  auto key = random_integers<S>(random, kHeads, sizes.n_k, sizes.size);
  auto value = random_integers<S>(random, kHeads, sizes.n_k, sizes.value_dim);
  Tensor<S> output(kHeads, sizes.n_q, sizes.value_dim);
  ProductParams params;
  params.dtype = type;
  params.reverse = reverse;
  params.batch = 1;
  params.heads = kHeads;
  params.n_q = sizes.n_q;
  params.n_k = sizes.n_k;
  params.size = sizes.size;
  params.value_dim = sizes.value_dim;
  params.query = query.view();
  params.key = key.view();
  params.value = value.view();
  params.output = output.view();
  const cuda::LinearKernels& kernels = cuda::linear_kernels_for(type);
  cuda::LinearCall call = cuda::linear_call(params, kernels);
  std::vector<char> workspace(call.heads() * call.segments * sizes.size * sizes.value_dim *
                              kernels.real_bytes);
  call.params.workspace = workspace.data();
  kernels.sums(call, nullptr);
  kernels.prefix(call, nullptr);
  kernels.products(call, nullptr);
  for (std::int64_t h = 0; h < kHeads; ++h) {
    for (std::int64_t i = 0; i < sizes.n_q; ++i) {
      std::vector<double> expected(sizes.value_dim, 0.0);
      const std::int64_t position = i + sizes.n_k - sizes.n_q;
      for (std::int64_t j = 0; j < sizes.n_k; ++j) {
        if (reverse ? j < position : j > position) continue;
        double score = 0;
        for (std::int64_t c = 0; c < sizes.size; ++c)
          score += to_double(query.at(h, i, c)) * to_double(key.at(h, j, c));
        for (std::int64_t c = 0; c < sizes.value_dim; ++c)
          expected[c] += score * to_double(value.at(h, j, c));
      }
      for (std::int64_t c = 0; c < sizes.value_dim; ++c)
        CHECK_EQUAL(to_double(output.at(h, i, c)), to_double(from_double<S>(expected[c])));
    }
  }
}

template <class S>
void run_type(DataType type) {
  for (const Sizes& sizes :
       {Sizes{70, 70, 5, 3}, {1, 300, 33, 65}, {300, 20, 7, 9}, {330, 600, 66, 4}}) {
    for (const bool reverse : {false, true}) {
      check::context = std::to_string(sizes.n_q) + " x " + std::to_string(sizes.n_k) +
                       (reverse ? ", reverse" : "") + ", type " +
                       std::to_string(static_cast<int>(type));
      run_case<S>(type, sizes, reverse);
    }
  }
}

}  // namespace

int main() {
  run_type<float>(DataType::kFloat32);
  run_type<double>(DataType::kFloat64);
  run_type<BFloat16>(DataType::kBFloat16);
  run_type<Float16>(DataType::kFloat16);
  return check::report();
}
