// A thread that rewrites slots as fast as it can: to other slots, to none, and to some that do not exist.

#include <atomic>
#include <cstdint>
#include <thread>

#define EXPORTED extern "C" __attribute__((visibility("default")))

namespace {

std::atomic<bool> stopped;
std::thread writer;

}  // namespace

EXPORTED void start_writing(int64_t* slots, int64_t rows, int64_t slot_count) {
  stopped = false;
  writer = std::thread([=] {
    for (int64_t turn = 0; !stopped.load(std::memory_order_relaxed); ++turn)
      for (int64_t row = 0; row < rows; ++row) {
        const int64_t values[] = {(row + turn) % slot_count, -1, row, slot_count << 20};
        // Far away once in a while: most steps shall pass the check, and write.
        __atomic_store_n(slots + row, values[turn % 64 == 0 ? 3 : turn % 3], __ATOMIC_RELAXED);
      }
  });
}

EXPORTED void stop_writing() {
  stopped = true;
  writer.join();
}
