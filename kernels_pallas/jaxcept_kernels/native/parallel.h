// Loops over XLA's own thread pool.
#pragma once

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>

#include "xla/ffi/api/ffi.h"

namespace jaxcept {

static inline void pause_cpu() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// How long the caller looks for the last item's end before it sleeps: a wake-up costs some microseconds, but giving the
// processor away while it looks would cost a time slice on a busy machine.
constexpr int kSpins = 2000;

// Runs body(0) .. body(count - 1), each once, on the caller and on up to threads - 1 workers, and returns when all are
// done. The caller takes items like any worker, so that it never waits for an item that nobody has begun: a pool whose
// threads are all busy costs time, not a deadlock. A worker that comes late finds no item and leaves `body` alone.
template <typename Body>
class Loop {
 public:
  Loop(int64_t count, const Body* body) : count_(count), body_(body) {}

  void work() {
    for (int64_t item = next_.fetch_add(1); item < count_; item = next_.fetch_add(1)) {
      (*body_)(item);
      if (done_.fetch_add(1) + 1 == count_) {
        std::lock_guard<std::mutex> lock(mutex_);
        finished_.notify_one();
      }
    }
  }

  void wait() {
    for (int spins = 0; spins < kSpins; ++spins) {
      if (done_.load() == count_) return;
      pause_cpu();
    }
    std::unique_lock<std::mutex> lock(mutex_);
    finished_.wait(lock, [this] { return done_.load() == count_; });
  }

 private:
  const int64_t count_;
  const Body* const body_;
  std::atomic<int64_t> next_{0}, done_{0};
  std::mutex mutex_;
  std::condition_variable finished_;
};

template <typename Body>
void parallel_for(xla::ffi::ThreadPool& pool, int64_t count, const Body& body) {
  const int64_t workers = std::min(count, pool.num_threads()) - 1;
  if (workers <= 0) {
    for (int64_t item = 0; item < count; ++item) body(item);
    return;
  }
  auto loop = std::make_shared<Loop<Body>>(count, &body);
  for (int64_t i = 0; i < workers; ++i) pool.Schedule([loop] { loop->work(); });
  loop->work();
  loop->wait();
}

}  // namespace jaxcept
