// What the derivatives take of one pair of query and key: its logit with tables, soft cap and
// dropout, and its gradients; each with its change along a tangent of the inputs (`_dot`).
#pragma once

#include "cuda/logits.cuh"

namespace sparse_attn::cuda {

/// The numbers that a table has for the pairs of one head.
template <class T>
class NumbersOfHead {
 public:
  __device__ NumbersOfHead(const LogitTable& table, std::int64_t batch, std::int64_t head)
      : table_(table),
        numbers_(table.kind == TableKind::kNone
                     ? nullptr
                     : static_cast<const T*>(table.data) + batch * table.batch_stride +
                           head * table.head_stride) {}

  /// `otherwise` where the table has none for the pair.
  __device__ T number(const SlotWindow& window, const PairPlace& at, T otherwise) const {
    if (numbers_ == nullptr) return otherwise;
    const std::int64_t offset = table_offset(table_, window, at);
    return offset < 0 ? otherwise : numbers_[offset] * static_cast<T>(table_factor(table_, at));
  }

 private:
  const LogitTable& table_;
  const T* numbers_;
};

/// A pair's logit, and what dropout multiplies its probability with.
template <class T>
struct PairAlong {
  LogitAlong<T> logit;
  T kept;
};

/// What a call does to the logits and the probabilities of one head.
template <class T>
class HeadAlong {
 public:
  __device__ HeadAlong(const AttentionParams& call, std::int64_t batch, std::int64_t head)
      : call_(call),
        head_(batch * call.heads + head),
        window_(call.modifiers.window(head, call.heads)),
        bias_(call.modifiers.bias, batch, head),
        gate_(call.modifiers.gate, batch, head),
        bias_dot_(call.bias_tangent, batch, head),
        gate_dot_(call.gate_tangent, batch, head) {}

  __device__ PairPlace place(std::int64_t query, std::int64_t key) const {
    return call_.place(query, key);
  }
  __device__ const SlotWindow& window() const { return window_; }

  /// Of a query and a key with the product q · k, which changes by `product_dot`.
  __device__ PairAlong<T> logit(const PairPlace& at, T product, T product_dot) const {
    const T scale = static_cast<T>(call_.scale);
    const T score = product * scale, score_dot = product_dot * scale;
    if (!call_.modifiers.any() && call_.bias_tangent.kind == TableKind::kNone &&
        call_.gate_tangent.kind == TableKind::kNone)
      return {{{score, T{1}, score}, {score_dot, T{0}, score_dot}}, T{1}};
    return modified(at, score, score_dot);
  }

 private:
  /// Not inlined: kernels call it for each of the 16 pairs that a thread has.
  __attribute__((noinline)) __device__ PairAlong<T> modified(const PairPlace& at, T score,
                                                             T score_dot) const {
    const T bias = bias_.number(window_, at, T{0}), excluded = static_cast<T>(-kInfinity);
    if (bias == excluded) return {{{excluded, T{0}, T{0}}, {T{0}, T{0}, T{0}}}, T{0}};
    return {logit_along<DeviceMath>(score, gate_.number(window_, at, T{1}), bias, score_dot,
                                    gate_dot_.number(window_, at, T{0}),
                                    bias_dot_.number(window_, at, T{0}),
                                    static_cast<T>(call_.modifiers.softcap)),
            kept(at)};
  }

  __device__ T kept(const PairPlace& at) const {
    const Modifiers& m = call_.modifiers;
    if (m.dropout_p == 0.0) return T{1};
    const DropoutRule rule{static_cast<std::uint64_t>(*m.dropout_seed),
                           dropout_threshold(m.dropout_p)};
    return rule.keeps(head_, at.query, at.key) ? static_cast<T>(1.0 / (1.0 - m.dropout_p)) : T{0};
  }

  const AttentionParams& call_;
  const std::int64_t head_;  // of batch x heads
  const SlotWindow& window_;
  const NumbersOfHead<T> bias_, gate_, bias_dot_, gate_dot_;
};

/// What pairs need of their query: its log-sum-exp and rowsum(dO * O) less the gradient of that.
template <class T>
struct RowAlong {
  T lse, lse_dot, delta, delta_dot;

  /// A row without keys, and one that is none, has the log-sum-exp +inf: its probabilities are 0.
  __device__ static RowAlong none() { return {static_cast<T>(kInfinity), T{0}, T{0}, T{0}}; }
  /// Of a row of (batch, heads, n_q); 0 where the call has no such number.
  __device__ static RowAlong load(const Arguments& a, std::int64_t row) {
    const T lse = static_cast<const T*>(a.call.lse)[row];
    if (lse == static_cast<T>(-kInfinity)) return none();
    const auto number = [&](const void* of_rows) {
      return of_rows == nullptr ? T{0} : static_cast<const T*>(of_rows)[row];
    };
    return {lse, number(a.call.lse_tangent), number(a.delta), number(a.delta_dot)};
  }
  __device__ bool is_none() const { return lse == static_cast<T>(kInfinity); }
};

/// P without dropout.
template <class T>
struct ProbabilityAlong {
  T p, p_dot;

  __device__ ProbabilityAlong(const PairAlong<T>& pair, const RowAlong<T>& row)
      : p(probability(pair.logit.at.value, row.lse)),
        p_dot(p * (pair.logit.along.value - row.lse_dot)) {}
};

/// Gradients of the logit, of the score and of the gate, and P with dropout along the tangent.
template <class T>
struct GradientAlong {
  T logit, logit_dot;
  T score, score_dot;
  T gate, gate_dot;
  T kept_p_dot;

  /// `dp` is dO · V of the pair.
  __device__ GradientAlong(const PairAlong<T>& pair, const RowAlong<T>& row, T dp, T dp_dot) {
    const ProbabilityAlong<T> of(pair, row);
    const Logit<T>&at = pair.logit.at, &along = pair.logit.along;
    const T above = pair.kept * dp - row.delta;
    logit = of.p * above;
    logit_dot = of.p_dot * above + of.p * (pair.kept * dp_dot - row.delta_dot);
    score = logit * at.by_score;
    score_dot = logit_dot * at.by_score + logit * along.by_score;
    gate = logit * at.by_gate;
    gate_dot = logit_dot * at.by_gate + logit * along.by_gate;
    kept_p_dot = of.p_dot * pair.kept;
  }
};

}  // namespace sparse_attn::cuda
