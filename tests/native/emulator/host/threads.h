// The slow executor: every emulated thread is an OS thread, so that ThreadSanitizer sees each
// access to shared memory as its thread's own.
//
// In ThreadSanitizer's eyes a lock orders what its holders did before and do after. So none is
// shared by threads that do not meet: it would hide the races that this executor is there to find.
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

#include "host/copies.h"
#include "host/hidden_lock.h"
#include "host/meetings.h"

namespace sparse_attn::cuda::emulator {

/// A meeting that threads wait for.
template <class Meeting>
class Gate {
 public:
  /// arrive(meeting) is true for the last; then opens() is called, for all others waits().
  template <class Arrive, class Waits, class Opens>
  void pass(Arrive arrive, Waits waits, Opens opens) {
    std::unique_lock<std::mutex> lock(mutex_);
    if (arrive(meeting_)) {
      opens();
      ++round_;
      opened_.notify_all();
      return;
    }
    waits();
    const unsigned round = round_;
    opened_.wait(lock, [&] { return round_ != round; });
  }
  const Meeting& meeting() const { return meeting_; }

 private:
  std::mutex mutex_;
  std::condition_variable opened_;
  unsigned round_ = 0;
  Meeting meeting_;
};

/// Two gates that take turns: with one, who leaves late would take the lock after somebody who has
/// come for the next time, and seem ordered after that one's accesses: a race of the first thread
/// with the last was then never reported in 20 runs, and is always so.
template <class Meeting>
struct GatePair {
  Gate<Meeting>& at(unsigned pass) { return gates[pass % 2]; }
  Gate<Meeting> gates[2];
};

/// Threads that wait for the same thing.
struct Waiters {
  std::condition_variable changed;
  unsigned wakes = 0;
  int threads = 0;
};

class Executor {
 public:
  static constexpr const char* kName = "threads";

  /// What several threads use is used under it.
  struct Lock : HiddenLock {
    Lock();
  };

  void run() {
    barrier_ = std::make_unique<GatePair<BarrierMeeting>>();
    warps_ = std::vector<GatePair<WarpMeeting>>(static_cast<std::size_t>(block->threads / kWarp));
    counts_ = block->threads;
    std::vector<std::thread> threads;
    for (const int i : shuffled(block->threads, block->random))
      threads.emplace_back([this, i] { run_thread(i); });
    for (std::thread& thread : threads) thread.join();
    for (std::thread& action : later_) action.join();
    later_.clear();
  }

  bool barrier(const char* name, bool predicate) {
    Gate<BarrierMeeting>& gate = barrier_->at(own().barriers++);
    gate.pass([&](BarrierMeeting& meeting) { return meeting.arrive(name, predicate); },
              [&] { wait_at(name); }, [&] { wake(block->threads - 1); });
    block->set_place(thread(), nullptr);
    return gate.meeting().any();
  }

  void collective(const Collective& which, int argument, void* operands) {
    GatePair<WarpMeeting>& gates = warps_[static_cast<std::size_t>(thread() / kWarp)];
    gates.at(own().collectives++)
        .pass(
            [&](WarpMeeting& meeting) {
              return meeting.arrive(which, argument, thread() % kWarp, operands);
            },
            [&] { wait_at(which.name); }, [&] { wake(kWarp - 1); });
    block->set_place(thread(), nullptr);
  }

  Copies& copies() { return own().copies; }

  /// Until is_over(): who makes it so wakes all.
  template <class IsOver>
  void wait(Lock& lock, Waiters& waiters, const char* place, IsOver is_over) {
    while (!is_over()) {
      ++waiters.threads;
      wait_at(place);
      const unsigned wakes = waiters.wakes;
      while (waiters.wakes == wakes) lock.wait(waiters.changed);
    }
    block->set_place(thread(), nullptr);
  }
  void wake_all(Waiters& waiters) {
    wake(waiters.threads);
    waiters.threads = 0;
    ++waiters.wakes;
    waiters.changed.notify_all();
  }
  void pause() { std::this_thread::yield(); }

  /// `action` is not the thread's own, and happens at any time from now on: it has an OS thread of
  /// its own, which is ordered after this place and not after what the thread does next.
  void later(std::function<void()> action) {
    add(1);
    const unsigned by = threadIdx.x;
    std::thread unit([this, by, action = std::move(action)] {
      threadIdx.x = by;
      std::this_thread::sleep_for(delay());
      action();
      check_progress(add(-1));
    });
    const Lock lock;
    later_.push_back(std::move(unit));
  }

  /// What one thread did before a release, another sees after its acquire. Under the lock.
  void release(void* order) { tell_release(order); }
  void acquire(void* order) { tell_acquire(order); }

 private:
  struct Own {
    Copies copies;
    unsigned barriers = 0, collectives = 0;
  };
  static Own& own() {
    thread_local Own own;
    return own;
  }
  static int thread() { return static_cast<int>(threadIdx.x); }

  void run_thread(int number) {
    threadIdx.x = static_cast<unsigned>(number);
    blockIdx.x = static_cast<unsigned>(block->number);
    blockDim.x = static_cast<unsigned>(block->threads);
    gridDim.x = static_cast<unsigned>(block->blocks);
    block->body(block->arguments);
    own().copies.check_landed();
    block->set_place(number, "the end");
    check_progress(add(-1));
  }

  /// At once, or after so long that threads wait.
  static std::chrono::microseconds delay() {
    const Lock lock;
    return std::chrono::microseconds(block->random.below(1 << block->random.below(10)));
  }

  void wait_at(const char* name) {
    block->set_place(thread(), name);
    check_progress(add(kOneWaits - 1));
  }
  void wake(int threads) { add(threads * (1 - kOneWaits)); }

  /// Relaxed: orders nothing.
  std::int64_t add(std::int64_t change) {
    return counts_.fetch_add(change, std::memory_order_relaxed) + change;
  }
  static void check_progress(std::int64_t counts) {
    if (counts > 0 && counts % kOneWaits == 0) block->fail_deadlock();
  }

  static constexpr std::int64_t kOneWaits = 1 << 16;
  std::atomic<std::int64_t> counts_{0};  // threads that run, and kOneWaits for each that waits
  std::unique_ptr<GatePair<BarrierMeeting>> barrier_;
  std::vector<GatePair<WarpMeeting>> warps_;
  std::mutex units_;
  std::vector<std::thread> later_;
};

inline Executor executor;

inline Executor::Lock::Lock() : HiddenLock(executor.units_) {}

}  // namespace sparse_attn::cuda::emulator
