// What tells valgrind where a case begins and ends. Without valgrind these do nothing.
#include <valgrind/callgrind.h>

extern "C" void start_counting() {
  CALLGRIND_START_INSTRUMENTATION;
  CALLGRIND_ZERO_STATS;
}

extern "C" void end_counting(const char* name) {
  CALLGRIND_DUMP_STATS_AT(name);
  CALLGRIND_STOP_INSTRUMENTATION;
}
