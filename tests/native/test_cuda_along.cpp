// Derivatives along a tangent and gradients of tables: the portable CUDA kernels on the emulator,
// against the naive reference.
#include "along_case.h"
#include "cuda_case.h"
#include "plan/head_plan.h"

namespace {

using namespace attention;

#if defined(SPARSE_ATTN_EMULATOR_THREADS)
constexpr bool kSmall = true;
#else
constexpr bool kSmall = false;
#endif

constexpr DataType kTypes[] = {DataType::kFloat64, DataType::kFloat32, DataType::kBFloat16,
                               DataType::kFloat16};

/// Plans as the kernels read them, and the tensors that programs do.
class PlansOfCase {
 public:
  PlansOfCase(const AlongCase& a, const std::vector<HeadPlan>& plans)
      : image_(plans, {{}, a.base.shape.batch * a.base.shape.heads(), true}),
        bytes_(index(image_.size()) + 16) {
    const std::vector<char> bytes = image_.at(bytes_.data());
    std::copy(bytes.begin(), bytes.end(), bytes_.begin());
  }
  explicit PlansOfCase(const AlongCase& a) : PlansOfCase(a, plans_of(a.base)) {}

  cuda::Call call(AlongCase& a) {
    cuda::Call call;
    call.params = params_of(a.base);
    a.put_into(call.params);
    call.image = &image_;
    call.base = bytes_.data();
    call.plan_heads = static_cast<std::int32_t>(a.base.patterns.size());
    std::copy(tensors.begin(), tensors.end(), call.tensors);
    call.global = global;
    return call;
  }
  std::size_t passes() const { return image_.passes().size(); }
  bool has_lists() const { return image_.keys_of_query() >= 0; }

  std::vector<ProgramTensor> tensors;
  cuda::GlobalTokens global;

 private:
  static std::vector<HeadPlan> plans_of(const Case& c) {
    std::vector<HeadPlan> plans;
    for (const Expression& pattern : c.patterns) {
      plans.push_back({std::make_shared<const Plan>(
          build_plan(expand(pattern, c.shape.sizes), c.shape.sizes, {}, c.listing))});
    }
    return plans;
  }
  GridImage image_;
  std::vector<char> bytes_;
};

/// Checks numbers up to roundings, in proportion to the largest of all: sums cancel.
class Comparison {
 public:
  Comparison(const char* what, DataType type) : what_(what), type_(type) {}
  void add(double got, double expected, double more = 0.0) {
    all_.push_back({got, expected, more});
    size_ = std::max(size_, std::fabs(expected));
  }
  ~Comparison() {
    const double relative = type_ == DataType::kFloat64 ? 1e-11 : 2e-5;
    for (const Number& x : all_) {
      const double bound = relative * (1.0 + size_) + x.more;
      if (check::count(std::fabs(x.got - x.expected) <= bound) || !check::loud()) continue;
      check::fail(__FILE__, __LINE__) << "expected " << what_ << " within " << bound << " of "
                                      << x.expected << ", got " << x.got << "\n";
    }
  }

 private:
  struct Number {
    double got, expected, more;
  };
  const char* what_;
  DataType type_;
  std::vector<Number> all_;
  double size_ = 0.0;
};

double rounding(DataType type, double x) {
  return size_of(type) == 2 ? 0.51 * half_format(type).unit(std::fabs(x)) : 0.0;
}

/// What the kernels made of a case.
struct AlongResults {
  Tensor output_dot, grad_query, grad_key, grad_value;
  Numbers lse_dot, grad_bias, grad_gate;  // of tables along the tangent; without it in the case

