// What the parts of one 64 x 64 tile cost, in nanoseconds, of float32 and heads of 64 with
// everything in the level-1 and level-2 caches: the whole tile, and the triangles at the edges of a
// window.
//
//     g++ -std=c++17 -O3 -march=native -ffp-contract=fast -fno-math-errno -Wno-psabi -Icsrc \
//         -DSPARSE_ATTN_ISA_NAME=native -DSPARSE_ATTN_SCALAR=float32 benchmarks/tile_parts.cpp -o
//         tile_parts
#include <chrono>
#include <cstdio>
#include <cstdlib>

#include "cpu/backward.h"
#include "cpu/forward.h"

namespace {

constexpr int kRounds = 200, kCalls = 50;

template <class Part>
double nanoseconds(const Part& part) {
  double least = 1e9;
  for (int round = 0; round < kRounds; ++round) {
    const auto start = std::chrono::steady_clock::now();
    for (int call = 0; call < kCalls; ++call) {
      part();
      asm volatile("" ::: "memory");
    }
    const std::chrono::duration<double, std::nano> taken = std::chrono::steady_clock::now() - start;
    if (taken.count() / kCalls < least) least = taken.count() / kCalls;
  }
  return least;
}

struct Parts {
  alignas(64) float rows[6][64 * 64], rescale[64], lse[64];
  SoftmaxState<float> state;

  Parts() {
    for (auto& tile : rows) {
      for (float& x : tile) x = static_cast<float>(std::rand()) / RAND_MAX * 0.01f;
    }
    for (int i = 0; i < 64; ++i) rescale[i] = lse[i] = 1.0f;
    state.init();
  }

  void measure(const char* name, const uint64_t* words) {
    VisibleBlocks<float> visible;
    const int vectors = 64 / kLanes<float>;
    const Operand<float, true> by_key{rows[0], 64};
    const Operand<float, false> by_size{rows[1], 64};
    float *const scores = rows[2], *const sums = rows[3], *const queries = rows[4];
    const double found = nanoseconds([&] { visible.set(words, 64, vectors); });
    const double logits = nanoseconds(
        [&] { multiply_visible(visible, 64, by_key, queries, SetMasked<float>{scores, words}); });
    const double softmax = nanoseconds([&] {
      for (const VisibleColumns& part : visible.columns())
        softmax_update(scores, part.keys, part.vectors, state, rescale);
    });
    const double output = nanoseconds([&] {
      sum_over_visible_keys(visible, 64, by_size, scores, Accumulate<float>{sums, rescale});
    });
    const double probabilities = nanoseconds([&] {
      multiply_visible(visible, 64, by_key, queries,
                       MaskedProbabilities<float>{{scores, lse}, words});
    });
    const double by_query = nanoseconds([&] {
      sum_over_visible_queries(visible, 64, vectors, Operand<float, true>{scores, 64}, queries, 64,
                               AddTo<float>{sums, 64});
    });
    std::printf("%-16s %6.0f %6.0f %8.0f %6.0f %8.0f %8.0f\n", name, found, logits, softmax, output,
                probabilities, by_query);
  }
};

}  // namespace

int main() {
  uint64_t all[64], left[64], right[64];
  for (int k = 0; k < 64; ++k) {
    all[k] = ~uint64_t{0};
    left[k] = ~uint64_t{0} >> (63 - k);
    right[k] = ~uint64_t{0} << k;
  }
  static Parts parts;
  std::printf("%-16s %6s %6s %8s %6s %8s %8s\n", "", "find", "S", "softmax", "P V", "exp(S)", "dV");
  parts.measure("whole", all);
  parts.measure("left edge", left);
  parts.measure("right edge", right);
}
