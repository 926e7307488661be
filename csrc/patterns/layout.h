// BlockLayout(layout, block): query i sees key j if layout[i / block][j / block] is true; Mask is
// the same with blocks of one. Both index raw rows: query i, not its position.
#pragma once

#include <cstring>

#include "patterns/pattern.h"
#include "patterns/rules.h"

namespace sparse_attn {

class BlockLayout final : public Primitive {
 public:
  /// `layout` is (blocks of queries, columns), row by row; it must outlive the planning.
  BlockLayout(const std::uint8_t* layout, std::int64_t columns, std::int64_t block,
              std::int64_t offset)
      : rule_{layout, columns, block, offset} {}

  bool contains(std::int64_t position, std::int64_t key) const override {
    return rule_(position, key);
  }
  void tile(const TokenSet& positions, const TokenSet& keys, std::uint64_t* words) const override {
    std::int64_t columns[64];
    for (std::int64_t k = 0; k < keys.count; ++k) {
      columns[k] = keys[k] / rule_.block;
      words[k] = 0;
    }
    for (std::int64_t r = 0; r < positions.count; ++r) {
      const std::uint8_t* bytes = rule_.row(positions[r]);
      for (std::int64_t k = 0; k < keys.count; ++k)
        words[k] |= static_cast<std::uint64_t>(bytes[columns[k]] != 0) << r;
    }
  }
  Cover cover(const TokenSet& positions, const TokenSet& keys) const override {
    const std::int64_t first = keys.first() / rule_.block;
    const auto count = static_cast<std::size_t>(keys.last() / rule_.block - first + 1);
    const std::int64_t last_row = (positions.last() - rule_.offset) / rule_.block;
    std::int64_t r = (positions.first() - rule_.offset) / rule_.block;
    const bool all = row(r)[first] != 0;
    for (; r <= last_row; ++r) {
      if (!uniform(row(r) + first, count) || (row(r)[first] != 0) != all) return Cover::kSome;
    }
    return all ? Cover::kAll : Cover::kNone;
  }
  bool signature(const TokenSet&, const TokenSet&, Signature&) const override { return false; }
  std::int64_t block() const override { return rule_.block; }

 private:
  /// Of a row of blocks.
  const std::uint8_t* row(std::int64_t r) const { return rule_.layout + r * rule_.columns; }

  /// Compares the bytes with themselves shifted by one: memcmp is vectorized in every libc.
  static bool uniform(const std::uint8_t* bytes, std::size_t count) {
    return std::memcmp(bytes, bytes + 1, count - 1) == 0;
  }

  LayoutRule rule_;
};

}  // namespace sparse_attn
