// The fast executor: every emulated thread is a fiber, a stack of its own on the one OS thread.
//
// A fiber runs until it waits for others; the next one is drawn at random. Mostly a lane of the
// same warp: a warp then gets as far as it can while others have not begun. Of the barriers missing
// in planted_kernel.h that shows 8 in 10 runs; if all threads were drawn alike, none.
#pragma once

#include <sys/mman.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <utility>
#include <vector>

#include "host/copies.h"
#include "host/meetings.h"
#include "host/switch_stack.h"

#ifdef SPARSE_ATTN_EMULATOR_ASAN
#include <sanitizer/common_interface_defs.h>
#endif

namespace sparse_attn::cuda::emulator {

/// Memory for a stack; the page below it faults.
class Stack {
 public:
  Stack() {
    void* memory = mmap(nullptr, kBytes, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) fail("no memory for a stack");
    memory_ = static_cast<char*>(memory);
    if (mprotect(memory_, kGuard, PROT_NONE) != 0) fail("no guard page for a stack");
  }
  Stack(const Stack&) = delete;
  Stack& operator=(const Stack&) = delete;
  ~Stack() { munmap(memory_, kBytes); }

  char* bottom() const { return memory_ + kGuard; }
  char* top() const { return memory_ + kBytes; }

 private:
  static constexpr std::size_t kBytes = 512 * 1024, kGuard = 64 * 1024;
  char* memory_;
};

/// Threads that can go on.
class ReadyThreads {
 public:
  explicit ReadyThreads(int threads) : warps_(static_cast<std::size_t>(threads / kWarp)) {}

  void add(int thread) {
    Warp& warp = warps_[static_cast<std::size_t>(thread / kWarp)];
    warp.threads[warp.count++] = thread;
  }

  /// Takes one out; -1 if there is none.
  int draw(Random& random) {
    constexpr int kStay = 64;  // draws in a row from one warp, on average
    if (warp_->count == 0 || random.below(kStay) == 0) change_warp(random);
    if (warp_->count == 0) return -1;
    int& drawn = warp_->threads[random.below(warp_->count)];
    const int thread = drawn;
    drawn = warp_->threads[--warp_->count];
    return thread;
  }

  /// The next is drawn from its warp.
  void go_to(int thread) { warp_ = &warps_[static_cast<std::size_t>(thread / kWarp)]; }

 private:
  struct Warp {
    int threads[kWarp];
    int count = 0;
  };

  void change_warp(Random& random) {
    const auto first = static_cast<std::size_t>(random.below(static_cast<int>(warps_.size())));
    for (std::size_t i = 0; i < warps_.size(); ++i) {
      warp_ = &warps_[(first + i) % warps_.size()];
      if (warp_->count > 0) return;
    }
  }

  std::vector<Warp> warps_;
  Warp* warp_ = &warps_[0];
};

/// What units other than threads do, each at a moment of its own: after some switches.
class Later {
 public:
  void add(std::function<void()> action, Random& random) {
    constexpr int kScales = 12;  // soon, or after thousands
    const int delay = random.below(1 << random.below(kScales)) + 1;
    actions_.push_back({switches_ + static_cast<std::uint64_t>(delay), std::move(action)});
  }
  /// With every switch of the threads.
  void tick() {
    ++switches_;
    for (std::size_t i = 0; i < actions_.size();) actions_[i].due <= switches_ ? run(i) : (void)++i;
  }
  /// Any one, when there is nothing else to do.
  bool run_one(Random& random) {
    if (actions_.empty()) return false;
    run(static_cast<std::size_t>(random.below(static_cast<int>(actions_.size()))));
    return true;
  }

 private:
  struct Action {
    std::uint64_t due;
    std::function<void()> run;
  };

  void run(std::size_t i) {
    std::swap(actions_[i], actions_.back());
    const std::function<void()> action = std::move(actions_.back().run);
    actions_.pop_back();
    action();
  }

  std::vector<Action> actions_;
  std::uint64_t switches_ = 0;
};

/// Threads that wait for the same thing.
struct Waiters {
  std::vector<int> threads;
};

class Executor {
 public:
  static constexpr const char* kName = "fibers";

  /// What several threads use is used under it.
  struct Lock {
    Lock() {}
  };

  void run() {
    const auto threads = static_cast<std::size_t>(block->threads);
    while (fibers_.size() < threads)
      fibers_.push_back(std::make_unique<Fiber>(static_cast<unsigned>(fibers_.size()), enter));
    ready_ = std::make_unique<ReadyThreads>(block->threads);
    barrier_ = BarrierMeeting();
    warps_.assign(threads / kWarp, WarpMeeting());
    later_ = Later();
    live_ = block->threads;
    from_caller_ = true;
    blockIdx.x = static_cast<unsigned>(block->number);
    blockDim.x = static_cast<unsigned>(block->threads);
    gridDim.x = static_cast<unsigned>(block->blocks);
    for (int i = 0; i < block->threads; ++i) ready_->add(i);
    switch_to(*fibers_[static_cast<std::size_t>(ready_->draw(block->random))]);
  }

