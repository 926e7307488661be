// The kernels of every instruction set that this machine has, in all types, against the naive
// reference.
#include <stdexcept>

#include "attention_case.h"
#include "random_modifiers.h"

namespace {

using namespace attention;

constexpr DataType kTypes[] = {DataType::kFloat32, DataType::kFloat64, DataType::kBFloat16,
                               DataType::kFloat16};

/// The compiled instruction sets that run here.
std::vector<const char*> isas() {
  std::vector<const char*> names;
  for (int n = 0; cpu::compiled_isa(n); ++n) {
    if (cpu::kernels(cpu::compiled_isa(n), DataType::kFloat32))
      names.push_back(cpu::compiled_isa(n));
  }
  return names;
}

/// bfloat16 on AMX tiles, which round P and dS to it and take subnormal numbers for zero.
bool on_tiles(const std::string& isa, DataType type) {
  return isa == "x86-64-amx" && type == DataType::kBFloat16;
}

/// All instruction sets on one case, each with 1 and 3 threads.
void check_case(Case& c) {
  for (const char* isa : isas()) {
    check::context = std::string(isa) + ", " + c.to_string();
    c.precision = on_tiles(isa, c.type) ? half_products(c.type) : Precision{};
    const cpu::Kernels& kernels = *cpu::kernels(isa, c.type);
    const Results results = run(kernels, c, 1);
    CHECK(run(kernels, c, 3) == results);
    check_forward(c, results);
    check_backward(c, results);
    for (const Tensor* tensor :
         {&results.output, &results.grad_query, &results.grad_key, &results.grad_value}) {
      CHECK(tensor->gaps_untouched());
    }
  }
  check::context.clear();
}

Layout random_layout(Random& random) {
  return random.pick<Layout>({Layout::kHeadsFirst, Layout::kTokensFirst, Layout::kPaddedRows});
}

void test_random_cases() {
  Random random(1);
  const std::vector<std::int64_t> dims{1, 7, 33, 64, 80};
  const std::vector<TileShape> tiles{{64, 64}, {64, 64}, {32, 32}, {16, 64}, {7, 13}};
  for (int i = 0; i < 40; ++i) {
    Shape shape;
    shape.batch = random.between(1, 2);
    shape.heads_kv = random.between(1, 2);
    shape.group = random.between(1, 2);
    shape.sizes = random_sizes(random, i % 8 == 0 ? 140 : 60);
    shape.head_dim = random.pick(dims);
    shape.value_dim = random.chance(50) ? shape.head_dim : random.pick(dims);
    shape.layout = random_layout(random);
    std::vector<Expression> patterns;
    int chunks = static_cast<int>(random.between(1, 4));
    const bool per_head = random.chance(25);
    for (std::int64_t h = 0; h < (per_head ? shape.heads() : 1); ++h)
      patterns.push_back(random_expression(random, shape.sizes.n_k, 2));
    // Heads that share keys must share their plan, or take turns.
    if (per_head && shape.group > 1) chunks = 1;
    Case c(random, kTypes[i % 4], shape, patterns, random.pick(tiles), chunks);
    c.listing = random.pick<Listing>({Listing::kUnique, Listing::kAll});
    check_case(c);
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
      Case c(random, type, shape, {pattern}, {}, 2);
      c.listing = Listing::kAll;
      const Plan plan = build_plan(expand(pattern, shape.sizes), shape.sizes, c.tile, c.listing);
      CHECK(plan.lists->keys.size() > 100);
      check_case(c);
    }
  }
}

/// Every pair of head sizes, so that each width of register block has a turn.
void test_head_sizes() {
  Random random(2);
  for (const DataType type : kTypes) {
    for (const std::int64_t d : {1, 2, 7, 16, 33, 64, 80, 128, 256}) {
      Shape shape;
      shape.sizes = {21, 21};
      shape.head_dim = d;
      shape.value_dim = random.chance(50) ? d : random.between(1, 96);
      shape.layout = random_layout(random);
      Case c(random, type, shape, {window(6, 6)});
      check_case(c);
    }
  }
}

/// Several orders of the tokens, whose softmax states are merged.
void test_several_passes() {
  Random random(3);
  for (const DataType type : kTypes) {
    for (const int chunks : {1, 3}) {
      Shape shape;
      shape.heads_kv = 2;
      shape.sizes = {90, 97};
      shape.head_dim = 16;
      shape.value_dim = chunks == 1 ? 16 : 5;
      shape.layout = random_layout(random);
      Case c(random, type, shape,
             {any_of({window(3, 3), window(4, 2, 2), window(3, 3, 5), global_keys({0, 2}),
                      global_queries({5, 6})})},
             {16, 16}, chunks);
      check_case(c);
    }
  }
}

/// Global rows split along their keys, and gathered keys that several chunks add to.
void test_global_tokens_in_chunks() {
  Random random(4);
  for (const DataType type : kTypes) {
    for (int chunks = 1; chunks <= 4; ++chunks) {
      Shape shape;
      shape.group = chunks % 2 + 1;
      shape.sizes = {150, 150};
      shape.head_dim = 8;
      shape.value_dim = 12;
      shape.layout = random_layout(random);
      Case c(random, type, shape,
             {any_of({window(9, 9), global_keys({-1, 0, 0, 3}), global_queries({-1, 0, 0, 3})})},
             {16, 16}, chunks);
      const Schedule schedule(std::make_shared<const Plan>(build_plan(
                                  expand(c.patterns[0], shape.sizes), shape.sizes, c.tile)),
                              Direction::kBackward, chunks);
      CHECK_EQUAL(schedule.view().passes[0].row_slots > 0, chunks > 1);
      CHECK_EQUAL(schedule.view().passes[0].key_slots > 0, chunks > 1);
      check_case(c);
    }
  }
}

