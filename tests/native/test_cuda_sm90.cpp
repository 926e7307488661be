// The kernels for sm_90a on the emulator, against the naive reference.
#include <cmath>
#include <cstdlib>

#include "cuda/softmax_fragments.cuh"
#include "cuda_case.h"

namespace {

using namespace attention;

constexpr cuda::Device kHopper{90, 227 * 1024};
constexpr DataType kTypes[] = {DataType::kBFloat16, DataType::kFloat16};

void check_case(Case& c) {
  const std::int64_t size = std::max(c.shape.head_dim, c.shape.value_dim);
  check_case(cuda::kernels_for({c.type, size, false, false, kHopper}), "sm90", c);
}

Case case_of(Random& random, DataType type, Sizes sizes, std::int64_t size,
             const Expression& pattern) {
  Shape shape;
  shape.sizes = sizes;
  shape.head_dim = shape.value_dim = size;
  return Case(random, type, shape, {pattern});
}

void test_polynomial() {
  Random random(3);
  for (int i = 0; i < 100000; ++i) {
    const auto x = static_cast<float>(74.0 * random.real() - 66.0);  // of [-140, 8]
    const double exact = x < -126.5f ? 0.0 : std::exp2(static_cast<double>(x));
    const double got = static_cast<double>(cuda::exp2_by_polynomial(x));
    CHECK(std::fabs(got - exact) <= 3e-6 * exact + 0x1p-126);
  }
  CHECK_EQUAL(cuda::exp2_by_polynomial(0.0f), 1.0f);
  CHECK_EQUAL(cuda::exp2_by_polynomial(-INFINITY), 0.0f);
  CHECK(std::isnan(cuda::exp2_by_polynomial(NAN)));
}

/// Each kind of tile: boxes of a tensor map, those of residue classes, of which some reach beyond
/// it, gathered ones; full, masked and skipped by one of a pair; tasks that share slots.
void test_patterns() {
  Random random(1);
  const Expression patterns[] = {
      window(70, 70),
      causal(),
      window(20, 0, 3),
      any_of({window(33, 40), window(4, 4, 7)}),
      any_of({window(30, 30), global_keys({0, 2, 77, 78}), global_queries({0, 5})}),
  };
  for (const Expression& pattern : patterns) {
    for (const DataType type : kTypes) {
      for (const std::int64_t size : {64, 128}) {
        Case c = case_of(random, type, {200, 200}, size, pattern);
        check_case(c);
      }
    }
  }
}

void test_random_cases(int cases) {
  Random random(2);
  for (int i = 0; i < cases; ++i) {
    Shape shape;
    shape.batch = random.between(1, 2);
    shape.heads_kv = random.between(1, 2);
    shape.group = random.between(1, 2);
    shape.sizes = random_sizes(random, i % 3 == 0 ? 300 : 150);
    shape.head_dim = 8 * random.between(1, i % 4 == 0 ? 16 : 8);
    shape.value_dim = random.chance(50) ? shape.head_dim : 8 * random.between(1, 8);
    shape.layout = random.pick<Layout>({Layout::kHeadsFirst, Layout::kTokensFirst});
    std::vector<Expression> patterns;
    const bool per_head = shape.group == 1 && random.chance(25);
    for (std::int64_t h = 0; h < (per_head ? shape.heads() : 1); ++h)
      patterns.push_back(random_expression(random, shape.sizes.n_k, 2));
    Case c(random, kTypes[i % 2], shape, patterns);
    c.listing = random.pick<Listing>({Listing::kUnique, Listing::kAll});
    c.left_to_programs = random.chance(40);
    check_case(c);
  }
}

}  // namespace

int main() {
  setenv("SPARSE_ATTN_SM90", "1", 1);
  test_polynomial();
  test_patterns();
  test_random_cases(20);
  return check::report();
}
