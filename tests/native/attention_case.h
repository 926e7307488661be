// One call of the kernels: random tensors in any layout, the run itself, and a naive reference in
// double with a bound of its own on the rounding error of every element.
#pragma once

#include <cmath>
#include <cstdint>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

#include "check.h"
#include "cpu/kernels.h"
#include "modifier_case.h"
#include "patterns/union.h"
#include "plan/partition.h"
#include "plan/plan.h"
#include "random_patterns.h"

namespace attention {

enum class Layout { kHeadsFirst, kTokensFirst, kPaddedRows };

/// A (batch, heads, length, size) tensor, with gaps between its rows in one of the layouts.
class Tensor {
 public:
  Tensor() = default;
  Tensor(DataType type, Layout layout, std::int64_t batch, std::int64_t heads, std::int64_t length,
         std::int64_t size)
      : batch_(batch), heads_(heads), length_(length), size_(size) {
    const std::int64_t row = layout == Layout::kPaddedRows ? size + 3 : size;
    const bool tokens_first = layout == Layout::kTokensFirst;
    row_stride_ = tokens_first ? heads * row : row;
    head_stride_ = tokens_first ? row : length * row;
    batch_stride_ = heads * length * row;
    numbers_ = Numbers(type, at(batch - 1, heads - 1, length - 1, size));
  }

  std::int64_t at(std::int64_t b, std::int64_t h, std::int64_t i, std::int64_t c) const {
    return b * batch_stride_ + h * head_stride_ + i * row_stride_ + c;
  }
  double get(std::int64_t b, std::int64_t h, std::int64_t i, std::int64_t c) const {
    return numbers_.get(at(b, h, i, c));
  }
  void set(std::int64_t b, std::int64_t h, std::int64_t i, std::int64_t c, double x) {
    numbers_.set(at(b, h, i, c), x);
  }
  template <class Visit>
  void for_each(Visit visit) const {
    for (std::int64_t b = 0; b < batch_; ++b) {
      for (std::int64_t h = 0; h < heads_; ++h) {
        for (std::int64_t i = 0; i < length_; ++i) {
          for (std::int64_t c = 0; c < size_; ++c) visit(b, h, i, c);
        }
      }
    }
  }
  template <class Value>
  void fill(Value value) {
    for_each([&](auto b, auto h, auto i, auto c) { set(b, h, i, c, value()); });
  }
  /// Nothing was written between the rows.
  bool gaps_untouched() const {
    std::vector<char> element(numbers_.bytes().size());
    for_each([&](auto b, auto h, auto i, auto c) { element[index(at(b, h, i, c))] = 1; });
    const std::int64_t end = at(batch_ - 1, heads_ - 1, length_ - 1, size_);
    for (std::int64_t i = 0; i < end; ++i) {
      if (!element[index(i)] && !numbers_.untouched(i)) return false;
    }
    return true;
  }
  TensorView view() { return {numbers_.data(), batch_stride_, head_stride_, row_stride_}; }
  const std::vector<char>& bytes() const { return numbers_.bytes(); }

 private:
  std::int64_t batch_ = 0, heads_ = 0, length_ = 0, size_ = 0;
  std::int64_t batch_stride_ = 0, head_stride_ = 0, row_stride_ = 0;
  Numbers numbers_;
};

/// Exactly the bytes that were asked for, all of them NaN, between red zones.
class Workspace {
 public:
  explicit Workspace(std::int64_t size) : size_(index(size)), block_(size_ + 3 * kZone, '\xff') {
    const auto address = reinterpret_cast<std::uintptr_t>(block_.data());
    begin_ = block_.data() + kZone + (kZone - address % kZone) % kZone;
#if defined(__SANITIZE_ADDRESS__)
    ASAN_POISON_MEMORY_REGION(begin_ - kZone, kZone);
    ASAN_POISON_MEMORY_REGION(begin_ + size_, kZone);
#endif
  }
  ~Workspace() {
#if defined(__SANITIZE_ADDRESS__)
    ASAN_UNPOISON_MEMORY_REGION(block_.data(), block_.size());
#endif
    for (const char* zone : {begin_ - kZone, begin_ + size_}) {
      CHECK(std::all_of(zone, zone + kZone, [](char c) { return c == '\xff'; }));
    }
  }
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;
  void* data() { return begin_; }