/// Rows that see nothing: output 0, log-sum-exp -inf, gradients 0. check_case() knows; here it is
/// certain that there are such rows.
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
    Case turned(random, type, shape, {all_of({window(0, 0), global_keys({3, 4})})});
    check_case(turned);
  }
}

/// More packed tiles of full size than a thread keeps: all of its memory is in use, to the last
/// byte.
void test_whole_workspace() {
  Random random(9);
  for (const DataType type : kTypes) {
    Shape shape;
    shape.heads_kv = 2;
    shape.sizes = {64, 17 * 64};
    shape.layout = Layout::kTokensFirst;
    Case c(random, type, shape, {full()});
    check_case(c);
  }
}

/// Logits far apart: nothing overflows, and the sums stay right.
void test_large_logits() {
  Random random(6);
  for (const DataType type : kTypes) {
    Shape shape;
    shape.sizes = {40, 40};
    Case c(random, type, shape, {window(30, 30)}, {16, 16});
    c.scale = 100.0;
    check_case(c);
    c.scale = -100.0;
    check_case(c);
  }
}

/// Each value of a half type passes through both kernels unchanged where there is one key.
void test_half_values_pass_through() {
  for (const DataType type : {DataType::kBFloat16, DataType::kFloat16}) {
    Random random(7);
    Shape shape;
    shape.sizes = {1, 1};
    shape.value_dim = 256;
    for (std::int64_t first = 0; first < 0x10000; first += shape.value_dim) {
      Case c(random, type, shape, {full()}, {}, 1, 0);
      for (std::int64_t v = 0; v < shape.value_dim; ++v) {
        c.value.set(0, 0, 0, v,
                    half_to_double(static_cast<std::uint16_t>(first + v), half_format(type)));
      }
      for (const char* isa : isas()) {
        check::context = isa;
        const Results results = run(*cpu::kernels(isa, type), c, 1);
        for (std::int64_t v = 0; v < shape.value_dim; ++v) {
          const double value = c.value.get(0, 0, 0, v), got = results.output.get(0, 0, 0, v);
          const bool flushed = on_tiles(isa, type) && std::fabs(value) < 0x1p-126;
          const double expected = flushed ? 0.0 : value;
          CHECK(std::isnan(expected) ? std::isnan(got) : got == expected);
        }
      }
    }
  }
  check::context.clear();
}

/// NaN in a key makes NaN of the rows that see it, and of no other tile's rows.
void test_nan_is_not_hidden() {
  Random random(8);
  for (const DataType type : kTypes) {
    Shape shape;
    shape.sizes = {64, 64};
    Case c(random, type, shape, {window(0, 0)}, {16, 16}, 1, 0);
    c.key.set(0, 0, 20, 3, std::nan(""));
    for (const char* isa : isas()) {
      check::context = std::string(isa) + ", " + c.to_string();
      const Results results = run(*cpu::kernels(isa, type), c, 1);
      for (std::int64_t i = 0; i < 64; ++i) {
        CHECK_EQUAL(std::isnan(results.output.get(0, 0, i, 0)), i == 20);
        CHECK_EQUAL(std::isnan(results.lse.get(i)), i == 20);
      }
    }
  }
  check::context.clear();
}

void test_dispatch() {
  const std::vector<const char*> names = isas();
  CHECK(!names.empty());
  CHECK(std::find(names.begin(), names.end(), std::string(cpu::isa_name())) != names.end());
  for (const DataType type : kTypes) {
    CHECK(&cpu::kernels(type) == cpu::kernels(cpu::isa_name(), type));
    CHECK(!cpu::kernels("no_such_isa", type));
    CHECK(!cpu::kernels("", type));
    for (const DataType other : kTypes) {
      CHECK_EQUAL(cpu::kernels(names[0], type) == cpu::kernels(names[0], other), type == other);
    }
  }
  std::string dashes = names[0];
  std::replace(dashes.begin(), dashes.end(), '_', '-');
  CHECK(cpu::kernels(dashes.c_str(), DataType::kFloat32) ==
        cpu::kernels(names[0], DataType::kFloat32));
}

/// Tables, soft cap and dropout: in tiles that are full, masked or gathered, in lists, in chunks.
void test_modifiers() {
  Random random(12);
  const Expression tiles = any_of({window(9, 5), window(2, 2, 7), global_keys({0, 2})});
  int i = 0;
  for (const ModifierKinds& kinds : all_modifier_kinds()) {
    Shape shape;
    shape.batch = 2;
    shape.heads_kv = random.between(1, 2);
    shape.group = random.between(1, 2);
    shape.sizes = ++i % 2 ? Sizes{70, 83} : Sizes{90, 40};
    shape.head_dim = random.pick<std::int64_t>({3, 33});
    shape.value_dim = random.pick<std::int64_t>({5, 64});
    shape.layout = random_layout(random);
    Case c(random, kTypes[i % 4], shape, {i % 3 ? tiles : causal()}, {}, i % 4 + 1);
    c.listing = i % 4 < 2 ? Listing::kUnique : Listing::kAll;
    modify(random, c, kinds);
    check_case(c);
  }
}

}  // namespace

int main() {
  for (const char* isa : isas()) std::cout << isa << "\n";
  test_dispatch();
  test_random_cases();
  test_lists();
  test_head_sizes();
  test_several_passes();
  test_global_tokens_in_chunks();
  test_rows_without_keys();
  test_whole_workspace();
  test_large_logits();
  test_half_values_pass_through();
  test_nan_is_not_hidden();
  test_modifiers();
  return check::report();
}
