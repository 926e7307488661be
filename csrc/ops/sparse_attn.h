// The C++ interface: the ops of torch.ops.sparse_attn for LibTorch programs.
//
//   #include <sparse_attn/sparse_attn.h>
//   auto [output, logsumexp] = sparse_attn::window_attention(query, key, value, 256, 256);
//
// query is (batch, heads, queries, head_dim), key (batch, heads_kv, keys, head_dim), value (batch,
// heads_kv, keys, value_dim). output is (batch, heads, queries, value_dim), logsumexp (batch,
// heads, queries), natural logarithm. All are differentiable. Errors are c10::ValueError,
// c10::TypeError and c10::NotImplementedError.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <limits>
#include <optional>
#include <tuple>
#include <vector>

namespace sparse_attn {

/// An unbounded side of a window.
constexpr std::int64_t kInfinite = std::numeric_limits<std::int64_t>::max();

/// The keyword arguments of every op.
struct Options {
  std::optional<at::Tensor> key_padding_mask;  // (batch, keys) bool, true = ignore
  std::optional<at::Tensor> global_mask;       // (batch, keys) bool, true = global token
  std::optional<at::Tensor> bias;              // a table of 4 dimensions, added to the logits
  std::int64_t bias_kind = 1;                  // 1: for pairs, n: blocks, 0: slots, -1: slopes
  std::optional<at::Tensor> gate;              // a table, multiplied with the scaled products
  std::int64_t gate_kind = 1;                  // as bias_kind, but no slopes
  double dropout_p = 0.0;                      // of the probabilities
  std::optional<at::Tensor> dropout_seed;      // int64, no dimensions; with dropout_p > 0
  std::optional<double> scale;                 // 1 / sqrt(head_dim) if empty
  std::optional<double> softcap;               // logits become softcap * tanh(logits / softcap)
  std::optional<at::Tensor> sink;              // (heads), a logit without a value
  bool enable_gqa = false;                     // heads may be a multiple of heads_kv
  std::vector<at::Tensor> pattern_tensors;     // those that `pattern` of attention() takes
};

using OutputAndLogsumexp = std::tuple<at::Tensor, at::Tensor>;

/// `pattern` is the list of integers that Python's `pattern.encode()` gives.
__attribute__((visibility("default"))) OutputAndLogsumexp attention(const at::Tensor& query,
                                                                    const at::Tensor& key,
                                                                    const at::Tensor& value,
                                                                    at::IntArrayRef pattern,
                                                                    const Options& options = {});

/// Query i sees key j if j = i + m · dilation with -left <= m <= right.
__attribute__((visibility("default"))) OutputAndLogsumexp window_attention(
    const at::Tensor& query, const at::Tensor& key, const at::Tensor& value, std::int64_t left,
    std::int64_t right, std::int64_t dilation = 1, const Options& options = {});

/// A window, and tokens that see all and are seen by all.
__attribute__((visibility("default"))) OutputAndLogsumexp global_attention(
    const at::Tensor& query, const at::Tensor& key, const at::Tensor& value, at::IntArrayRef tokens,
    std::int64_t left, std::int64_t right, std::int64_t dilation = 1, const Options& options = {});

/// Each query has its own list of keys: the first `counts` of `indices`, (batch or 1, heads or 1,
/// queries, keys of a query); a key that is listed twice counts once.
__attribute__((visibility("default"))) OutputAndLogsumexp
index_attention(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                const at::Tensor& indices, const std::optional<at::Tensor>& counts = std::nullopt,
                const Options& options = {});

}  // namespace sparse_attn
