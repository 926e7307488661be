// A call with tables, soft cap and dropout, a tangent of all inputs, and a naive reference of what
// follows by differentiation: the definition in numbers that carry their derivative.
#pragma once

#include <cmath>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "attention_case.h"
#include "dropout.h"

namespace attention {

/// A number and its derivative along the tangent.
struct Dual {
  double value = 0.0;
  double dot = 0.0;
};
inline Dual operator+(Dual a, Dual b) { return {a.value + b.value, a.dot + b.dot}; }
inline Dual operator-(Dual a, Dual b) { return {a.value - b.value, a.dot - b.dot}; }
inline Dual operator*(Dual a, Dual b) {
  return {a.value * b.value, a.dot * b.value + a.value * b.dot};
}
inline Dual operator*(double a, Dual b) { return {a * b.value, a * b.dot}; }
inline Dual& operator+=(Dual& a, Dual b) { return a = a + b; }
inline Dual exponential(Dual x) { return {std::exp(x.value), std::exp(x.value) * x.dot}; }
inline Dual logarithm(Dual x) { return {std::log(x.value), x.dot / x.value}; }
inline Dual tangent_of(Dual x) {
  const double t = std::tanh(x.value);
  return {t, (1.0 - t * t) * x.dot};
}

/// A table and its tangent, (batch or 1, heads or 1, rows, columns).
class TableCase {
 public:
  TableCase() = default;
  TableCase(DataType type, TableKind kind, std::vector<std::int64_t> sizes, std::int64_t block)
      : kind_(kind), sizes_(std::move(sizes)), block_(block) {
    for (Numbers* numbers : {&values, &dots, &gradient}) {
      *numbers = Numbers(real_type(type), count());
      for (std::int64_t i = 0; i < count(); ++i) numbers->set(i, 0.0);
    }
  }
  bool any() const { return kind_ != TableKind::kNone; }
  std::int64_t count() const { return sizes_[0] * sizes_[1] * sizes_[2] * sizes_[3]; }
  LogitTable view(Numbers& numbers) const {
    if (!any()) return {};
    const auto stride = [&](int dim) {
      std::int64_t product = 1;
      for (std::size_t i = index(dim) + 1; i < sizes_.size(); ++i) product *= sizes_[i];
      return sizes_[index(dim)] == 1 ? 0 : product;
    };
    LogitTable table;
    table.kind = kind_;
    table.data = numbers.data();
    table.batch_stride = stride(0);
    table.head_stride = stride(1);
    table.row_stride = stride(2);
    table.column_stride = stride(3);
    table.columns = sizes_[3];
    table.block = block_;
    return table;
  }

  /// The number of a pair's entry, or -1: the documented meaning.
  std::int64_t entry(std::int64_t b, std::int64_t h, std::int64_t i, std::int64_t j,
                     std::int64_t position, const SlotWindow& window) const {
    std::int64_t row = 0, column = 0;
    if (kind_ == TableKind::kSlots) {
      row = sizes_[2] == 1 ? 0 : i;
      column = -1;
      for (std::int64_t m = 0; m < sizes_[3]; ++m) {
        if (j - position == (m - window.left) * window.dilation) column = m;
      }
      if (column < 0) return -1;
    }
    if (kind_ == TableKind::kBlocks) {
      row = i / block_;
      column = j / block_;
    }
    const std::int64_t first = (b % sizes_[0]) * sizes_[1] + h % sizes_[1];
    return (first * sizes_[2] + row) * sizes_[3] + column;
  }
  double factor(std::int64_t j, std::int64_t position) const {
    return kind_ == TableKind::kSlopes ? -std::fabs(static_cast<double>(j - position)) : 1.0;
  }
  Dual number(std::int64_t entry, double otherwise) const {
    return entry < 0 ? Dual{otherwise, 0.0} : Dual{values.get(entry), dots.get(entry)};
  }

  Numbers values, dots, gradient;

 private:
  TableKind kind_ = TableKind::kNone;
  std::vector<std::int64_t> sizes_;
  std::int64_t block_ = 1;
};

/// A case with what changes its logits and probabilities, and tangents.
struct AlongCase {
  Case base;
  TableCase bias, gate;
  double softcap = 0.0, dropout_p = 0.0;
  std::int64_t seed = 77;
  std::vector<SlotWindow> windows{{3, 1}};
  Tensor query_dot, key_dot, value_dot;
  std::vector<std::vector<char>> allowed;  // of each of batch x heads: all pairs, without padding

  AlongCase(Random& random, Case given) : base(std::move(given)) {
    const Shape& s = base.shape;
    const auto tangent = [&](const Tensor& of, std::int64_t heads, std::int64_t length,
                             std::int64_t size) {
      Tensor made(base.type, s.layout, s.batch, heads, length, size);
      of.for_each([&](auto b, auto h, auto i, auto c) {
        const bool unused = std::isnan(of.get(b, h, i, c));
        made.set(b, h, i, c, unused ? std::nan("") : random.real());
      });
      return made;
    };
    query_dot = tangent(base.query, s.heads(), s.sizes.n_q, s.head_dim);
    key_dot = tangent(base.key, s.heads_kv, s.sizes.n_k, s.head_dim);
    value_dot = tangent(base.value, s.heads_kv, s.sizes.n_k, s.value_dim);
    for (std::int64_t i = 0; i < s.batch * s.heads(); ++i)
      allowed.push_back(dense(base.pattern(i % s.heads()), s.sizes));
  }