 private:
  static constexpr std::size_t kZone = 64;
  std::size_t size_;
  std::vector<char> block_;
  char* begin_;
};

inline void run_threads(int threads, void (*body)(void*, int), void* context) {
  std::vector<std::thread> others;
  for (int t = 1; t < threads; ++t) others.emplace_back(body, context, t);
  body(context, 0);
  for (std::thread& thread : others) thread.join();
}

struct Shape {
  std::int64_t batch = 1;
  std::int64_t heads_kv = 1;
  std::int64_t group = 1;  // query heads for each key head
  Sizes sizes;
  std::int64_t head_dim = 8;
  std::int64_t value_dim = 8;
  Layout layout = Layout::kHeadsFirst;

  std::int64_t heads() const { return heads_kv * group; }
};

/// How much larger than float32's (or float64's) the errors of the products are, where they are
/// rounded further: those of logits, and those of P and dS before they are multiplied.
struct Precision {
  static constexpr double kUnit = 8 * 0x1p-24;  // what the bounds are made of
  double logits = 1.0;
  double probabilities = 0.0;
};

/// Of products that read P and dS rounded to a half type.
inline Precision half_products(DataType type) {
  return {1.0, (type == DataType::kBFloat16 ? 0x1p-8 : 0x1p-11) / Precision::kUnit};
}

/// The inputs of forward and backward.
struct Case {
  DataType type;
  Shape shape;
  double scale;
  std::vector<Expression> patterns;  // one, or one for each head
  TileShape tile;
  int chunks;
  Listing listing = Listing::kUnique;
  Precision precision;
  Tensor query, key, value, grad_output;
  std::vector<std::uint8_t> padding;  // empty = none
  Numbers grad_lse;                   // empty = none
  ModifierCase modifiers;
  bool left_to_programs = false;  // on a GPU: all pairs, as if the plan could not know any

  Case(Random& random, DataType type_, Shape shape_, std::vector<Expression> patterns_,
       TileShape tile_ = {}, int chunks_ = 1, int padded_percent = 40)
      : type(type_),
        shape(shape_),
        scale(1.0 / std::sqrt(static_cast<double>(shape_.head_dim))),
        patterns(std::move(patterns_)),
        tile(tile_),
        chunks(chunks_) {
    const auto [n_q, n_k] = shape.sizes;
    const auto tensor = [&](std::int64_t heads, std::int64_t length, std::int64_t size) {
      Tensor made(type, shape.layout, shape.batch, heads, length, size);
      made.fill([&] { return 2.0 * random.real(); });
      return made;
    };
    query = tensor(shape.heads(), n_q, shape.head_dim);
    key = tensor(shape.heads_kv, n_k, shape.head_dim);
    value = tensor(shape.heads_kv, n_k, shape.value_dim);
    grad_output = tensor(shape.heads(), n_q, shape.value_dim);
    if (random.chance(padded_percent)) {
      for (std::int64_t i = 0; i < shape.batch * n_k; ++i) padding.push_back(random.chance(30));
    }
    if (random.chance(50)) {
      const std::int64_t count = shape.batch * shape.heads() * n_q;
      grad_lse = Numbers(real_type(type), count);
      for (std::int64_t i = 0; i < count; ++i) grad_lse.set(i, random.real());
    }
    spoil_unused_rows();
  }

  /// Padded keys, and queries that see no key, count as zero whatever they hold: here NaN.
  void spoil_unused_rows() {
    const auto spoil = [](Tensor& tensor, std::int64_t b, std::int64_t h, std::int64_t i,
                          std::int64_t size) {
      for (std::int64_t c = 0; c < size; ++c) tensor.set(b, h, i, c, std::nan(""));
    };
    for (std::int64_t b = 0; b < shape.batch; ++b) {
      for (std::int64_t h = 0; h < shape.heads_kv; ++h) {
        for (std::int64_t j = 0; j < shape.sizes.n_k; ++j) {
          if (!is_padded(b, j)) continue;
          spoil(key, b, h, j, shape.head_dim);
          spoil(value, b, h, j, shape.value_dim);
        }
      }
      for (std::int64_t h = 0; h < shape.heads(); ++h) {
        const std::vector<char> pairs = dense(pattern(h), shape.sizes);
        for (std::int64_t i = 0; i < shape.sizes.n_q; ++i) {
          bool any = false;
          for (std::int64_t j = 0; j < shape.sizes.n_k; ++j)
            any = any || sees_key(pairs, b, h, i, j);
          if (any) continue;
          spoil(query, b, h, i, shape.head_dim);
          spoil(grad_output, b, h, i, shape.value_dim);
          if (!grad_lse.bytes().empty()) grad_lse.set(lse_at(b, h, i), std::nan(""));
        }
      }
    }
  }

