// A half-open range of rows, vectors or keys within a tile.
#pragma once

namespace {

/// [begin, end)
struct Range {
  int begin;
  int end;

  constexpr int size() const { return end - begin; }
  constexpr bool empty() const { return begin >= end; }
  constexpr bool operator==(const Range& other) const {
    return begin == other.begin && end == other.end;
  }

  /// The part of it in [first, first + count), counted from `first`; empty parts begin at 0.
  constexpr Range within(int first, int count) const {
    const int b = begin > first ? begin - first : 0;
    const int e = end - first < count ? end - first : count;
    return b < e ? Range{b, e} : Range{0, 0};
  }
};

}  // namespace