  TableCase table(Random& random, TableKind kind, std::vector<std::int64_t> sizes,
                  std::int64_t block, double middle) const {
    TableCase made(base.type, kind, std::move(sizes), block);
    const double size = kind == TableKind::kSlopes ? 0.02 : 0.7;
    for (std::int64_t i = 0; i < made.count(); ++i) {
      made.values.set(i, middle + size * random.real());
      made.dots.set(i, size * random.real());
    }
    return made;
  }
  const SlotWindow& window(std::int64_t head) const {
    return windows[index(head * static_cast<std::int64_t>(windows.size()) / base.shape.heads())];
  }
  bool sees(std::int64_t b, std::int64_t h, std::int64_t i, std::int64_t j) const {
    return base.sees_key(allowed[index(b * base.shape.heads() + h)], b, h, i, j);
  }

  void put_into(AttentionParams& params) {
    params.modifiers.bias = bias.view(bias.values);
    params.modifiers.gate = gate.view(gate.values);
    params.modifiers.softcap = softcap;
    params.modifiers.dropout_p = dropout_p;
    params.modifiers.dropout_seed = &seed;
    std::copy(windows.begin(), windows.end(), params.modifiers.windows);
    params.modifiers.window_count = static_cast<std::int32_t>(windows.size());
  }
  void put_tangents_into(AttentionParams& params) {
    params.query_tangent = query_dot.view();
    params.key_tangent = key_dot.view();
    params.value_tangent = value_dot.view();
    params.bias_tangent = bias.view(bias.dots);
    params.gate_tangent = gate.view(gate.dots);
  }
};

/// Numbers of a (batch, heads, length, size) tensor.
class DualTensor {
 public:
  DualTensor(std::int64_t batch, std::int64_t heads, std::int64_t length, std::int64_t size)
      : heads_(heads), length_(length), size_(size), all_(index(batch * heads * length * size)) {}
  Dual& at(std::int64_t b, std::int64_t h, std::int64_t i, std::int64_t c) {
    return all_[index(((b * heads_ + h) * length_ + i) * size_ + c)];
  }
  std::vector<Dual>& all() { return all_; }

 private:
  std::int64_t heads_, length_, size_;
  std::vector<Dual> all_;
};

/// The definition of forward and backward.
class DualReference {
 public:
  DualTensor output, lse, grad_query, grad_key, grad_value;
  std::vector<Dual> grad_bias, grad_gate;
  std::vector<double> bias_sizes, gate_sizes;  // what the terms of each are large by

  explicit DualReference(AlongCase& along)
      : output(tensor(along, true, along.base.shape.value_dim)),
        lse(tensor(along, true, 1)),
        grad_query(tensor(along, true, along.base.shape.head_dim)),
        grad_key(tensor(along, false, along.base.shape.head_dim)),
        grad_value(tensor(along, false, along.base.shape.value_dim)),
        grad_bias(along.bias.any() ? index(along.bias.count()) : 0),
        grad_gate(along.gate.any() ? index(along.gate.count()) : 0),
        bias_sizes(grad_bias.size()),
        gate_sizes(grad_gate.size()),
        a_(along),
        c_(along.base) {}

  void forward() {
    for_each_row([&](std::int64_t b, std::int64_t h, std::int64_t i) {
      const std::vector<Pair> pairs = pairs_of(b, h, i);
      double top = -static_cast<double>(INFINITY);
      for (const Pair& pair : pairs) top = std::max(top, pair.logit.value);
      Dual total;
      for (const Pair& pair : pairs) total += exponential(pair.logit - Dual{top, 0.0});
      lse.at(b, h, i, 0) = pairs.empty() ? Dual{top, 0.0} : logarithm(total) + Dual{top, 0.0};
      for (const Pair& pair : pairs) {
        const Dual p = pair.kept * exponential(pair.logit - lse.at(b, h, i, 0));
        for (std::int64_t v = 0; v < c_.shape.value_dim; ++v)
          output.at(b, h, i, v) += p * value(b, h, pair.key, v);
      }
    });
  }

  /// For the output that forward gave, or what storage made of it.
  void backward() {
    for_each_row([&](std::int64_t b, std::int64_t h, std::int64_t i) {
      Dual delta;
      if (!c_.grad_lse.bytes().empty()) delta.value = -c_.grad_lse.get(c_.lse_at(b, h, i));
      for (std::int64_t v = 0; v < c_.shape.value_dim; ++v)
        delta += c_.grad_output.get(b, h, i, v) * output.at(b, h, i, v);
      for (const Pair& pair : pairs_of(b, h, i)) add_pair(b, h, i, pair, delta);
    });
  }

 private:
  struct Pair {
    std::int64_t key;
    Dual logit, by_score, by_gate;
    double kept;
    std::int64_t bias, gate;  // entries
  };

