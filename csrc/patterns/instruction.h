// One step of a pattern's program, as the host writes and kernels run it.
#pragma once

#include <cstdint>

#include "patterns/rules.h"

namespace sparse_attn {

/// A tensor that a program reads: of one head of one example, `columns` elements a row.
struct ProgramTensor {
  const void* data = nullptr;
  std::int64_t batch_stride = 0;  // in bytes; 0 where all are alike
  std::int64_t head_stride = 0;
  std::int64_t columns = 0;
};

/// As many may a pattern have.
constexpr int kMostTensors = 12;

/// layout[query / block][key / block] of a tensor of bytes is true.
struct LayoutOf {
  std::int32_t tensor;
  std::int64_t block;
};
/// The keys of a query are among its row of the tensor: int64, ascending.
struct ListsOf {
  std::int32_t tensor;
};
/// The key is a global token of the example: a row of bytes for each.
struct GlobalFlagOf {
  std::int32_t tensor;
};

struct Instruction {
  enum class Kind : std::int32_t {
    kTrue,
    kFalse,
    kAnd,  // of the topmost two
    kOr,
    kNot,  // of the topmost
    kWindow,
    kKeys,
    kQueries,
    kPeriodic,
    kBlockWindow,
    kCheckerboard,
    kRandomBlocks,
    kRandomTokens,
    kLayout,
    kLists,
    kGlobalKey,
  };
  Kind kind = Kind::kTrue;
  union {
    WindowRule window{};
    KeysRule keys;
    QueriesRule queries;
    PeriodicRule periodic;
    BlockWindowRule block_window;
    CheckerboardRule checkerboard;
    RandomBlocksRule random_blocks;
    RandomTokensRule random_tokens;
    LayoutOf layout;
    ListsOf lists;
    GlobalFlagOf global_key;
  };
};

}  // namespace sparse_attn
