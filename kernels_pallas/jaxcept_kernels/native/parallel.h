// Loops over XLA's own thread pool.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <thread>

#include "xla/ffi/api/ffi.h"

namespace jaxcept {

static inline void pause_cpu() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Runs body(0) .. body(count - 1), each once, on the caller and on up to threads - 1 workers, and returns when all are
// done. The caller takes items like any worker, so that it never waits for an item that nobody has begun: a pool whose
// threads are all busy costs time, not a deadlock. A worker that comes late finds no item and leaves `body` alone.
template <typename Body>
void parallel_for(xla::ffi::ThreadPool& pool, int64_t count, const Body& body) {
  struct State {
    explicit State(int64_t n, const Body* b) : count(n), body(b) {}
    const int64_t count;
    const Body* const body;
    std::atomic<int64_t> next{0};
    std::atomic<int64_t> done{0};
    void work() {
      for (int64_t item = next.fetch_add(1, std::memory_order_relaxed); item < count;
           item = next.fetch_add(1, std::memory_order_relaxed)) {
        (*body)(item);
        done.fetch_add(1, std::memory_order_release);
      }
    }
  };
  const int64_t workers = std::min<int64_t>(count, std::max<int64_t>(pool.num_threads(), 1)) - 1;
  if (workers <= 0) {
    for (int64_t item = 0; item < count; ++item) body(item);
    return;
  }
  auto state = std::make_shared<State>(count, &body);
  for (int64_t i = 0; i < workers; ++i) pool.Schedule([state] { state->work(); });
  state->work();
  for (int spins = 0; state->done.load(std::memory_order_acquire) < count; ++spins) {
    if (spins < 4096) pause_cpu();
    else std::this_thread::yield();
  }
}

}  // namespace jaxcept
