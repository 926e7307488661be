// What a kernel gets: the call, the plans of one pass, and where intermediate results go.
#pragma once

#include <cstdint>

#include "params.h"
#include "plan/grid.h"

namespace sparse_attn::cuda {

/// Softmax states, one for each row: unnormalised outputs (rows x value_dim), maxima and sums, all
/// Real (double for float64, else float). Maxima are of natural, scaled logits; -inf without keys.
struct States {
  void* output = nullptr;
  void* maximum = nullptr;
  void* sum = nullptr;
};

/// A gradient on its way: of the tensor's own type, or Real where several sweeps add up.
struct Gradient {
  TensorView view;
  bool wide = false;  // Real
  bool add = false;   // to what is there
};

/// Steps of tiles, start + step * i, for which a pass may have tensor maps.
constexpr int kMostSteps = 3;

struct Arguments {
  AttentionParams call;  // its `plans` are not used

  /// The pass at hand of plan (b, h) is passes[b % plan_batch * plan_heads + h / group], where each
  /// plan is that of heads / plan_heads consecutive heads.
  const GridPass* passes = nullptr;
  std::int32_t plan_batch = 1;
  std::int32_t plan_heads = 1;
  ProgramTensor tensors[kMostTensors];  // those that programs read
  std::int32_t steps[kMostSteps] = {};  // of the pass's tiles, as far as they go in; 0: none
  const ListsView* lists = nullptr;     // of each plan, by queries or by keys; as passes

  /// Forward: null if this is the only sweep, which writes output and log-sum-exp itself; else the
  /// states of the rows, (batch, heads, n_q), in which every sweep goes on where the last stopped.
  States rows;
  bool first = true;  // of the sweeps: there is nothing to go on from

  /// The slots of head i (batch x heads, or batch x heads_kv in the sweep of keys) begin at number
  /// i * slots_per_head. A slot has kMaxTile rows: of states in the forward pass, of gradients (of
  /// query; or of key and value) in the backward pass.
  States slots;
  void* slots_key = nullptr;    // (slots, kMaxTile, head_dim) Real; of query in the sweep of rows
  void* slots_value = nullptr;  // (slots, kMaxTile, value_dim) Real
  std::int64_t slots_per_head = 0;
  std::int32_t first_reduction = 0;  // of the reductions to do now
  std::int32_t end_reduction = 0;

  /// Backward only.
  void* delta = nullptr;      // (batch, heads, n_q) Real: rowsum(dO * O) less the gradient of lse
  void* delta_dot = nullptr;  // its change along a tangent of the inputs; null without
  Gradient grad_query, grad_key, grad_value;
};

}  // namespace sparse_attn::cuda