  bool operator==(const AlongResults& other) const {
    return output_dot.bytes() == other.output_dot.bytes() &&
           lse_dot.bytes() == other.lse_dot.bytes() &&
           grad_query.bytes() == other.grad_query.bytes() &&
           grad_key.bytes() == other.grad_key.bytes() &&
           grad_value.bytes() == other.grad_value.bytes() &&
           grad_bias.bytes() == other.grad_bias.bytes() &&
           grad_gate.bytes() == other.grad_gate.bytes();
  }
};

void put_gradients_into(AttentionParams& params, AlongCase& a) {
  for (TableCase* table : {&a.bias, &a.gate}) {
    if (!table->any()) continue;
    for (std::int64_t i = 0; i < table->count(); ++i) table->gradient.set(i, 0.0);
  }
  params.grad_bias = a.bias.view(a.bias.gradient);
  params.grad_gate = a.gate.view(a.gate.gradient);
}

AlongResults run(AlongCase& a, PlansOfCase& plans, Tensor& output, Numbers& lse) {
  const cuda::AlongKernels& kernels = cuda::along_kernels_for(a.base.type);
  CHECK(kernels.portable->shared_bytes <= 64 * 1024);
  const Shape& s = a.base.shape;
  const auto [n_q, n_k] = s.sizes;
  AlongResults results;
  results.output_dot = Tensor(a.base.type, s.layout, s.batch, s.heads(), n_q, s.value_dim);
  results.lse_dot = Numbers(real_type(a.base.type), s.batch * s.heads() * n_q);

  cuda::Call call = plans.call(a);
  a.put_tangents_into(call.params);
  call.params.output = output.view();
  call.params.lse = lse.data();
  call.params.output_tangent = results.output_dot.view();
  call.params.lse_tangent = results.lse_dot.data();
  {
    Workspace workspace(cuda::tangent_workspace(kernels, call));
    call.params.workspace = workspace.data();
    cuda::tangent(kernels, call);
  }
  const auto sums = [&](std::int64_t heads, std::int64_t length, std::int64_t size, bool wide) {
    Tensor made(wide ? real_type(a.base.type) : a.base.type, s.layout, s.batch, heads, length,
                size);
    made.fill([] { return 0.0; });
    return made;
  };
  const bool wide = cuda::adds_to_gradients(*kernels.portable, call);
  results.grad_query = sums(s.heads(), n_q, s.head_dim, wide);
  results.grad_key = sums(s.heads_kv, n_k, s.head_dim, wide);
  results.grad_value = sums(s.heads_kv, n_k, s.value_dim, wide);
  call.params.grad_output = a.base.grad_output.view();
  call.params.grad_lse = a.base.grad_lse.bytes().empty() ? nullptr : a.base.grad_lse.data();
  call.params.grad_query = results.grad_query.view();
  call.params.grad_key = results.grad_key.view();
  call.params.grad_value = results.grad_value.view();
  {
    Workspace workspace(cuda::backward_along_workspace(kernels, call));
    call.params.workspace = workspace.data();
    cuda::backward_along(kernels, call, wide);
  }
  put_gradients_into(call.params, a);
  {
    Workspace workspace(cuda::grad_tables_workspace(kernels, call));
    call.params.workspace = workspace.data();
    cuda::grad_tables(kernels, call);
  }
  results.grad_bias = a.bias.gradient;
  results.grad_gate = a.gate.gradient;

  cuda::Call first = plans.call(a);  // no tangent: the gradients themselves
  first.params.output = output.view();
  first.params.lse = lse.data();
  first.params.grad_output = call.params.grad_output;
  first.params.grad_lse = call.params.grad_lse;
  put_gradients_into(first.params, a);
  Workspace workspace(cuda::grad_tables_workspace(kernels, first));
  first.params.workspace = workspace.data();
  cuda::grad_tables(kernels, first);
  return results;
}

void check_tensor(const char* what, DataType type, const Tensor& got, DualTensor& expected,
                  DataType stored) {
  Comparison comparison(what, type);
  got.for_each([&](auto b, auto h, auto i, auto c) {
    const double x = expected.at(b, h, i, c).dot;
    comparison.add(got.get(b, h, i, c), x, rounding(stored, x));
  });
}

void check_table(const char* what, DataType type, const TableCase& table, const Numbers& along,
                 const std::vector<Dual>& expected, const std::vector<double>& sizes) {
  if (!table.any()) return;
  const double relative = type == DataType::kFloat64 ? 1e-14 : 2e-6;
  Comparison first(what, type), second(what, type);
  for (std::int64_t i = 0; i < table.count(); ++i) {
    const double more = relative * sizes[index(i)];
    first.add(table.gradient.get(i), expected[index(i)].value, more);
    second.add(along.get(i), expected[index(i)].dot, more);
  }
}

void check_case(AlongCase& a, PlansOfCase& plans) {
  const DataType type = a.base.type;
  check::context = a.base.to_string();
  DualReference reference(a);
  reference.forward();
  const Shape& s = a.base.shape;
  Tensor output(type, s.layout, s.batch, s.heads(), s.sizes.n_q, s.value_dim);
  Numbers lse(real_type(type), s.batch * s.heads() * s.sizes.n_q);
  output.for_each([&](auto b, auto h, auto i, auto c) {
    output.set(b, h, i, c, reference.output.at(b, h, i, c).value);
    if (c == 0) lse.set(a.base.lse_at(b, h, i), reference.lse.at(b, h, i, 0).value);
  });
  const AlongResults results = run(a, plans, output, lse);
  {
    Comparison of_output("output along", type), of_lse("log-sum-exp along", type);
    output.for_each([&](auto b, auto h, auto i, auto c) {
      Dual& expected = reference.output.at(b, h, i, c);
      const double lse_dot = reference.lse.at(b, h, i, 0).dot;
      of_output.add(
          results.output_dot.get(b, h, i, c), expected.dot,
          rounding(type, expected.dot) + std::fabs(lse_dot) * rounding(type, expected.value));
      if (c == 0) of_lse.add(results.lse_dot.get(a.base.lse_at(b, h, i)), lse_dot);
      expected = {output.get(b, h, i, c), results.output_dot.get(b, h, i, c)};
    });
  }
  reference.backward();
  const bool wide = results.grad_query.bytes().size() > a.query_dot.bytes().size();
  const DataType stored = wide ? real_type(type) : type;
  check_tensor("grad_query along", type, results.grad_query, reference.grad_query, stored);
  check_tensor("grad_key along", type, results.grad_key, reference.grad_key, stored);
  check_tensor("grad_value along", type, results.grad_value, reference.grad_value, stored);
  check_table("grad_bias", type, a.bias, results.grad_bias, reference.grad_bias,
              reference.bias_sizes);
  check_table("grad_gate", type, a.gate, results.grad_gate, reference.grad_gate,
              reference.gate_sizes);
  for (const Tensor* tensor :
       {&results.output_dot, &results.grad_query, &results.grad_key, &results.grad_value})
    CHECK(tensor->gaps_untouched());
  if (!kSmall) CHECK(run(a, plans, output, lse) == results);  // whatever the order of the blocks
  check::context.clear();
}

void check_case(AlongCase& a) {
  PlansOfCase plans(a);
  check_case(a, plans);
}

Shape shape_of(std::int64_t batch, std::int64_t heads_kv, std::int64_t group, Sizes sizes,
               std::int64_t head_dim, std::int64_t value_dim) {
  Shape shape;
  shape.batch = batch;
  shape.heads_kv = heads_kv;
  shape.group = group;
  shape.sizes = sizes;
  shape.head_dim = head_dim;
  shape.value_dim = value_dim;
  return shape;
}

/// Number `i` of the kinds of tables, broadcast or not; 0 is none.
constexpr int kTables = 12;
TableCase table_number(int i, const AlongCase& a, Random& random, double middle) {
  const Shape& s = a.base.shape;
  const auto [n_q, n_k] = s.sizes;
  const std::int64_t b = s.batch, h = s.heads(), slots = random.between(1, 9);
  const auto slots_of = [&](std::int64_t batch, std::int64_t heads, std::int64_t rows) {
    return a.table(random, TableKind::kSlots, {batch, heads, rows, slots}, 1, middle);
  };
  const auto blocks_of = [&](std::int64_t batch, std::int64_t heads, std::int64_t block) {
    const auto blocks = [&](std::int64_t n) { return (n + block - 1) / block; };
    return a.table(random, TableKind::kBlocks, {batch, heads, blocks(n_q), blocks(n_k)}, block,
                   middle);
  };
  switch (i) {
    case 1:
      return slots_of(1, h, 1);
    case 2:
      return slots_of(b, h, n_q);
    case 3:
      return slots_of(1, h, n_q);
    case 4:
      return slots_of(b, h, 1);
    case 5:
      return blocks_of(b, h, 1);
    case 6:
      return blocks_of(1, 1, 1);
    case 7:
      return blocks_of(b, 1, 16);
    case 8:
      return blocks_of(1, h, 3);
    case 9:
      return blocks_of(1, 1, 100);
    case 10:
      return blocks_of(1, h, 1);
    case 11:
      return a.table(random, TableKind::kSlopes, {1, h, 1, 1}, 1, 0.0);
    default:
      return {};
  }
}

/// Every kind of table as a bias and as a gate, negative gates too, with several windows.
void test_tables() {
  Random random(1);
  for (int i = 0; i < kTables; ++i) {
    Shape shape = shape_of(2, 2, i % 2 + 1, {70, 90}, 8, 5);
    shape.layout = random.pick<Layout>({Layout::kTokensFirst, Layout::kPaddedRows});
    AlongCase a(random, Case(random, kTypes[i % 2], shape, {window(9, 4)}));
    a.windows = {{3, 1}, {1, 2}};
    a.bias = table_number(i, a, random, 0.0);
    a.gate = table_number(i == 0 ? 11 - 1 : 11 - i, a, random, 0.2);
    if (i % 3 == 1) a.softcap = 1.5;
    if (i % 3 == 2) a.dropout_p = 0.3;
    check_case(a);
  }
}

/// Blocks of a table so large that it has owners of its rows.
void test_owned_blocks() {
  Random random(2);
  for (const std::int64_t block : {2, 3, 30}) {
    const Sizes sizes = block == 30 ? Sizes{1000, 1100} : Sizes{150, 140};
    Shape shape = shape_of(2, 1, 2, sizes, 4, 3);
    AlongCase a(random, Case(random, DataType::kFloat64, shape,
                             {any_of({window(5, 5), window(1, 1, 9), global_keys({0, 2}),
                                      global_queries({5, 7})})}));
    const auto blocks = [&](std::int64_t n) { return (n + block - 1) / block; };
    a.bias = a.table(random, TableKind::kBlocks, {1, 2, blocks(sizes.n_q), blocks(sizes.n_k)},
                     block, 0.0);
    CHECK(cuda::TableGradient(a.bias.view(a.bias.gradient), false, params_of(a.base)).owners > 1);
    check_case(a);
  }
}

/// Any pattern in any type; lists as well.
void test_random_cases(int cases) {
  Random random(3);
  const std::vector<std::int64_t> dims{1, 7, 33, 64, 80};
  for (int i = 0; i < cases; ++i) {
    Shape shape =
        shape_of(random.between(1, 2), random.between(1, 2), random.between(1, 2),
                 random_sizes(random, i % 4 == 0 ? 150 : 70), random.pick(dims), random.pick(dims));
    std::vector<Expression> patterns;
    const bool per_head = shape.group == 1 && random.chance(50);
    for (std::int64_t h = 0; h < (per_head ? shape.heads() : 1); ++h)
      patterns.push_back(random_expression(random, shape.sizes.n_k, 2));
    Case base(random, kTypes[i % 4], shape, patterns);
    base.listing = random.pick<Listing>({Listing::kUnique, Listing::kAll});
    AlongCase a(random, std::move(base));
    a.windows.clear();
    for (std::int64_t h = 0; h < (per_head ? shape.heads() : 1); ++h)
      a.windows.push_back({random.between(0, 6), random.between(1, 3)});
    a.bias = table_number(static_cast<int>(random.between(0, kTables - 1)), a, random, 0.0);
    a.gate = table_number(static_cast<int>(random.between(0, kTables - 2)), a, random, 1.0);
    if (random.chance(50)) a.softcap = 2.0;
    if (random.chance(50)) a.dropout_p = 0.25;
    check_case(a);
  }
}

/// Several orders of the tokens, slots of long rows and columns, lists.
void test_passes_slots_and_lists() {
  Random random(4);
  {
    Shape shape = shape_of(1, 2, 1, {150, 157}, 5, 40);
    Case base(random, DataType::kFloat64, shape,
              {any_of({window(3, 3), window(4, 2, 2), window(3, 3, 5), global_keys({0, 2}),
                       global_queries({5, 6})})});
    AlongCase a(random, std::move(base));
    a.windows = {{3, 1}, {4, 2}};
    a.bias = table_number(1, a, random, 0.0);
    a.gate = table_number(2, a, random, 1.0);
    CHECK(PlansOfCase(a).passes() > 1);
    check_case(a);
  }
  for (const Sizes sizes : {Sizes{5, 64 * 20 + 3}, Sizes{64 * 20 + 3, 5}}) {
    AlongCase a(random, Case(random, DataType::kFloat32, shape_of(1, 1, 2, sizes, 6, 9), {full()}));
    a.bias = table_number(11, a, random, 0.0);
    a.gate = table_number(8, a, random, 1.0);
    check_case(a);
  }
  for (const int table : {1, 2, 7, 8, 10, 11}) {
    Shape shape = shape_of(2, 2, 2, {60, 80}, 33, 5);
    Case base(random, kTypes[table % 2], shape,
              {Expression{Word::kRandomTokens, {std::int64_t{1} << 28, 3}, {}, 0}});
    base.listing = Listing::kAll;
    AlongCase a(random, std::move(base));
    a.bias = table_number(table, a, random, 0.0);
    a.dropout_p = 0.5;
    CHECK(PlansOfCase(a).has_lists());
    check_case(a);
  }
}

/// A layout and global tokens of each example, which only the device knows.
void test_evaluated_passes() {
  Random random(5);
  for (const int table : {1, 5, 7, 11}) {
    Shape shape = shape_of(2, 1, 2, {100, 130}, 8, 6);
    const auto [n_q, n_k] = shape.sizes;
    AlongCase a(random, Case(random, kTypes[table % 2], shape, {full()}, {}, 1, 0));
    constexpr std::int64_t kBlock = 16;
    const std::int64_t columns = (n_k + kBlock - 1) / kBlock, rows = (n_q + kBlock - 1) / kBlock;
    std::vector<std::uint8_t> layout, globals;
    for (std::int64_t i = 0; i < rows * columns; ++i) layout.push_back(random.chance(20));
    for (std::int64_t i = 0; i < 2 * n_k; ++i) globals.push_back(random.chance(4));
    const auto is_global = [&](std::int64_t b, std::int64_t token) {
      return token >= 0 && globals[index(b * n_k + token)];
    };
    for (std::int64_t b = 0; b < 2; ++b) {
      for (std::int64_t i = 0; i < n_q; ++i) {
        for (std::int64_t j = 0; j < n_k; ++j) {
          const bool sees = layout[index(i / kBlock * columns + j / kBlock)] || is_global(b, j) ||
                            is_global(b, i + n_k - n_q);
          for (std::int64_t h = 0; h < 2; ++h)
            a.allowed[index(b * 2 + h)][index(i * n_k + j)] = sees;
        }
      }
    }
    PlansOfCase plans(a, {head_plan({Word::kBlockLayout, {kBlock}, {}, 0}, shape.sizes, 1)});
    plans.tensors = {{layout.data(), 0, 0, columns}, {globals.data(), n_k, 0, n_k}};
    std::vector<std::int64_t> keys(index(2 * n_k)), queries(index(2 * n_q)), key_counts(2),
        query_counts(2);
    for (std::int64_t b = 0; b < 2; ++b) {
      for (std::int64_t j = 0; j < n_k; ++j) {
        if (!is_global(b, j)) continue;
        keys[index(b * n_k + key_counts[index(b)]++)] = j;
        if (j >= n_k - n_q) queries[index(b * n_q + query_counts[index(b)]++)] = j - (n_k - n_q);
      }
    }
    plans.global = {keys.data(), key_counts.data(), queries.data(), query_counts.data(), n_k, n_q};
    a.windows = {{4, 1}};
    a.bias = table_number(table, a, random, 0.0);
    a.gate = table_number(3, a, random, 1.0);
    check_case(a, plans);
  }
}

/// Rows that see nothing, by the pattern, by padding, or by biases of -inf.
void test_rows_without_keys() {
  Random random(6);
  for (const DataType type : kTypes) {
    AlongCase before(random, Case(random, type, shape_of(2, 1, 1, {70, 20}, 8, 8), {window(4, 0)}));
    before.bias = table_number(5, before, random, 0.0);
    check_case(before);
    Case all(random, type, shape_of(2, 1, 1, {20, 20}, 8, 8), {full()});
    all.padding.assign(40, 1);
    all.spoil_unused_rows();
    AlongCase padded(random, std::move(all));
    padded.bias = table_number(1, padded, random, 0.0);
    check_case(padded);
    AlongCase excluded(random, Case(random, type, shape_of(1, 2, 1, {30, 35}, 8, 8), {full()}));
    excluded.bias = table_number(10, excluded, random, 0.0);
    for (std::int64_t i = 0; i < excluded.bias.count(); ++i) {
      if (i / 35 % 5 == 0 || random.chance(30))
        excluded.bias.values.set(i, -static_cast<double>(INFINITY));
    }
    check_case(excluded);
  }
}

/// Everything dropped.
void test_all_dropped() {
  Random random(7);
  AlongCase a(random,
              Case(random, DataType::kFloat64, shape_of(1, 1, 1, {20, 25}, 4, 4), {full()}));
  a.bias = table_number(1, a, random, 0.0);
  a.dropout_p = 1.0;
  check_case(a);
}

/// Several lots of columns.
void test_head_sizes() {
  Random random(8);
  for (const DataType type : kTypes) {
    for (const auto& [d, dv] : {std::pair{1, 130}, {200, 256}, {65, 2}}) {
      AlongCase a(random, Case(random, type, shape_of(1, 1, 1, {21, 25}, d, dv), {window(6, 6)}));
      check_case(a);
    }
  }
}

/// The reference against central differences: a step along the tangent.
void test_reference() {
  Random random(9);
  AlongCase a(random, Case(random, DataType::kFloat64, shape_of(1, 1, 2, {12, 14}, 4, 3),
                           {window(4, 3)}, {}, 1, 0));
  a.windows = {{4, 1}};
  a.bias = table_number(1, a, random, 0.0);
  a.gate = table_number(5, a, random, 0.5);
  a.softcap = 1.5;
  a.dropout_p = 0.2;
  constexpr double kStep = 1e-5;
  const auto moved = [&](double step) {
    AlongCase to = a;
    const auto move = [&](Tensor& tensor, const Tensor& dot) {
      dot.for_each([&](auto b, auto h, auto i, auto c) {
        tensor.set(b, h, i, c, tensor.get(b, h, i, c) + step * dot.get(b, h, i, c));
      });
    };
    move(to.base.query, to.query_dot);
    move(to.base.key, to.key_dot);
    move(to.base.value, to.value_dot);
    for (TableCase* table : {&to.bias, &to.gate}) {
      for (std::int64_t i = 0; i < table->count(); ++i)
        table->values.set(i, table->values.get(i) + step * table->dots.get(i));
    }
    return to;
  };
  AlongCase ahead = moved(kStep), behind = moved(-kStep);
  DualReference here(a), plus(ahead), minus(behind);
  for (DualReference* reference : {&here, &plus, &minus}) {
    reference->forward();
    reference->backward();
  }
  const auto check_all = [&](std::vector<Dual>& at, std::vector<Dual>& high,
                             std::vector<Dual>& low) {
    CHECK(!at.empty());
    for (std::size_t i = 0; i < at.size(); ++i) {
      const double slope = (high[i].value - low[i].value) / (2.0 * kStep);
      CHECK(std::fabs(slope - at[i].dot) < 1e-7 * (1.0 + std::fabs(slope)));
    }
  };
  check_all(here.output.all(), plus.output.all(), minus.output.all());
  check_all(here.lse.all(), plus.lse.all(), minus.lse.all());
  check_all(here.grad_query.all(), plus.grad_query.all(), minus.grad_query.all());
  check_all(here.grad_key.all(), plus.grad_key.all(), minus.grad_key.all());
  check_all(here.grad_value.all(), plus.grad_value.all(), minus.grad_value.all());
  check_all(here.grad_bias, plus.grad_bias, minus.grad_bias);
  check_all(here.grad_gate, plus.grad_gate, minus.grad_gate);
}

/// For ThreadSanitizer: each kernel once.
void test_races() {
  Random random(10);
  Case base(random, DataType::kFloat32, shape_of(1, 1, 1, {40, 40}, 8, 8),
            {any_of({window(2, 2), window(1, 1, 9)})}, {}, 1, 0);
  base.listing = Listing::kAll;
  for (const int table : {1, 2, 7, 11}) {
    AlongCase a(random, base);
    a.bias = table_number(table, a, random, 0.0);
    a.softcap = 2.0;
    a.dropout_p = 0.2;
    check_case(a);
  }
}

}  // namespace

int main() {
  if (kSmall) {
    test_races();
    return check::report();
  }
  test_reference();
  test_tables();
  test_owned_blocks();
  test_random_cases(20);
  test_passes_slots_and_lists();
  test_evaluated_passes();
  test_rows_without_keys();
  test_all_dropped();
  test_head_sizes();
  return check::report();
}
