// What a call does to its logits and probabilities besides the scale, pair by pair in double: the
// definition that kernels are held to, written without logit.h's arithmetic.
#pragma once

#include <cmath>
#include <cstdint>
#include <string>
#include <vector>

#include "dropout.h"
#include "logit.h"
#include "numbers.h"

namespace attention {

/// (batch, heads, rows, columns) numbers with gaps between them; what has size 1 is shared.
class Table {
 public:
  Table() = default;
  Table(DataType type, TableKind kind, std::int64_t batch, std::int64_t heads, std::int64_t rows,
        std::int64_t columns, std::int64_t block = 1)
      : sizes_{batch, heads, rows, columns} {
    constexpr std::int64_t kGap = 2;
    view_.kind = kind;
    view_.columns = columns;
    view_.block = block;
    view_.column_stride = columns == 1 ? 0 : kGap;
    const std::int64_t row = kGap * columns + kGap, head = row * rows + kGap,
                       example = head * heads;
    view_.row_stride = rows == 1 ? 0 : row;
    view_.head_stride = heads == 1 ? 0 : head;
    view_.batch_stride = batch == 1 ? 0 : example;
    numbers_ = Numbers(type, example * batch);
  }

  template <class Value>
  void fill(Value value) {
    for (std::int64_t b = 0; b < sizes_[0]; ++b) {
      for (std::int64_t h = 0; h < sizes_[1]; ++h) {
        for (std::int64_t r = 0; r < sizes_[2]; ++r) {
          for (std::int64_t c = 0; c < sizes_[3]; ++c) numbers_.set(at(b, h, r, c), value());
        }
      }
    }
  }
  double get(std::int64_t b, std::int64_t h, std::int64_t r, std::int64_t c) const {
    return numbers_.get(at(b, h, r, c));
  }
  void set(std::int64_t b, std::int64_t h, std::int64_t r, std::int64_t c, double x) {
    numbers_.set(at(b, h, r, c), x);
  }
  TableKind kind() const { return view_.kind; }
  std::int64_t block() const { return view_.block; }
  std::int64_t rows() const { return sizes_[2]; }
  std::int64_t columns() const { return sizes_[3]; }
  LogitTable view() {
    LogitTable table = view_;
    if (table.kind != TableKind::kNone) table.data = numbers_.data();
    return table;
  }

 private:
  std::int64_t at(std::int64_t b, std::int64_t h, std::int64_t r, std::int64_t c) const {
    return b * view_.batch_stride + h * view_.head_stride + r * view_.row_stride +
           c * view_.column_stride;
  }
  std::int64_t sizes_[4] = {};
  LogitTable view_;
  Numbers numbers_;
};

/// A logit, its derivative in the scaled product, and what their rounding errors are in proportion
/// to.
struct PairLogit {
  double value, slope;
  double size, slope_size;
};

struct ModifierCase {
  Table bias, gate;
  double softcap = 0.0;
  double dropout_p = 0.0;
  std::int64_t dropout_seed = 0;
  std::vector<SlotWindow> windows;  // of equal groups of heads

  /// The number of a pair, or `missing` where the table has none.
  double number(const Table& table, double missing, std::int64_t heads, std::int64_t b,
                std::int64_t h, std::int64_t i, std::int64_t j, std::int64_t position) const {
    switch (table.kind()) {
      case TableKind::kNone:
        return missing;
      case TableKind::kSlopes:
        return -std::fabs(static_cast<double>(j - position)) * table.get(b, h, 0, 0);
      case TableKind::kBlocks:
        return table.get(b, h, i / table.block(), j / table.block());
      case TableKind::kSlots:
        break;
    }
    const auto groups = static_cast<std::int64_t>(windows.size());
    const SlotWindow& window = windows[static_cast<std::size_t>(h / (heads / groups))];
    for (std::int64_t slot = 0; slot < table.columns(); ++slot) {
      if (j == position + (slot - window.left) * window.dilation)
        return table.get(b, h, table.rows() == 1 ? 0 : i, slot);
    }
    return missing;
  }

  /// From a scaled product with an error in proportion to `size`.
  PairLogit logit(double score, double size, double gate_number, double bias_number) const {
    const double g = std::fabs(gate_number), t = gate_number * score;
    if (softcap == 0.0)
      return {t + bias_number, gate_number, g * size + std::fabs(bias_number), 0.0};
    const double u = std::tanh(t / softcap), cosh = std::cosh(t / softcap);
    const double capped = softcap * u;
    return {capped + bias_number, gate_number / (cosh * cosh),
            g * size + 2.0 * std::fabs(capped) + std::fabs(bias_number),
            g * (4.0 + 2.0 * g * size / softcap)};
  }

  /// What dropout multiplies a probability with. `head` counts batch x heads.
  double keep(std::int64_t head, std::int64_t i, std::int64_t j) const {
    if (dropout_p == 0.0) return 1.0;
    const DropoutRule rule{static_cast<std::uint64_t>(dropout_seed), dropout_threshold(dropout_p)};
    return rule.keeps(head, i, j) ? 1.0 / (1.0 - dropout_p) : 0.0;
  }

  Modifiers view() {
    Modifiers made;
    made.bias = bias.view();
    made.gate = gate.view();
    made.softcap = softcap;
    made.dropout_p = dropout_p;
    made.dropout_seed = &dropout_seed;
    made.window_count = std::max<std::int32_t>(1, static_cast<std::int32_t>(windows.size()));
    std::copy(windows.begin(), windows.end(), made.windows);
    return made;
  }
  std::string to_string() const {
    const auto table = [](const char* name, const Table& t) {
      return t.kind() == TableKind::kNone
                 ? std::string()
                 : ", " + std::string(name) + " of kind " +
                       std::to_string(static_cast<int>(t.kind())) + " with block " +
                       std::to_string(t.block()) + " and " + std::to_string(t.rows()) + " rows";
    };
    return table("bias", bias) + table("gate", gate) +
           (softcap == 0.0 ? "" : ", softcap " + std::to_string(softcap)) +
           (dropout_p == 0.0 ? "" : ", dropout " + std::to_string(dropout_p));
  }
};

}  // namespace attention
