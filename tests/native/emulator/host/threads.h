// The slow executor: every emulated thread is an OS thread, so that ThreadSanitizer sees each
// access to shared memory as its thread's own.
//
// In ThreadSanitizer's eyes a lock orders what its holders did before and do after. So none is
// shared by threads that do not meet: it would hide the races that this executor is there to find.
#pragma once

#include <atomic>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "host/copies.h"
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

class Executor {
 public:
  static constexpr const char* kName = "threads";

  void run() {
    barrier_ = std::make_unique<GatePair<BarrierMeeting>>();
    warps_ = std::vector<GatePair<WarpMeeting>>(static_cast<std::size_t>(block->threads / kWarp));
    counts_ = block->threads;
    std::vector<std::thread> threads;
    for (const int i : shuffled(block->threads, block->random))
      threads.emplace_back([this, i] { run_thread(i); });
    for (std::thread& thread : threads) thread.join();
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
};

inline Executor executor;

}  // namespace sparse_attn::cuda::emulator
