// A half-open range of rows, vectors or keys within a tile.
#pragma once

namespace {

/// [begin, end)
struct Range {
  int begin;
  int end;

  constexpr int size() const { return end - begin; }
  constexpr bool empty() const { return begin >= end; }
};

}  // namespace
