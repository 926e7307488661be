// All that kernels read of the plans of a call, in one piece that is copied to the device.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <vector>

#include "patterns/program.h"
#include "plan/sweeps.h"

namespace sparse_attn {

/// What the device does for one head's pattern. A program without instructions stands for no work.
struct HeadPlan {
  std::shared_ptr<const Plan> plan;          // of what is known on the host
  CompiledProgram looked_up = {};            // of pairs to be found among all: layouts
  std::vector<CompiledProgram> listed = {};  // of lists of keys, which begin with kLists
  CompiledProgram global_keys = {};     // of what tokens that only the device knows add: columns
  CompiledProgram global_queries = {};  // and rows
};

/// Of one side of a pass, over all heads: what the host must know to launch it.
struct SweepShape {
  std::int32_t tasks = 0;                // the most of any head
  std::int32_t slots = 0;                // likewise
  std::vector<std::int32_t> round_ends;  // of reductions: those of one round touch different tokens
};

struct PassShape {
  SweepShape rows;
  SweepShape keys;
  bool evaluated = false;                // its visits are left to programs
  std::vector<std::int32_t> steps = {};  // of the residue classes that its tiles are cut of
  std::int64_t table = 0;                // offset of the pass's GridPass[heads]
};

/// Of a part of a sequence: the numbers of its tokens in the whole, by their places.
struct TokenNumbers {
  std::vector<std::int64_t> queries, keys;
};

class GridImage {
 public:
  /// How the passes are cut into tasks.
  struct Cut {
    Grouping grouping;
    std::int64_t heads = 1;  // batch times heads, which run side by side
    bool backward = false;
  };

  /// One plan for each head, or for each group of heads. `part`: null for a whole sequence.
  GridImage(const std::vector<HeadPlan>& heads, const Cut& cut, const TokenNumbers* part = nullptr);

  const std::vector<PassShape>& passes() const { return passes_; }
  /// Offset of ListsView[heads] for the queries, and for the keys; -1 without lists.
  std::int64_t keys_of_query() const { return keys_of_query_; }
  std::int64_t queries_of_key() const { return queries_of_key_; }
  /// Of each part with lists of keys the offset of GridPass[heads], for their programs.
  const std::vector<std::int64_t>& listed() const { return listed_; }
  /// Offsets of GridPass[heads] with the tiles of all rows and keys and the programs for global
  /// tokens, of which the device makes passes; -1 without.
  std::int64_t global_keys() const { return global_keys_; }
  std::int64_t global_queries() const { return global_queries_; }

  /// Offsets of the TokenNumbers of a part; -1 without.
  std::int64_t query_tokens() const { return query_tokens_; }
  std::int64_t key_tokens() const { return key_tokens_; }

  std::int64_t size() const { return size_; }
  /// The bytes for an image that begins at `base`.
  std::vector<char> at(const void* base) const;
  /// Frees what `at` needs, and no one else.
  void drop_bytes();

 private:
  struct Layout;
  struct Shared {
    const std::int64_t* tokens;
    const std::uint64_t (*masks)[kMaxTile];
    const std::uint64_t (*masks_of_rows)[kMaxTile];
  };

  PassShape add_pass(const std::vector<const Plan*>& plans, const std::vector<const Pass*>& passes,
                     std::vector<PassArrays> arrays,
                     const std::vector<const CompiledProgram*>& programs);
  void add_planned(const std::vector<HeadPlan>& heads, const Cut& cut);
  PassShape add_evaluated(const std::vector<HeadPlan>& heads, CompiledProgram HeadPlan::* program,
                          const PassArrays& cut);
  void add_listed(const std::vector<HeadPlan>& heads);
  void add_lists(const std::vector<HeadPlan>& heads, bool backward);

  std::int64_t size_ = 0;
  std::vector<char> bytes_;
  std::vector<std::int64_t> pointers_;   // offsets of the pointers in it, which are offsets as well
  std::shared_ptr<const Plan> natural_;  // everything, in natural order; while it is made
  std::map<const Plan*, Shared> shared_;  // likewise
  std::vector<PassShape> passes_;
  std::vector<std::int64_t> listed_;
  std::int64_t keys_of_query_ = -1, queries_of_key_ = -1;
  std::int64_t global_keys_ = -1, global_queries_ = -1;
  std::int64_t query_tokens_ = -1, key_tokens_ = -1;
};

}  // namespace sparse_attn
