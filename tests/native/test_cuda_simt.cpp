// The portable CUDA kernels on the emulator, against the naive reference.
#include "cuda_case.h"
#include "random_modifiers.h"

namespace {

using namespace attention;

constexpr cuda::Device kTuring{75, 64 * 1024};

constexpr DataType kTypes[] = {DataType::kFloat32, DataType::kFloat64, DataType::kBFloat16,
                               DataType::kFloat16};

const cuda::Kernels& kernels_of(const Case& c) {
  const std::int64_t size = std::max(c.shape.head_dim, c.shape.value_dim);
  return cuda::kernels_for({c.type, size, false, true, kTuring});
}

void check_case(Case& c) {
  const cuda::Kernels& kernels = kernels_of(c);
  check::context = std::string(kernels.path) + ", " + c.to_string();
  CHECK_EQUAL(std::string(kernels.path), "simt");
  CHECK(kernels.shared_bytes <= kTuring.shared_bytes);
  const Results results = run(kernels, c);
  CHECK(run(kernels, c) == results);  // whatever the order of threads and blocks
  check_forward(c, results);
  check_backward(c, results);
  for (const Tensor* tensor :
       {&results.output, &results.grad_query, &results.grad_key, &results.grad_value}) {
    CHECK(tensor->gaps_untouched());
  }
  check::context.clear();
}

Layout random_layout(Random& random) {
  return random.pick<Layout>({Layout::kHeadsFirst, Layout::kTokensFirst, Layout::kPaddedRows});
}

void test_random_cases(int cases) {
  Random random(1);
  const std::vector<std::int64_t> dims{1, 7, 33, 64, 80};
  for (int i = 0; i < cases; ++i) {
    Shape shape;
    shape.batch = random.between(1, 2);
    shape.heads_kv = random.between(1, 2);
    shape.group = random.between(1, 2);
    shape.sizes = random_sizes(random, i % 4 == 0 ? 200 : 80);
    shape.head_dim = random.pick(dims);
    shape.value_dim = random.chance(50) ? shape.head_dim : random.pick(dims);
    shape.layout = random_layout(random);
    std::vector<Expression> patterns;
    const bool per_head = shape.group == 1 && random.chance(25);
    for (std::int64_t h = 0; h < (per_head ? shape.heads() : 1); ++h)
      patterns.push_back(random_expression(random, shape.sizes.n_k, 2));
    Case c(random, kTypes[i % 4], shape, patterns);
    c.listing = random.pick<Listing>({Listing::kUnique, Listing::kAll});
    c.left_to_programs = random.chance(20);
    check_case(c);
  }
}

/// Up to the largest: whole blocks of columns, parts of them, and several lots, for dK and dV one
/// more than for the other.
void test_head_sizes() {
  Random random(2);
  for (const DataType type : kTypes) {
    for (const auto& [d, dv] :
         {std::pair{1, 2}, {16, 3}, {64, 64}, {65, 130}, {128, 31}, {200, 256}, {256, 9}}) {
      Shape shape;
      shape.sizes = {21, 25};
      shape.head_dim = d;
      shape.value_dim = dv;
      shape.layout = random_layout(random);
      Case c(random, type, shape, {window(6, 6)});
      check_case(c);
    }
  }
}

/// Several orders of the tokens, whose softmax states are merged in memory, here also for several
/// lots of columns; global rows and keys in slots; gathered keys that several tiles hold.
void test_several_passes() {
  Random random(3);
  for (const DataType type : kTypes) {
    Shape shape;
    shape.heads_kv = 2;
    shape.sizes = {190, 197};
    shape.head_dim = 5;
    shape.value_dim = type == DataType::kFloat64 ? 70 : 16;
    shape.layout = random_layout(random);
    Case c(random, type, shape,
           {any_of({window(3, 3), window(4, 2, 2), window(3, 3, 5), global_keys({0, 2}),
                    global_queries({5, 6})})});
    check_case(c);
  }
}

/// A row of more tiles than one task takes: its states and gradients are merged from slots.
void test_slots() {
  Random random(4);
  for (const DataType type : kTypes) {
    Shape shape;
    shape.group = 2;
    shape.sizes = {5, 64 * 20 + 3};
    shape.head_dim = 6;
    shape.value_dim = 9;
    Case wide(random, type, shape, {full()});
    const EmulatedPlans plans(wide, {}, true);
    CHECK(plans.image().passes()[0].rows.slots > 1);
    check_case(wide);
    shape.sizes = {64 * 20 + 3, 5};
    Case tall(random, type, shape, {full()});
    const EmulatedPlans turned(tall, {}, true);
    CHECK(turned.image().passes()[0].keys.slots > 1);
    check_case(tall);
  }
}

/// Single keys: after tiles and without, in rows that see nothing else.
void test_lists() {
  Random random(6);
  for (const DataType type : kTypes) {
    for (const Expression& pattern :
         {Expression{Word::kRandomTokens, {std::int64_t{1} << 28, 3}, {}, 0},
          any_of({window(2, 2), window(1, 1, 9), global_queries({5, 6})})}) {
      Shape shape;
      shape.heads_kv = 2;
      shape.group = 2;
      shape.sizes = {130, 150};
      shape.head_dim = random.pick<std::int64_t>({8, 33, 64});
      shape.value_dim = random.pick<std::int64_t>({5, 64, 80});
      shape.layout = random_layout(random);
      Case c(random, type, shape, {pattern});
      c.listing = Listing::kAll;
      const Plan plan = build_plan(expand(pattern, shape.sizes), shape.sizes, {}, c.listing);
      CHECK(plan.lists->keys.size() > 100);
      check_case(c);
    }
  }
}

/// Rows that see nothing: output 0, log-sum-exp -inf, gradients 0.
void test_rows_without_keys() {
  Random random(5);
  for (const DataType type : kTypes) {
    Shape shape;
    shape.batch = 2;
    shape.sizes = {70, 20};  // the first 50 queries stand before the first key
    Case before(random, type, shape, {window(4, 0)});
    check_case(before);
    shape.sizes = {20, 20};
    Case padded(random, type, shape, {full()});
    padded.padding.assign(40, 1);
    padded.spoil_unused_rows();
    check_case(padded);
    Case empty(random, type, shape, {global_keys({})});
    check_case(empty);
  }
}

/// Tables, soft cap and dropout: in tiles that are full, masked or gathered, in lists, in slots,
/// beyond 128 columns, with shared heads and padding.
void test_modifiers() {
  Random random(9);
  const Expression tiles = any_of({window(9, 5), window(2, 2, 7), global_keys({0, 2})});
  int i = 0;
  for (const DataType type : kTypes) {
    for (const ModifierKinds& kinds : all_modifier_kinds()) {
      Shape shape;
      shape.batch = 2;
      shape.heads_kv = random.between(1, 2);
      shape.group = random.between(1, 2);
      shape.sizes = ++i % 2 ? Sizes{70, 83} : Sizes{90, 40};
      shape.head_dim = random.pick<std::int64_t>({3, 33});
      shape.value_dim = random.pick<std::int64_t>({5, 64});
      shape.layout = random_layout(random);
      Case c(random, type, shape, {i % 3 ? tiles : causal()});
      c.listing = i % 4 < 2 ? Listing::kUnique : Listing::kAll;
      c.left_to_programs = i % 5 == 0;
      modify(random, c, kinds);
      check_case(c);
    }
  }
}

void test_modifiers_of_large_heads_and_in_slots() {
  Random random(10);
  const ModifierKinds kinds{TableKind::kSlots, TableKind::kBlocks, 16, true, 2.0, 0.5};
  for (const DataType type : kTypes) {
    Shape shape;
    shape.sizes = {21, 25};
    shape.head_dim = 200;
    shape.value_dim = 256;
    Case large(random, type, shape, {window(6, 6)});
    modify(random, large, kinds);
    check_case(large);
    shape.sizes = {5, 64 * 20 + 3};
    shape.head_dim = shape.value_dim = 6;
    Case in_slots(random, type, shape, {full()});
    modify(random, in_slots, kinds);
    check_case(in_slots);
  }
}

void test_rows_without_keys_by_bias() {
  Random random(11);
  for (const DataType type : kTypes) {
    for (const Listing listing : {Listing::kUnique, Listing::kAll}) {
      Shape shape;
      shape.sizes = {70, 66};
      Case c(random, type, shape, {any_of({window(3, 3), window(1, 1, 9)})});
      c.listing = listing;
      exclude_rows(c, 10, 30);
      check_case(c);
    }
  }
}

/// Logits far apart: nothing overflows, and the sums stay right.
void test_large_logits() {
  Random random(6);
  for (const DataType type : kTypes) {
    Shape shape;
    shape.sizes = {40, 140};
    Case c(random, type, shape, {window(100, 30)});
    c.scale = 100.0;
    check_case(c);
    c.scale = -100.0;
    check_case(c);
  }
}

/// Each value of a half type passes through unchanged where there is one key.
void test_half_values_pass_through() {
  for (const DataType type : {DataType::kBFloat16, DataType::kFloat16}) {
    Random random(7);
    Shape shape;
    shape.heads_kv = 256;
    shape.sizes = {1, 1};
    shape.value_dim = 256;
    Case c(random, type, shape, {full()}, {}, 1, 0);
    std::uint16_t bits = 0;
    c.value.fill([&] { return half_to_double(bits++, half_format(type)); });
    const Results results = run(kernels_of(c), c);
    c.value.for_each([&](auto b, auto h, auto i, auto v) {
      const double expected = c.value.get(b, h, i, v), got = results.output.get(b, h, i, v);
      CHECK(std::isnan(expected) ? std::isnan(got) : got == expected);
    });
  }
}

/// NaN in a key makes NaN of the rows that see it, and of no others.
void test_nan_is_not_hidden() {
  Random random(8);
  for (const DataType type : kTypes) {
    Shape shape;
    shape.sizes = {64, 64};
    Case c(random, type, shape, {window(0, 0)}, {}, 1, 0);
    c.key.set(0, 0, 20, 3, std::nan(""));
    check::context = c.to_string();
    const Results results = run(kernels_of(c), c);
    for (std::int64_t i = 0; i < 64; ++i) {
      CHECK_EQUAL(std::isnan(results.output.get(0, 0, i, 0)), i == 20);
      CHECK_EQUAL(std::isnan(results.lse.get(i)), i == 20);
    }
  }
  check::context.clear();
}

}  // namespace

int main() {
  test_head_sizes();
  test_random_cases(24);
  test_several_passes();
  test_slots();
  test_lists();
  test_rows_without_keys();
  test_modifiers();
  test_modifiers_of_large_heads_and_in_slots();
  test_rows_without_keys_by_bias();
  test_large_logits();
  test_half_values_pass_through();
  test_nan_is_not_hidden();
  return check::report();
}