  bool barrier(const char* name, bool predicate) {
    if (barrier_.arrive(name, predicate)) {
      for (int i = 0; i < block->threads; ++i) wake(i);
    } else {
      block->set_place(thread(), name);
    }
    run_others();
    return barrier_.any();
  }

  void collective(const Collective& which, int argument, void* operands) {
    const int warp = thread() / kWarp;
    if (warps_[static_cast<std::size_t>(warp)].arrive(which, argument, thread() % kWarp,
                                                      operands)) {
      for (int i = 0; i < kWarp; ++i) wake(warp * kWarp + i);
    } else {
      block->set_place(thread(), which.name);
    }
    run_others();
  }

  Copies& copies() { return running_->copies; }

  /// Until is_over(): who makes it so wakes all.
  template <class IsOver>
  void wait(Lock&, Waiters& waiters, const char* place, IsOver is_over) {
    while (!is_over()) {
      waiters.threads.push_back(thread());
      block->set_place(thread(), place);
      run_others();
    }
  }
  void wake_all(Waiters& waiters) {
    for (const int woken : waiters.threads) wake(woken);
    if (!waiters.threads.empty()) ready_->go_to(waiters.threads[0]);
    waiters.threads.clear();
  }
  /// What those just woken do may come before what this thread does next.
  void pause() {
    if (block->random.below(2) == 0) return;
    ready_->add(thread());
    run_others();
  }
  /// `action` is not the thread's own, and happens at any time from now on.
  void later(std::function<void()> action) { later_.add(std::move(action), block->random); }

  /// What one thread did before a release, another sees after its acquire.
  void release(void*) {}
  void acquire(void*) {}

 private:
  struct Fiber {
    Fiber() = default;  // what called run()
    Fiber(unsigned number, void (*entry)())
        : thread(number),
          own_stack(std::make_unique<Stack>()),
          stack(own_stack->bottom()),
          stack_bytes(static_cast<std::size_t>(own_stack->top() - own_stack->bottom())),
          saved(prepare_stack(own_stack->top(), entry)) {}

    unsigned thread = 0;
    std::unique_ptr<Stack> own_stack;
    const void* stack = nullptr;
    std::size_t stack_bytes = 0;
    void* saved = nullptr;
    void* fake_stack = nullptr;  // AddressSanitizer's
    Copies copies;
  };

  static int thread() { return static_cast<int>(threadIdx.x); }

  void wake(int woken) {
    block->set_place(woken, nullptr);
    ready_->add(woken);
  }

  void run_others() {
    later_.tick();
    int next = ready_->draw(block->random);
    while (next < 0 && later_.run_one(block->random)) next = ready_->draw(block->random);
    if (next < 0) block->fail_deadlock();
    Fiber& fiber = *fibers_[static_cast<std::size_t>(next)];
    if (&fiber != running_) switch_to(fiber);
  }

  /// The first function of every fiber: one round for each block.
  static void enter();

  void run_thread() {
    block->body(block->arguments);
    running_->copies.check_landed();
    running_->copies = Copies();
    block->set_place(thread(), "the end");
    if (--live_ == 0) {
      switch_to(caller_);
    } else {
      run_others();
    }
  }

  void switch_to(Fiber& to) {
    Fiber& from = *running_;
    running_ = &to;
    threadIdx.x = to.thread;
#ifdef SPARSE_ATTN_EMULATOR_ASAN
    __sanitizer_start_switch_fiber(&from.fake_stack, to.stack, to.stack_bytes);
#endif
    sparse_attn_switch_stack(&from.saved, to.saved);
    finish_switch();
  }

  /// On the new stack. The first switch from the caller tells where its stack is.
  void finish_switch() {
#ifdef SPARSE_ATTN_EMULATOR_ASAN
    const void* left = nullptr;
    std::size_t left_bytes = 0;
    __sanitizer_finish_switch_fiber(running_->fake_stack, &left, &left_bytes);
    if (!from_caller_) return;
    caller_.stack = left;
    caller_.stack_bytes = left_bytes;
#endif
    from_caller_ = false;
  }

  std::vector<std::unique_ptr<Fiber>> fibers_;  // fiber i is thread i of every block
  Fiber caller_;
  Fiber* running_ = &caller_;
  bool from_caller_ = true;
  int live_ = 0;
  Later later_;
  std::unique_ptr<ReadyThreads> ready_;
  BarrierMeeting barrier_;
  std::vector<WarpMeeting> warps_;
};

inline Executor executor;

inline void Executor::enter() {
  executor.finish_switch();
  for (;;) executor.run_thread();
}

}  // namespace sparse_attn::cuda::emulator
