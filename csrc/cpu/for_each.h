// Loops over numbered pieces of work.
#pragma once

#include <cstdint>

#include "params.h"

namespace sparse_attn::cpu {

/// Runs body(i) for i in [0, count) on all threads.
template <class Body>
void for_each(std::int64_t count, const Parallel& parallel, const Body& body) {
  struct Context {
    std::int64_t count;
    int threads;
    const Body& body;
  } context{count, parallel.threads, body};
  parallel.run(
      parallel.threads,
      [](void* opaque, int thread) {
        const auto& c = *static_cast<Context*>(opaque);
        for (std::int64_t i = thread; i < c.count; i += c.threads) c.body(i);
      },
      &context);
}

}  // namespace sparse_attn::cpu
