// Warpgroups: what wgmma does for each warp, and that its four warps say the same.
#pragma once

#include <deque>
#include <string>
#include <vector>

#include "host/executor.h"
#include "host/wgmma.h"

namespace sparse_attn::cuda::emulator {

/// One instruction of a warp, as far as those of the others must be the same.
struct WgmmaStep {
  Wgmma which;
  int argument;

  bool operator==(const WgmmaStep& other) const {
    return is_same(which, other.which) && argument == other.argument;
  }
  std::string text() const {
    if (which.columns == 0) return std::string(which.name) + "(" + std::to_string(argument) + ")";
    return std::string(which.name) + (which.major == Major::kDepth ? "<kDepth>" : "<kOther>") +
           "(d, " + (which.registers != nullptr ? "registers" : text_of_descriptor(which.a)) +
           ", " + text_of_descriptor(which.b) + ", " + (which.add ? "true" : "false") + ")";
  }
};

class Warpgroup {
 public:
  static constexpr int kWarps = 4;

  explicit Warpgroup(Random& random)
      : warps{{0, random.word()}, {1, random.word()}, {2, random.word()}, {3, random.word()}} {}

  /// The first warp to come to a step decides what it is.
  void pass(int warp, const WgmmaStep& step) {
    const Executor::Lock lock;
    const auto place = static_cast<std::size_t>(passed_[warp]++ - forgotten_);
    if (place == steps_.size()) steps_.push_back(step);
    if (!(steps_[place] == step)) {
      fail("the warps of a warpgroup differ: " + step.text() + " here, " + steps_[place].text() +
           " by another warp");
    }
    while (!steps_.empty() && all_passed()) {
      steps_.pop_front();
      ++forgotten_;
    }
  }

  void check_done() const {
    for (const WarpProducts& warp : warps) warp.check_done();
    if (!steps_.empty()) {
      fail("the warps of a warpgroup differ: some end without " + steps_.front().text() +
           ", which another has had");
    }
  }

  WarpProducts warps[kWarps];

 private:
  bool all_passed() const {
    for (const int passed : passed_) {
      if (passed == forgotten_) return false;
    }
    return true;
  }

  std::deque<WgmmaStep> steps_;  // that some warps have not had
  int passed_[kWarps] = {};
  int forgotten_ = 0;
};

class Warpgroups {
 public:
  Warpgroups(int threads, Random& random) {
    for (int i = 0; i < threads / kWarp / Warpgroup::kWarps; ++i) groups_.emplace_back(random);
  }

  WarpProducts& pass(const WgmmaStep& step) {
    const int warp = static_cast<int>(threadIdx.x) / kWarp;
    const auto group = static_cast<std::size_t>(warp / Warpgroup::kWarps);
    if (group >= groups_.size())
      fail(std::string(step.which.name) + " by a warpgroup of fewer than four warps");
    groups_[group].pass(warp % Warpgroup::kWarps, step);
    return groups_[group].warps[warp % Warpgroup::kWarps];
  }

  void check_done() const {
    for (const Warpgroup& group : groups_) group.check_done();
  }

 private:
  std::deque<Warpgroup> groups_;  // none moves
};

}  // namespace sparse_attn::cuda::emulator