  const Expression& pattern(std::int64_t head) const {
    return patterns[patterns.size() == 1 ? 0 : index(head)];
  }
  bool is_padded(std::int64_t b, std::int64_t j) const {
    return !padding.empty() && padding[index(b * shape.sizes.n_k + j)];
  }
  /// Neither pattern, padding nor a bias of -inf leaves the pair out.
  bool sees_key(const std::vector<char>& pairs, std::int64_t b, std::int64_t h, std::int64_t i,
                std::int64_t j) const {
    return pairs[index(i * shape.sizes.n_k + j)] && !is_padded(b, j) &&
           number(modifiers.bias, 0.0, b, h, i, j) != -static_cast<double>(INFINITY);
  }
  double number(const Table& table, double missing, std::int64_t b, std::int64_t h, std::int64_t i,
                std::int64_t j) const {
    return modifiers.number(table, missing, shape.heads(), b, h, i, j,
                            i + shape.sizes.n_k - shape.sizes.n_q);
  }
  double keep(std::int64_t b, std::int64_t h, std::int64_t i, std::int64_t j) const {
    return modifiers.keep(b * shape.heads() + h, i, j);
  }
  std::int64_t lse_at(std::int64_t b, std::int64_t h, std::int64_t i) const {
    return (b * shape.heads() + h) * shape.sizes.n_q + i;
  }
  std::string to_string() const {
    return "type " + std::to_string(static_cast<int>(type)) + ", (" + std::to_string(shape.batch) +
           ", " + std::to_string(shape.heads()) + "/" + std::to_string(shape.heads_kv) + ", " +
           std::to_string(shape.head_dim) + "/" + std::to_string(shape.value_dim) + "), layout " +
           std::to_string(static_cast<int>(shape.layout)) + ", " + std::to_string(chunks) +
           " chunks in tiles of " + std::to_string(tile.rows) + " x " + std::to_string(tile.keys) +
           (padding.empty() ? "" : ", padded") + (listing == Listing::kAll ? ", listed" : "") +
           (left_to_programs ? ", left to programs" : "") + modifiers.to_string() + ", pattern " +
           ::to_string(patterns[0], shape.sizes);
  }
};

struct Results {
  Tensor output, grad_query, grad_key, grad_value;
  Numbers lse;

  explicit Results(const Case& c) {
    const auto tensor = [&](std::int64_t heads, std::int64_t length, std::int64_t size) {
      return Tensor(c.type, c.shape.layout, c.shape.batch, heads, length, size);
    };
    const auto [n_q, n_k] = c.shape.sizes;
    output = tensor(c.shape.heads(), n_q, c.shape.value_dim);
    grad_query = tensor(c.shape.heads(), n_q, c.shape.head_dim);
    grad_key = tensor(c.shape.heads_kv, n_k, c.shape.head_dim);
    grad_value = tensor(c.shape.heads_kv, n_k, c.shape.value_dim);
    grad_key.fill([] { return 0.0; });
    grad_value.fill([] { return 0.0; });
    lse = Numbers(real_type(c.type), c.shape.batch * c.shape.heads() * n_q);
  }
  bool operator==(const Results& other) const {
    return output.bytes() == other.output.bytes() && lse.bytes() == other.lse.bytes() &&
           grad_query.bytes() == other.grad_query.bytes() &&
           grad_key.bytes() == other.grad_key.bytes() &&
           grad_value.bytes() == other.grad_value.bytes();
  }
};

/// Plans of all heads, and the pointers to them that the kernels take.
class Plans {
 public:
  Plans(const Case& c, Direction direction) {
    std::vector<std::shared_ptr<const Schedule>> of_pattern;
    for (const Expression& pattern : c.patterns) {
      auto plan = std::make_shared<const Plan>(
          build_plan(expand(pattern, c.shape.sizes), c.shape.sizes, c.tile, c.listing));
      of_pattern.push_back(std::make_shared<const Schedule>(std::move(plan), direction, c.chunks));
    }
    for (std::int64_t i = 0; i < c.shape.batch * c.shape.heads(); ++i) {
      const std::int64_t head = i % c.shape.heads();
      schedules_.push_back(of_pattern[c.patterns.size() == 1 ? 0 : index(head)]);
      views_.push_back(&schedules_.back()->view());
    }
  }
  const PlanView* const* views() const { return views_.data(); }

