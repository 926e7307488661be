// Random tables, soft caps and dropout for a case.
#pragma once

#include "attention_case.h"

namespace attention {

/// What a test asks for; the rest is drawn.
struct ModifierKinds {
  TableKind bias = TableKind::kNone;
  TableKind gate = TableKind::kNone;
  std::int64_t block = 1;   // of kBlocks
  bool of_queries = false;  // kSlots: a row for each
  double softcap = 0.0;
  double dropout_p = 0.0;
};

class RandomModifiers {
 public:
  RandomModifiers(Random& random, const Case& c)
      : random_(random), shape_(c.shape), type_(real_type(c.type)) {}

  ModifierCase draw(const ModifierKinds& kinds) {
    ModifierCase made;
    made.windows = windows();
    made.bias = table(kinds.bias, kinds);
    made.gate = table(kinds.gate, kinds);
    made.softcap = kinds.softcap;
    made.dropout_p = kinds.dropout_p;
    made.dropout_seed = static_cast<std::int64_t>(random_.word());
    const bool slopes = kinds.bias == TableKind::kSlopes;
    const int out = slopes ? 0 : random_.pick<int>({0, 10, 60});
    made.bias.fill([&] {
      if (random_.chance(out)) return -static_cast<double>(INFINITY);
      return (slopes ? 0.1 : 1.0) * random_.real();
    });
    made.gate.fill([&] { return random_.chance(15) ? 0.0 : 1.5 * random_.real(); });
    return made;
  }

 private:
  /// All of one length.
  std::vector<SlotWindow> windows() {
    std::vector<SlotWindow> made(index(random_.chance(50) ? 1 : shape_.heads()));
    for (SlotWindow& window : made)
      window = {random_.between(0, kSlots - 1), random_.between(1, 3)};
    return made;
  }
  Table table(TableKind kind, const ModifierKinds& kinds) {
    const auto [n_q, n_k] = shape_.sizes;
    const auto blocks = [&](std::int64_t n) { return (n + kinds.block - 1) / kinds.block; };
    switch (kind) {
      case TableKind::kNone:
        return {};
      case TableKind::kSlopes:
        return {type_, kind, 1, shape_.heads(), 1, 1};
      case TableKind::kSlots:
        return {type_, kind, some(shape_.batch), some(shape_.heads()), kinds.of_queries ? n_q : 1,
                kSlots};
      case TableKind::kBlocks:
        return {type_,       kind,        some(shape_.batch), some(shape_.heads()),
                blocks(n_q), blocks(n_k), kinds.block};
    }
    return {};
  }
  /// All of them, or one that they share.
  std::int64_t some(std::int64_t count) { return random_.chance(40) ? 1 : count; }

  static constexpr std::int64_t kSlots = 9;
  Random& random_;
  const Shape shape_;
  const DataType type_;
};

inline void modify(Random& random, Case& c, const ModifierKinds& kinds) {
  c.modifiers = RandomModifiers(random, c).draw(kinds);
  c.spoil_unused_rows();
}

/// Each kind of table as bias and as gate, with and without the rest.
inline std::vector<ModifierKinds> all_modifier_kinds() {
  using K = TableKind;
  return {{K::kSlopes, K::kNone},
          {K::kSlots, K::kNone, 1, false, 0.0, 0.25},
          {K::kBlocks, K::kNone, 1},
          {K::kNone, K::kSlots, 1, true},
          {K::kNone, K::kNone, 1, false, 2.0, 0.0},
          {K::kNone, K::kNone, 1, false, 0.0, 0.5},
          {K::kNone, K::kNone, 1, false, 0.0, 1.0},
          {K::kSlopes, K::kBlocks, 16, false, 30.0, 0.1},
          {K::kSlots, K::kSlots, 1, true, 1.0, 0.5},
          {K::kBlocks, K::kBlocks, 21, false, 0.5, 0.9}};
}

/// A row whose biases are all -inf is one without keys; a table of zeros for a gate leaves the
/// mean.
inline void exclude_rows(Case& c, std::int64_t first, std::int64_t end) {
  const auto [n_q, n_k] = c.shape.sizes;
  c.modifiers = {};
  c.modifiers.bias = Table(real_type(c.type), TableKind::kBlocks, 1, 1, n_q, n_k);
  c.modifiers.gate = Table(real_type(c.type), TableKind::kBlocks, 1, 1, 1, 1, std::max(n_q, n_k));
  c.modifiers.gate.fill([] { return 0.0; });
  std::int64_t numbers = 0;
  c.modifiers.bias.fill([&] {
    const std::int64_t row = numbers++ / n_k;
    return row >= first && row < end ? -static_cast<double>(INFINITY) : 0.5;
  });
  c.spoil_unused_rows();
}

}  // namespace attention
