// How threads share the chunks of all heads, and where their memory comes from.
#pragma once

#include "params.h"
#include "vec.h"

namespace {

using sparse_attn::Array;
using sparse_attn::AttentionParams;
using sparse_attn::Chunk;
using sparse_attn::Parallel;
using sparse_attn::PassView;
using sparse_attn::PlanView;

/// Results too small for a normal number become 0 as long as this lives: for sweeps whose products
/// read probabilities times gradients, which are so of far keys, and took 4.5 times as long.
class FlushToZero {
 public:
  FlushToZero() : before_(get()) { set(before_ | kFlush); }
  ~FlushToZero() { set(before_); }
  FlushToZero(const FlushToZero&) = delete;
  FlushToZero& operator=(const FlushToZero&) = delete;

 private:
#if defined(__x86_64__)
  using Register = unsigned;
  static constexpr Register kFlush = 1u << 15;
  static Register get() { return __builtin_ia32_stmxcsr(); }
  static void set(Register value) { __builtin_ia32_ldmxcsr(value); }
#else
  using Register = uint64_t;
  static constexpr Register kFlush = uint64_t{1} << 24;
  static Register get() {
    Register value;
    asm volatile("mrs %0, fpcr" : "=r"(value));
    return value;
  }
  static void set(Register value) { asm volatile("msr fpcr, %0" : : "r"(value)); }
#endif
  const Register before_;
};

/// Runs body(thread, item) for each item, on whichever thread is free: what an item computes does
/// not depend on the thread.
template <class Body>
void for_each_item(const Parallel& parallel, int64_t items, const Body& body) {
  struct Context {
    const Body& body;
    int64_t items;
    int64_t next;
  } context{body, items, 0};
  if (items == 0) return;
  const int threads = static_cast<int>(items < parallel.threads ? items : parallel.threads);
  parallel.run(
      threads,
      [](void* raw, int thread) {
        auto* shared = static_cast<Context*>(raw);
        for (;;) {
          const int64_t item = __atomic_fetch_add(&shared->next, 1, __ATOMIC_RELAXED);
          if (item >= shared->items) return;
          shared->body(thread, item);
        }
      },
      &context);
}

/// Hands out 64-byte aligned pieces of one block; with a null base it only counts.
class Arena {
 public:
  explicit Arena(void* base) : base_(static_cast<char*>(base)) {}

  template <class T>
  T* take(int64_t count) {
    T* piece = base_ ? reinterpret_cast<T*>(base_ + used_) : nullptr;
    used_ += round_up64(count * static_cast<int64_t>(sizeof(T)));
    return piece;
  }
  int64_t used() const { return used_; }

 private:
  static int64_t round_up64(int64_t n) { return (n + 63) / 64 * 64; }
  char* base_;
  int64_t used_ = 0;
};

/// The largest value of `size(pass)` over passes number `p` of all heads' plans.
template <class Size>
int64_t largest(const AttentionParams& params, int64_t p, Size size) {
  int64_t most = 0;
  for (int64_t i = 0; i < params.batch * params.heads; ++i) {
    const auto& passes = params.plans[i]->passes;
    if (p < passes.size && size(passes[p]) > most) most = size(passes[p]);
  }
  return most;
}

inline int64_t pass_count(const AttentionParams& params) {
  int64_t most = 0;
  for (int64_t i = 0; i < params.batch * params.heads; ++i) {
    const int64_t passes = params.plans[i]->passes.size;
    if (passes > most) most = passes;
  }
  return most;
}

/// The largest value of `size(pass)` over all passes of all heads.
template <class Size>
int64_t largest(const AttentionParams& params, Size size) {
  int64_t most = 0;
  for (int64_t p = pass_count(params) - 1; p >= 0; --p) {
    const int64_t n = largest(params, p, size);
    if (n > most) most = n;
  }
  return most;
}

inline int64_t chunks_of(const PassView& pass) { return pass.chunks.size; }

}  // namespace
