// What the tests of the emulator have in common: kernels from lambdas, and kernels that are to
// fail.
#pragma once

#include <sys/wait.h>
#include <unistd.h>

#include <cstdlib>
#include <functional>
#include <iostream>
#include <string>
#include <string_view>

#include "check.h"
#include "cuda/launch.cuh"
#include "cuda/ptx.cuh"

namespace emulator_case {

using namespace sparse_attn::cuda;

#if defined(__SANITIZE_THREAD__)
constexpr bool kSeesRaces = true;
#else
constexpr bool kSeesRaces = false;
#endif

constexpr bool kFibers = std::string_view(emulator::Executor::kName) == "fibers";
constexpr int kSeeds = kFibers ? 20 : 2;

// ---- a kernel from a lambda ---------------------------------------------------------------------

template <class Body, int kThreads_, int kBytes>
struct BodyKernel {
  static constexpr int kThreads = kThreads_, kBlocksPerSM = 1, kSharedBytes = kBytes;
  static void run(const Body& body) { body(static_cast<int>(threadIdx.x)); }
};

template <int kThreads, int kBytes = 0, class Body>
void run_threads(const Body& body, int blocks = 1) {
  emulator::run<BodyKernel<Body, kThreads, kBytes>>(blocks, body);
}

template <class T>
T* shared() {
  return reinterpret_cast<T*>(shared_memory());
}

inline std::size_t at(int i) { return static_cast<std::size_t>(i); }

// ---- kernels that are to fail -------------------------------------------------------------------

struct Outcome {
  bool passed;
  int exit_code;  // -1 if a signal ended it
  std::string errors;
};

inline Outcome in_child(const std::function<bool()>& body) {
  int ends[2];
  if (pipe(ends) != 0) return {true, 0, "no pipe"};
  const pid_t child = fork();
  if (child == 0) {
    dup2(ends[1], STDERR_FILENO);
    std::exit(body() ? 0 : 3);
  }
  close(ends[1]);
  Outcome outcome{};
  char part[4096];
  for (ssize_t got; (got = read(ends[0], part, sizeof(part))) > 0;)
    outcome.errors.append(part, static_cast<std::size_t>(got));
  close(ends[0]);
  int status = 0;
  waitpid(child, &status, 0);
  outcome.exit_code = WIFEXITED(status) ? WEXITSTATUS(status) : -1;
  outcome.passed = outcome.exit_code == 0;
  return outcome;
}

inline bool contains(const std::string& text, const char* part) {
  return text.find(part) != std::string::npos;
}

/// The process ends, with these words.
inline void check_dies(const char* words, const std::function<void()>& body) {
  const Outcome outcome = in_child([&] {
    body();
    return true;
  });
  check::context = words;
  CHECK(!outcome.passed);
  CHECK(contains(outcome.errors, words));
  if (!contains(outcome.errors, words)) std::cerr << outcome.errors;
  check::context.clear();
}

}  // namespace emulator_case