 private:
  std::vector<std::shared_ptr<const Schedule>> schedules_;
  std::vector<const PlanView*> views_;
};

/// Sizes and inputs.
inline AttentionParams params_of(Case& c) {
  AttentionParams params;
  params.dtype = c.type;
  params.batch = c.shape.batch;
  params.heads = c.shape.heads();
  params.heads_kv = c.shape.heads_kv;
  params.n_q = c.shape.sizes.n_q;
  params.n_k = c.shape.sizes.n_k;
  params.head_dim = c.shape.head_dim;
  params.value_dim = c.shape.value_dim;
  params.scale = c.scale;
  params.query = c.query.view();
  params.key = c.key.view();
  params.value = c.value.view();
  params.key_padding = c.padding.empty() ? nullptr : c.padding.data();
  params.modifiers = c.modifiers.view();
  return params;
}

/// Forward, then backward on what forward gave.
inline Results run(const cpu::Kernels& kernels, Case& c, int threads) {
  Results results(c);
  const Plans forward(c, Direction::kForward), backward(c, Direction::kBackward);
  AttentionParams params = params_of(c);
  params.output = results.output.view();
  params.lse = results.lse.data();
  params.plans = forward.views();
  const Parallel parallel{threads, run_threads};
  {
    Workspace workspace(kernels.forward.workspace(params, threads));
    params.workspace = workspace.data();
    kernels.forward.run(params, parallel);
  }
  params.plans = backward.views();
  params.grad_output = c.grad_output.view();
  params.grad_lse = c.grad_lse.bytes().empty() ? nullptr : c.grad_lse.data();
  params.grad_query = results.grad_query.view();
  params.grad_key = results.grad_key.view();
  params.grad_value = results.grad_value.view();
  Workspace workspace(kernels.backward.workspace(params, threads));
  params.workspace = workspace.data();
  kernels.backward.run(params, parallel);
  return results;
}

/// A sum in double, and the sum of what its terms are large by: rounding errors are in proportion
/// to the second.
struct Sum {
  double value = 0.0;
  double size = 0.0;
  void add(double x, double relative_error = 1.0) {
    value += x;
    size += std::fabs(x) * relative_error;
  }
  void add_sized(double x, double magnitude) {
    value += x;
    size += magnitude;
  }
};

/// Checks that `got` is `expected` up to some roundings of the arithmetic, one of the storage type,
/// and probabilities below the normal numbers, which are flushed to zero.
inline void check_near(const char* what, double got, const Sum& expected, DataType type) {
  constexpr double kRoundings = 8.0;
  const bool is_double = type == DataType::kFloat64;
  double bound = kRoundings * (is_double ? 0x1p-53 : 0x1p-24) * expected.size;
  bound += is_double ? 1e-300 : 1e-30;
  if (size_of(type) == 2) bound += 0.5 * half_format(type).unit(std::fabs(expected.value) + bound);
  if (!check::count(std::fabs(got - expected.value) <= bound) && check::loud()) {
    check::fail(__FILE__, __LINE__) << "expected " << what << " within " << bound << " of "
                                    << expected.value << ", got " << got << "\n";
  }
}

inline Sum dot(const Tensor& a, const Tensor& b, std::int64_t batch, std::int64_t head_a,
               std::int64_t i, std::int64_t head_b, std::int64_t j, std::int64_t size) {
  Sum sum;
  for (std::int64_t c = 0; c < size; ++c)
    sum.add(a.get(batch, head_a, i, c) * b.get(batch, head_b, j, c));
  return sum;
}

/// Of a pair that is seen.
inline PairLogit logit_of_pair(const Case& c, std::int64_t b, std::int64_t h, std::int64_t i,
                               std::int64_t j) {
  const Sum product = dot(c.query, c.key, b, h, i, h / c.shape.group, j, c.shape.head_dim);
  return c.modifiers.logit(
      c.scale * product.value, std::fabs(c.scale) * product.size * c.precision.logits,
      c.number(c.modifiers.gate, 1.0, b, h, i, j), c.number(c.modifiers.bias, 0.0, b, h, i, j));
}

/// The definition of forward, a row at a time.
inline void check_forward(const Case& c, const Results& results) {
  const Shape& s = c.shape;
  const auto [n_q, n_k] = s.sizes;
  for (std::int64_t h = 0; h < s.heads(); ++h) {
    const std::vector<char> pairs = dense(c.pattern(h), s.sizes);
    for (std::int64_t b = 0; b < s.batch; ++b) {
      for (std::int64_t i = 0; i < n_q; ++i) {
        std::vector<std::int64_t> keys;
        std::vector<double> logits;
        double top = -static_cast<double>(INFINITY), error = 1.0, total = 0.0;
        for (std::int64_t j = 0; j < n_k; ++j) {
          if (!c.sees_key(pairs, b, h, i, j)) continue;
          const PairLogit logit = logit_of_pair(c, b, h, i, j);
          keys.push_back(j);
          logits.push_back(logit.value);
          top = std::max(top, logits.back());
          error = std::max(error, 1.0 + 2.0 * logit.size);
        }
        for (const double logit : logits) total += std::exp(logit - top);
        const double lse = results.lse.get(c.lse_at(b, h, i));
        if (keys.empty()) {
          CHECK_EQUAL(lse, -static_cast<double>(INFINITY));
        } else {
          const double expected = top + std::log(total);
          check_near("log-sum-exp", lse, {expected, error + std::fabs(expected)},
                     real_type(c.type));
        }
        for (std::int64_t v = 0; v < s.value_dim; ++v) {
          Sum expected;
          for (std::size_t k = 0; k < keys.size(); ++k) {
            expected.add(std::exp(logits[k] - top) / total * c.keep(b, h, i, keys[k]) *
                             c.value.get(b, h / s.group, keys[k], v),
                         error + c.precision.probabilities);
          }
          const double got = results.output.get(b, h, i, v);
          if (keys.empty()) CHECK_EQUAL(got, 0.0);
          check_near("output", got, expected, c.type);
        }
      }
    }
  }
}

/// The definition of backward for the output and log-sum-exp that forward gave.
inline void check_backward(const Case& c, const Results& results) {
  const Shape& s = c.shape;
  const auto [n_q, n_k] = s.sizes;
  for (std::int64_t b = 0; b < s.batch; ++b) {
    for (std::int64_t kv = 0; kv < s.heads_kv; ++kv) {
      std::vector<Sum> grad_key(index(n_k * s.head_dim)), grad_value(index(n_k * s.value_dim));
      for (std::int64_t h = kv * s.group; h < (kv + 1) * s.group; ++h) {
        const std::vector<char> pairs = dense(c.pattern(h), s.sizes);
        for (std::int64_t i = 0; i < n_q; ++i) {
          const double lse = results.lse.get(c.lse_at(b, h, i));
          Sum delta = dot(c.grad_output, results.output, b, h, i, h, i, s.value_dim);
          if (!c.grad_lse.bytes().empty()) delta.add(-c.grad_lse.get(c.lse_at(b, h, i)));
          std::vector<Sum> grad_query(index(s.head_dim));
          for (std::int64_t j = 0; j < n_k; ++j) {
            if (!c.sees_key(pairs, b, h, i, j)) continue;
            const PairLogit logit = logit_of_pair(c, b, h, i, j);
            const double p = std::exp(logit.value - lse), keep = c.keep(b, h, i, j);
            const double error =
                1.0 + 2.0 * (logit.size + std::fabs(lse)) + c.precision.probabilities;
            const Sum dp = dot(c.grad_output, c.value, b, h, i, kv, j, s.value_dim);
            const double ds = p * (keep * dp.value - delta.value) * logit.slope * c.scale;
            const double ds_size = p * (keep * dp.size * c.precision.logits + delta.size) *
                                   std::fabs(c.scale) *
                                   (std::fabs(logit.slope) * error + logit.slope_size);
            for (std::int64_t d = 0; d < s.head_dim; ++d) {
              const double q = c.query.get(b, h, i, d), k = c.key.get(b, kv, j, d);
              grad_query[index(d)].add_sized(ds * k, ds_size * std::fabs(k));
              grad_key[index(j * s.head_dim + d)].add_sized(ds * q, ds_size * std::fabs(q));
            }
            for (std::int64_t v = 0; v < s.value_dim; ++v) {
              grad_value[index(j * s.value_dim + v)].add(p * keep * c.grad_output.get(b, h, i, v),
                                                         error);
            }
          }
          for (std::int64_t d = 0; d < s.head_dim; ++d)
            check_near("grad_query", results.grad_query.get(b, h, i, d), grad_query[index(d)],
                       c.type);
        }
      }
      for (std::int64_t j = 0; j < n_k; ++j) {
        for (std::int64_t d = 0; d < s.head_dim; ++d) {
          check_near("grad_key", results.grad_key.get(b, kv, j, d),
                     grad_key[index(j * s.head_dim + d)], c.type);
        }
        for (std::int64_t v = 0; v < s.value_dim; ++v) {
          check_near("grad_value", results.grad_value.get(b, kv, j, v),
                     grad_value[index(j * s.value_dim + v)], c.type);
        }
      }
    }
  }
}

}  // namespace attention
