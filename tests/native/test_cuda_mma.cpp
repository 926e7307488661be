// The tensor-core kernels on the emulator, against the naive reference.
#include "cuda_case.h"
#include "random_modifiers.h"

namespace {

using namespace attention;

constexpr cuda::Device kAmpere{80, 163 * 1024};

void check_case(Case& c) {
  const std::int64_t size = std::max(c.shape.head_dim, c.shape.value_dim);
  check_case(cuda::kernels_for({c.type, size, true, true, kAmpere}), "mma", c);
}

constexpr DataType kTypes[] = {DataType::kBFloat16, DataType::kFloat16, DataType::kFloat32};

void test_random_cases(int cases) {
  Random random(1);
  for (int i = 0; i < cases; ++i) {
    Shape shape;
    shape.batch = random.between(1, 2);
    shape.heads_kv = random.between(1, 2);
    shape.group = random.between(1, 2);
    shape.sizes = random_sizes(random, i % 3 == 0 ? 200 : 80);
    shape.head_dim = 8 * random.between(1, 8);
    shape.value_dim = random.chance(50) ? shape.head_dim : 8 * random.between(1, 8);
    shape.layout = random.pick<Layout>({Layout::kHeadsFirst, Layout::kTokensFirst});
    std::vector<Expression> patterns;
    const bool per_head = shape.group == 1 && random.chance(25);
    for (std::int64_t h = 0; h < (per_head ? shape.heads() : 1); ++h)
      patterns.push_back(random_expression(random, shape.sizes.n_k, 2));
    Case c(random, kTypes[i % 3], shape, patterns);
    c.listing = random.pick<Listing>({Listing::kUnique, Listing::kAll});
    c.left_to_programs = random.chance(30);
    check_case(c);
  }
}

/// Every instance, with a window that pairs tiles and a global token in slots.
void test_head_sizes() {
  Random random(2);
  for (const DataType type : kTypes) {
    for (const std::int64_t size : {32, 64, 96, 128, 192, 256}) {
      if (type == DataType::kFloat32 && size > 128) continue;
      Shape shape;
      shape.sizes = {150, 150};
      shape.head_dim = size;
      shape.value_dim = size - 8;
      Case c(random, type, shape, {any_of({window(70, 70), global_keys({0, 1})})});
      check_case(c);
    }
  }
}

/// Tables, soft cap and dropout: in pairs of tiles that are full, masked or gathered, in lists,
/// with shared heads and padding.
void test_modifiers() {
  Random random(3);
  const Expression tiles = any_of({window(40, 30), window(2, 2, 7), global_keys({0, 2})});
  int i = 0;
  for (const ModifierKinds& kinds : all_modifier_kinds()) {
    for (const DataType type : kTypes) {
      Shape shape;
      shape.batch = 2;
      shape.group = random.between(1, 2);
      shape.sizes = ++i % 2 ? Sizes{140, 150} : Sizes{150, 90};
      shape.head_dim = 8 * random.between(1, 5);
      shape.value_dim = 8 * random.between(1, 5);
      shape.layout = random.pick<Layout>({Layout::kHeadsFirst, Layout::kTokensFirst});
      Case c(random, type, shape, {i % 3 ? tiles : causal()});
      c.listing = i % 4 < 2 ? Listing::kUnique : Listing::kAll;
      c.left_to_programs = i % 5 == 0;
      modify(random, c, kinds);
      check_case(c);
    }
  }
}

/// Every instance.
void test_modifiers_of_head_sizes() {
  Random random(4);
  const ModifierKinds kinds{TableKind::kSlots, TableKind::kBlocks, 16, true, 2.0, 0.5};
  for (const DataType type : kTypes) {
    for (const std::int64_t size : {32, 64, 96, 128, 192, 256}) {
      if (type == DataType::kFloat32 && size > 128) continue;
      Shape shape;
      shape.sizes = {80, 70};
      shape.head_dim = size - 8;
      shape.value_dim = size;
      Case c(random, type, shape, {any_of({window(30, 20), global_keys({0, 1})})});
      modify(random, c, kinds);
      check_case(c);
    }
  }
}

void test_rows_without_keys_by_bias() {
  Random random(5);
  for (const DataType type : kTypes) {
    Shape shape;
    shape.sizes = {150, 140};
    Case c(random, type, shape, {window(33, 20)});
    exclude_rows(c, 10, 30);
    check_case(c);
  }
}

}  // namespace

int main() {
  test_head_sizes();
  test_random_cases(12);
  test_modifiers();
  test_modifiers_of_head_sizes();
  test_rows_without_keys_by_bias();
  return check::report();
}
