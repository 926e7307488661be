// The shapes of the tensor-core kernels: for each element size and head size (the larger of
// head_dim and value_dim, rounded up to a row of the table) how many tiles of 64 rows a block of
// four warps has, how many columns of the other side it takes at a time, and how many of those are
// in shared memory.
//
// All fit 99 KiB, which every device from sm_80 on has. A warp has 16 rows of each tile: with two
// tiles, what it reads of the other side from shared memory serves 32 rows, at the price of twice
// the registers for the sums.
#pragma once

namespace sparse_attn::cuda {

/// What a sweep of the backward pass sums up.
enum class Grad { kQuery, kKeyValue, kKey, kValue };

constexpr int kMmaThreads = 128;
constexpr int kMostShared = 99 * 1024;

struct Shape {
  int group;    // tiles of the task
  int columns;  // of the other side at a time
  int stages;   // of the ring in shared memory
  int blocks;   // on a multiprocessor at least: bounds the registers
};

/// Registers of the sums: 4 * group * head size / 8 a thread, and as much again for the logits of
/// 64 columns.
template <int kBytes, int kHeadSize>
constexpr Shape kForwardShape = {};
template <>
constexpr Shape kForwardShape<2, 32> = {2, 64, 3, 2};  // three blocks spill
template <>
constexpr Shape kForwardShape<2, 64> = {2, 64, 3, 2};
template <>
constexpr Shape kForwardShape<2, 96> = {2, 64, 3, 2};
template <>
constexpr Shape kForwardShape<2, 128> = {2, 32, 3, 2};  // 64 columns spill
template <>
constexpr Shape kForwardShape<2, 192> = {1, 64, 2, 1};  // three stages take 102 KiB
template <>
constexpr Shape kForwardShape<2, 256> = {1, 32, 3, 1};
template <>
constexpr Shape kForwardShape<4, 32> = {2, 64, 3, 2};
template <>
constexpr Shape kForwardShape<4, 64> = {2, 64, 3, 1};
template <>
constexpr Shape kForwardShape<4, 96> = {1, 64, 2, 1};
template <>
constexpr Shape kForwardShape<4, 128> = {1, 32, 3, 1};

/// The ring holds pairs of tiles here, K and V or Q and dO. Two tiles pay for dQ alone; dK and dV
/// together already take two sums.
template <int kBytes, int kHeadSize>
constexpr Shape kGradQueryShape = {};
template <>
constexpr Shape kGradQueryShape<2, 32> = {2, 64, 2, 2};
template <>
constexpr Shape kGradQueryShape<2, 64> = {2, 32, 2, 2};
template <>
constexpr Shape kGradQueryShape<2, 96> = {1, 64, 2, 2};
template <>
constexpr Shape kGradQueryShape<2, 128> = {1, 32, 2, 2};
template <>
constexpr Shape kGradQueryShape<2, 192> = {1, 16, 2, 1};
template <>
constexpr Shape kGradQueryShape<2, 256> = {1, 16, 1, 1};
template <>
constexpr Shape kGradQueryShape<4, 32> = {1, 64, 2, 2};
template <>
constexpr Shape kGradQueryShape<4, 64> = {1, 32, 2, 2};
template <>
constexpr Shape kGradQueryShape<4, 96> = {1, 16, 2, 1};
template <>
constexpr Shape kGradQueryShape<4, 128> = {1, 16, 1, 1};

template <int kBytes, int kHeadSize>
constexpr Shape kGradKeyValueShape = kGradQueryShape<kBytes, kHeadSize>;
template <>
constexpr Shape kGradKeyValueShape<2, 32> = {1, 64, 2, 2};
template <>
constexpr Shape kGradKeyValueShape<2, 64> = {1, 64, 2, 2};
template <>
constexpr Shape kGradKeyValueShape<2, 96> = {1, 32, 2, 2};  // 64 columns spill

/// Up to here one kernel sums dK and dV; beyond, the sums of both would not fit the registers, and
/// each has a kernel of its own, at five products for four.
constexpr int kMostForBoth = 128;

}  // namespace sparse_attn::cuda
