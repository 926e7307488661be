// Runs a pattern's program: for single pairs, and for whole tiles as far as their corners tell.
#pragma once

#include <cstdint>

#include "cuda/args.h"
#include "cuda/ptx.cuh"
#include "patterns/instruction.h"

namespace sparse_attn::cuda {

/// How much of a tile is allowed. Both bits clear promise nothing.
struct TileCover {
  bool none = false;
  bool all = false;
};

/// A tile for covers: rows and keys lie within [first, last] each.
struct TileBounds {
  std::int64_t first_position, last_position;
  std::int64_t first_key, last_key;
};

/// The program of one head, with its tensors. Queries and keys are those of the call; what it says
/// of them goes by their numbers in the whole.
class ProgramOfHead {
 public:
  __device__ ProgramOfHead(const GridPass& pass, const Arguments& a, std::int64_t batch,
                           std::int64_t head)
      : pass_(pass), call_(a.call), tensors_(a.tensors), batch_(batch), head_(head) {}

  __device__ bool allows(std::int64_t query, std::int64_t key) const {
    const PairPlace at = call_.place(query, key);
    return at.key != kNoToken && allows_at(at.position, at.key);
  }

  /// Of a program that begins with kLists: a query's row of that tensor, with keys of the whole.
  __device__ const std::int64_t* first_list(std::int64_t query) const {
    const ProgramTensor& tensor = tensors_[pass_.program[0].lists.tensor];
    return static_cast<const std::int64_t*>(data(tensor)) +
           call_.whole.query(query) * tensor.columns;
  }
  __device__ std::int64_t first_list_columns() const {
    return tensors_[pass_.program[0].lists.tensor].columns;
  }

  /// Of two tiles with the tokens of a list. Exact where it says none or all; some where corners do
  /// not tell.
  __device__ TileCover cover(const Tile& rows, const Tile& keys, const std::int64_t* list) const {
    const auto position = [&](int i) {
      return call_.whole.query(token(rows, list, i)) + call_.offset();
    };
    const auto key = [&](int i) { return call_.whole.key(token(keys, list, i)); };
    int first = 0, last = keys.count - 1, gaps = 0;
    if (call_.whole.keys != nullptr) {
      for (int i = 0; i < keys.count; ++i) gaps += key(i) == kNoToken;
      while (first < last && key(first) == kNoToken) ++first;
      while (last > first && key(last) == kNoToken) --last;
    }
    if (gaps == keys.count) return {true, false};
    const TileCover c =
        cover_within({position(0), position(rows.count - 1), key(first), key(last)});
    return {c.none, c.all && gaps == 0};
  }

 private:
  using Kind = Instruction::Kind;

  __device__ bool allows_at(std::int64_t position, std::int64_t key) const {
    std::uint64_t stack = 0;  // the topmost bit is the lowest
    for (std::int32_t i = 0; i < pass_.program_size; ++i) {
      const Instruction& step = pass_.program[i];
      switch (step.kind) {
        case Instruction::Kind::kAnd:
          stack = stack >> 1 & (stack | ~std::uint64_t{1});
          break;
        case Instruction::Kind::kOr:
          stack = stack >> 1 | (stack & 1);
          break;
        case Instruction::Kind::kNot:
          stack ^= 1;
          break;
        default:
          stack = stack << 1 | static_cast<std::uint64_t>(rule(step, position, key));
      }
    }
    return (stack & 1) != 0;
  }

  __device__ TileCover cover_within(const TileBounds& tile) const {
    std::uint64_t none = 0, all = 0;
    for (std::int32_t i = 0; i < pass_.program_size; ++i) {
      const Instruction& step = pass_.program[i];
      switch (step.kind) {
        case Instruction::Kind::kAnd:
          none = none >> 1 | (none & 1);
          all = all >> 1 & (all | ~std::uint64_t{1});
          break;
        case Instruction::Kind::kOr:
          none = none >> 1 & (none | ~std::uint64_t{1});
          all = all >> 1 | (all & 1);
          break;
        case Instruction::Kind::kNot: {
          const std::uint64_t differ = (none ^ all) & 1;
          none ^= differ;
          all ^= differ;
          break;
        }
        default: {
          const TileCover c = cover_of(step, tile);
          none = none << 1 | static_cast<std::uint64_t>(c.none);
          all = all << 1 | static_cast<std::uint64_t>(c.all);
        }
      }
    }
    return {(none & 1) != 0, (all & 1) != 0};
  }

