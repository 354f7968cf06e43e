#pragma once

#include "torch_stable.h"

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <vector>

namespace swift_kernels {

// Multiply-adds that are worth a thread: about 5 us of work, against 1 to 2 us to wake one.
constexpr int64_t MIN_PRODUCTS_PER_THREAD = 32 * 1024;

// Threads that share `tasks` tasks of so many multiply-adds in all.
inline int64_t worthwhile_threads(int64_t products, int64_t tasks) {
  const int64_t available = std::min<int64_t>(torch::stable::get_num_threads(), tasks);
  return std::clamp<int64_t>(products / MIN_PRODUCTS_PER_THREAD, 1, std::max<int64_t>(available, 1));
}

// Calls `run(task, next, scratch)` for every task below `tasks`; `next` is the task that the same thread runs
// afterwards, or the same one again when there is none, and `scratch` holds `scratch_floats` floats of the thread's
// own. Threads claim tasks as they go, so that one that wakes late or loses its core holds nothing up. A task is
// claimed ahead of its turn, for the one before to prefetch what it needs.
template <typename Run>
void run_tasks(int64_t tasks, int64_t threads, int64_t scratch_floats, const Run& run) {
  struct alignas(64) Line {
    float values[16];
  };
  std::atomic<int64_t> claimed{0};
  const auto work = [&](int64_t, int64_t) {
    std::vector<Line> scratch((scratch_floats + 15) / 16);
    float* floats = reinterpret_cast<float*>(scratch.data());
    int64_t task = claimed.fetch_add(1, std::memory_order_relaxed);
    while (task < tasks) {
      const int64_t next = claimed.fetch_add(1, std::memory_order_relaxed);
      run(task, next < tasks ? next : task, floats);
      task = next;
    }
  };
  torch::stable::parallel_for(0, threads, 1, work);
}

// Runs `work(begin, end)` over [0, count), where an item costs so many multiply-adds.
template <typename Work>
void for_items(int64_t count, int64_t products, const Work& work) {
  torch::stable::parallel_for(
      0, count, std::max<int64_t>(1, MIN_PRODUCTS_PER_THREAD / std::max<int64_t>(1, products)), work);
}

}  // namespace swift_kernels
