#include "isa.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace swift_kernels {
namespace {

constexpr const char* ISA_NAMES[] = {"portable", "avx2", "avx512"};

Isa best_isa() {
#if defined(__x86_64__)
  // __builtin_cpu_supports also asks whether the operating system saves the registers. Not every compiler lets it be
  // asked for F16C.
  unsigned eax, ebx, ecx, edx;
  const bool f16c = __get_cpuid(1, &eax, &ebx, &ecx, &edx) && (ecx & bit_F16C);
  if (__builtin_cpu_supports("avx512f"))
    return Isa::avx512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && f16c)
    return Isa::avx2;
#endif
  return Isa::portable;
}

}  // namespace

Isa select_isa() {
  static const Isa best = best_isa();
  const char* forced = std::getenv("SWIFT_KERNELS_CPU_ISA");
  if (forced == nullptr || *forced == '\0')
    return best;
  for (const Isa isa : {Isa::portable, Isa::avx2, Isa::avx512}) {
    if (forced != std::string(ISA_NAMES[static_cast<int>(isa)]))
      continue;
    if (isa > best)
      throw std::invalid_argument(
          "SWIFT_KERNELS_CPU_ISA is " + std::string(forced) + ": this machine supports " +
          ISA_NAMES[static_cast<int>(best)] + " at most");
    return isa;
  }
  throw std::invalid_argument(
      "SWIFT_KERNELS_CPU_ISA is " + std::string(forced) + ": expected avx512, avx2 or portable");
}

}  // namespace swift_kernels