  __device__ bool rule(const Instruction& step, std::int64_t position, std::int64_t key) const {
    switch (step.kind) {
      case Kind::kTrue:
        return true;
      case Kind::kWindow:
        return step.window(position, key);
      case Kind::kKeys:
        return step.keys(position, key);
      case Kind::kQueries:
        return step.queries(position, key);
      case Kind::kPeriodic:
        return step.periodic(position, key);
      case Kind::kBlockWindow:
        return step.block_window(position, key);
      case Kind::kCheckerboard:
        return step.checkerboard(position, key);
      case Kind::kRandomBlocks:
        return step.random_blocks(position, key);
      case Kind::kRandomTokens:
        return step.random_tokens(position, key);
      case Kind::kLayout:
        return layout(step.layout)(position, key);
      case Kind::kLists: {
        const ProgramTensor& tensor = tensors_[step.lists.tensor];
        const auto* rows = static_cast<const std::int64_t*>(data(tensor));
        return is_among(rows + (position - call_.offset()) * tensor.columns, tensor.columns, key);
      }
      case Kind::kGlobalKey:
        return static_cast<const std::uint8_t*>(data(tensors_[step.global_key.tensor]))[key] != 0;
      default:
        return false;
    }
  }

  __device__ const void* data(const ProgramTensor& tensor) const {
    return static_cast<const char*>(tensor.data) + batch_ * tensor.batch_stride +
           head_ * tensor.head_stride;
  }
  __device__ LayoutRule layout(const LayoutOf& of) const {
    const ProgramTensor& tensor = tensors_[of.tensor];
    return {static_cast<const std::uint8_t*>(data(tensor)), tensor.columns, of.block,
            call_.offset()};
  }

  __device__ TileCover cover_of(const Instruction& step, const TileBounds& tile) const {
    switch (step.kind) {
      case Kind::kTrue:
        return {false, true};
      case Kind::kFalse:
        return {true, false};
      case Kind::kWindow:
        return cover_of(step.window, tile);
      case Kind::kBlockWindow:
        return cover_of(step.block_window, tile);
      case Kind::kLayout:
        return cover_of(layout(step.layout), tile);
      default:
        return {};
    }
  }

  static __device__ TileCover cover_of(const WindowRule& window, const TileBounds& tile) {
    const std::int64_t nearest = tile.first_key - tile.last_position,
                       furthest = tile.last_key - tile.first_position;
    const bool within = -window.back <= nearest && furthest <= window.ahead;
    return {furthest < -window.back || nearest > window.ahead, within && window.dilation == 1};
  }

  static __device__ TileCover cover_of(const BlockWindowRule& window, const TileBounds& tile) {
    if (tile.first_position < 0) return {};
    const std::int64_t nearest = tile.first_key / window.block - tile.last_position / window.block,
                       furthest = tile.last_key / window.block - tile.first_position / window.block;
    return {furthest < -window.back || nearest > window.ahead,
            -window.back <= nearest && furthest <= window.ahead};
  }

  /// Looks at the blocks that the tile touches, at most 64 x 64, until two differ.
  static __device__ TileCover cover_of(const LayoutRule& layout, const TileBounds& tile) {
    const std::int64_t first = tile.first_key / layout.block, last = tile.last_key / layout.block;
    const std::uint8_t* row = layout.row(tile.first_position);
    const std::uint8_t* const last_row = layout.row(tile.last_position);
    const bool all = row[first] != 0;
    for (; row <= last_row; row += layout.columns) {
      for (std::int64_t column = first; column <= last; ++column) {
        if ((row[column] != 0) != all) return {};
      }
    }
    return {!all, all};
  }

  const GridPass& pass_;
  const AttentionParams& call_;
  const ProgramTensor* const tensors_;
  const std::int64_t batch_, head_;
};

}  // namespace sparse_attn::cuda