  static DualTensor tensor(const AlongCase& a, bool of_queries, std::int64_t size) {
    const Shape& s = a.base.shape;
    if (of_queries) return {s.batch, s.heads(), s.sizes.n_q, size};
    return {s.batch, s.heads_kv, s.sizes.n_k, size};
  }

  template <class Visit>
  void for_each_row(Visit visit) const {
    for (std::int64_t b = 0; b < c_.shape.batch; ++b) {
      for (std::int64_t h = 0; h < c_.shape.heads(); ++h) {
        for (std::int64_t i = 0; i < c_.shape.sizes.n_q; ++i) visit(b, h, i);
      }
    }
  }

  Dual query(std::int64_t b, std::int64_t h, std::int64_t i, std::int64_t d) const {
    return {c_.query.get(b, h, i, d), a_.query_dot.get(b, h, i, d)};
  }
  Dual key(std::int64_t b, std::int64_t h, std::int64_t j, std::int64_t d) const {
    const std::int64_t kv = h / c_.shape.group;
    return {c_.key.get(b, kv, j, d), a_.key_dot.get(b, kv, j, d)};
  }
  Dual value(std::int64_t b, std::int64_t h, std::int64_t j, std::int64_t v) const {
    const std::int64_t kv = h / c_.shape.group;
    return {c_.value.get(b, kv, j, v), a_.value_dot.get(b, kv, j, v)};
  }

  /// Without those that a bias of -inf excludes.
  std::vector<Pair> pairs_of(std::int64_t b, std::int64_t h, std::int64_t i) const {
    std::vector<Pair> pairs;
    const auto [n_q, n_k] = c_.shape.sizes;
    const std::int64_t position = i + n_k - n_q;
    const DropoutRule rule{static_cast<std::uint64_t>(a_.seed), dropout_threshold(a_.dropout_p)};
    for (std::int64_t j = 0; j < n_k; ++j) {
      if (!a_.sees(b, h, i, j)) continue;
      const auto entry = [&](const TableCase& table) {
        return table.any() ? table.entry(b, h, i, j, position, a_.window(h)) : -1;
      };
      Pair pair{j, {}, {}, {}, 1.0, entry(a_.bias), entry(a_.gate)};
      const Dual bias = a_.bias.factor(j, position) * a_.bias.number(pair.bias, 0.0);
      if (std::isinf(bias.value)) continue;
      if (a_.dropout_p > 0.0) {
        const bool keeps = rule.keeps(b * c_.shape.heads() + h, i, j);
        pair.kept = keeps ? 1.0 / (1.0 - a_.dropout_p) : 0.0;
      }
      shape_logit(pair, score(b, h, i, j), a_.gate.number(pair.gate, 1.0));
      pair.logit += bias;
      pairs.push_back(pair);
    }
    return pairs;
  }

  Dual score(std::int64_t b, std::int64_t h, std::int64_t i, std::int64_t j) const {
    Dual sum;
    for (std::int64_t d = 0; d < c_.shape.head_dim; ++d) sum += query(b, h, i, d) * key(b, h, j, d);
    return c_.scale * sum;
  }

  void shape_logit(Pair& pair, Dual z, Dual g) const {
    Dual slope{1.0, 0.0};
    pair.logit = g * z;
    if (a_.softcap != 0.0) {
      const Dual t = tangent_of(1.0 / a_.softcap * (g * z));
      pair.logit = a_.softcap * t;
      slope = slope - t * t;
    }
    pair.by_score = g * slope;
    pair.by_gate = z * slope;
  }

  void add_pair(std::int64_t b, std::int64_t h, std::int64_t i, const Pair& pair, Dual delta) {
    const std::int64_t j = pair.key, kv = h / c_.shape.group;
    const Dual p = exponential(pair.logit - lse.at(b, h, i, 0));
    Dual dp;
    for (std::int64_t v = 0; v < c_.shape.value_dim; ++v) {
      const double of_output = c_.grad_output.get(b, h, i, v);
      dp += of_output * value(b, h, j, v);
      grad_value.at(b, kv, j, v) += pair.kept * of_output * p;
    }
    const Dual of_logit = p * (pair.kept * dp - delta);
    const Dual of_score = c_.scale * (of_logit * pair.by_score);
    for (std::int64_t d = 0; d < c_.shape.head_dim; ++d) {
      grad_query.at(b, h, i, d) += of_score * key(b, h, j, d);
      grad_key.at(b, kv, j, d) += of_score * query(b, h, i, d);
    }
    const auto add = [](std::vector<Dual>& sums, std::vector<double>& sizes, std::int64_t entry,
                        Dual x) {
      if (entry < 0) return;
      sums[index(entry)] += x;
      sizes[index(entry)] += std::fabs(x.value) + std::fabs(x.dot);
    };
    const double factor = a_.bias.factor(j, i + c_.shape.sizes.offset());
    add(grad_bias, bias_sizes, pair.bias, factor * of_logit);
    add(grad_gate, gate_sizes, pair.gate, of_logit * pair.by_gate);
  }

  AlongCase& a_;
  const Case& c_;
};

}  // namespace attention
