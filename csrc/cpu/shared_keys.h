// For each query the keys that share a group with it: hashing, clustering.
#pragma once

#include <cstdint>
#include <memory>

#include "params.h"

namespace sparse_attn::cpu {

/// Members of the groups of one side, one group after another, for all heads of all examples.
struct Groups {
  const std::int64_t* members = nullptr;  // (sets, places)
  const std::int64_t* offsets = nullptr;  // (sets, groups + 1), into the places of a set
  std::int64_t places = 0;
  std::int64_t tokens = 0;  // members are below
};

struct SharedKeysCall {
  Groups queries, keys;
  std::int64_t sets = 0;   // heads of all examples
  std::int64_t heads = 1;  // of an example
  std::int64_t groups = 0;
  const bool* key_padding = nullptr;  // (sets / heads, keys), true = ignore; null = none
  bool is_causal = false;
};

/// The lists, and then their copies in rows of equal length.
class SharedKeys {
 public:
  /// Throws std::invalid_argument if offsets do not ascend within the places, or a member is no
  /// token.
  SharedKeys(const SharedKeysCall& call, const Parallel& parallel);
  ~SharedKeys();
  std::int64_t longest() const;
  /// indices (sets, queries, longest), filled up with 0; counts (sets, queries).
  void write(std::int32_t* indices, std::int32_t* counts, const Parallel& parallel) const;

 private:
  struct Lists;
  std::unique_ptr<Lists> lists_;
};

}  // namespace sparse_attn::cpu
