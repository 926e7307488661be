// A lock that ThreadSanitizer takes no order from, for what is the emulator's own: the units that
// threads share. What the kernel may rely on is said beside it, by release and acquire.
#pragma once

#include <condition_variable>
#include <mutex>

#if defined(__SANITIZE_THREAD__)
#define SPARSE_ATTN_EMULATOR_TSAN
#elif defined(__has_feature)
#if __has_feature(thread_sanitizer)
#define SPARSE_ATTN_EMULATOR_TSAN
#endif
#endif
#ifdef SPARSE_ATTN_EMULATOR_TSAN
#include <sanitizer/tsan_interface.h>
// ThreadSanitizer's, of which its header says nothing.
extern "C" void AnnotateIgnoreReadsBegin(const char* file, int line);
extern "C" void AnnotateIgnoreReadsEnd(const char* file, int line);
extern "C" void AnnotateIgnoreWritesBegin(const char* file, int line);
extern "C" void AnnotateIgnoreWritesEnd(const char* file, int line);
extern "C" void AnnotateIgnoreSyncBegin(const char* file, int line);
extern "C" void AnnotateIgnoreSyncEnd(const char* file, int line);
#endif

namespace sparse_attn::cuda::emulator {

#ifdef SPARSE_ATTN_EMULATOR_TSAN
struct HiddenOrder {
  HiddenOrder() { AnnotateIgnoreSyncBegin(__FILE__, __LINE__); }
  HiddenOrder(const HiddenOrder&) = delete;
  HiddenOrder& operator=(const HiddenOrder&) = delete;
  ~HiddenOrder() { AnnotateIgnoreSyncEnd(__FILE__, __LINE__); }
};
struct HiddenAccesses {
  HiddenAccesses() {
    AnnotateIgnoreReadsBegin(__FILE__, __LINE__);
    AnnotateIgnoreWritesBegin(__FILE__, __LINE__);
  }
  HiddenAccesses(const HiddenAccesses&) = delete;
  HiddenAccesses& operator=(const HiddenAccesses&) = delete;
  ~HiddenAccesses() {
    AnnotateIgnoreWritesEnd(__FILE__, __LINE__);
    AnnotateIgnoreReadsEnd(__FILE__, __LINE__);
  }
};
inline void tell_release(void* order) { __tsan_release(order); }
inline void tell_acquire(void* order) { __tsan_acquire(order); }
#else
struct HiddenOrder {
  HiddenOrder() {}
};
struct HiddenAccesses {
  HiddenAccesses() {}
};
inline void tell_release(void*) {}
inline void tell_acquire(void*) {}
#endif

class HiddenLock {
 public:
  explicit HiddenLock(std::mutex& mutex) : mutex_(mutex) {
    const HiddenOrder hidden;
    mutex_.lock();
  }
  HiddenLock(const HiddenLock&) = delete;
  HiddenLock& operator=(const HiddenLock&) = delete;
  ~HiddenLock() {
    const HiddenOrder hidden;
    mutex_.unlock();
  }
  void wait(std::condition_variable& changed) {
    const HiddenOrder hidden;
    std::unique_lock<std::mutex> held(mutex_, std::adopt_lock);
    changed.wait(held);
    held.release();
  }

 private:
  std::mutex& mutex_;
  const HiddenAccesses accesses_;  // while it is held
};

}  // namespace sparse_attn::cuda::emulator
