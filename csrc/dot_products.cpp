// The arithmetic of score_step for each instruction set, chosen at run time: one binary serves every CPU. Functions
// carry their own target, because a translation unit compiled for AVX-512 could leak such code into inline functions
// that the linker then shares with the rest.

#include "dot_products.h"

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cstdlib>
#include <stdexcept>
#include <string>
#include <type_traits>

#if defined(__x86_64__)
#define SWIFT_KERNELS_X86
#include <cpuid.h>
#include <immintrin.h>
#endif

#define ALWAYS_INLINE inline __attribute__((always_inline))

namespace swift_kernels {
namespace {

using c10::BFloat16;
using c10::Half;

template <typename Hidden>
const Hidden* row_of(const DotProducts& task, int64_t row) {
  return static_cast<const Hidden*>(task.hidden) + task.rows[row] * task.hidden_stride;
}

// How far ahead rows are prefetched, in blocks of rows that share a pass over the weights.
constexpr int64_t PREFETCH_BLOCKS = 2;

// Into the second-level cache: hardware prefetchers do not see from one row to the next, and prefetching into the first
// level is slower than not prefetching at all.
template <int64_t BYTES>
ALWAYS_INLINE void prefetch(const void* address) {
  for (int64_t line = 0; line < BYTES; line += 64)
    __builtin_prefetch(static_cast<const char*>(address) + line, /*rw=*/0, /*locality=*/2);
}

namespace portable {
#define TARGET

// Independent lanes, which compilers turn into whatever vectors the target has.
struct Vector {
  static constexpr int64_t STEP = 16;
  static constexpr int ROWS = 2;
  struct Values {
    float lane[STEP];
  };

  static ALWAYS_INLINE Values zero() {
    return {};
  }

  template <typename Hidden, typename Element>
  static ALWAYS_INLINE Values load(const Element* source) {
    Values out;
    for (int64_t i = 0; i < STEP; ++i)
      out.lane[i] = static_cast<float>(source[i]);
    return out;
  }

  static ALWAYS_INLINE Values multiply_add(const Values& a, const Values& b, const Values& c) {
    Values out;
    for (int64_t i = 0; i < STEP; ++i)
      out.lane[i] = c.lane[i] + a.lane[i] * b.lane[i];
    return out;
  }

  static ALWAYS_INLINE float reduce(Values v) {
    for (int64_t half = STEP / 2; half > 0; half /= 2)
      for (int64_t i = 0; i < half; ++i)
        v.lane[i] += v.lane[i + half];
    return v.lane[0];
  }
};

#include "dot_products_body.h"
#undef TARGET
}  // namespace portable

#ifdef SWIFT_KERNELS_X86

namespace avx2 {
#define TARGET __attribute__((target("avx2,fma,f16c")))

struct Vector {
  static constexpr int64_t STEP = 16;
  static constexpr int ROWS = 2;  // with two outputs, 8 accumulators of 16 registers
  struct Values {
    __m256 low, high;
  };

  TARGET static ALWAYS_INLINE Values zero() {
    return {_mm256_setzero_ps(), _mm256_setzero_ps()};
  }

  template <typename Hidden, typename Element>
  TARGET static ALWAYS_INLINE Values load(const Element* source) {
    return {load_half(source), load_half(source + STEP / 2)};
  }

  TARGET static ALWAYS_INLINE __m256 load_half(const float* source) {
    return _mm256_loadu_ps(source);
  }
  TARGET static ALWAYS_INLINE __m256 load_half(const BFloat16* source) {
    const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(source));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
  }
  TARGET static ALWAYS_INLINE __m256 load_half(const Half* source) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(source)));
  }

  TARGET static ALWAYS_INLINE Values multiply_add(const Values& a, const Values& b, const Values& c) {
    return {_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)};
  }

  TARGET static ALWAYS_INLINE float reduce(const Values& v) {
    const __m256 lanes = _mm256_add_ps(v.low, v.high);
    __m128 sum = _mm_add_ps(_mm256_castps256_ps128(lanes), _mm256_extractf128_ps(lanes, 1));
    sum = _mm_add_ps(sum, _mm_movehl_ps(sum, sum));
    return _mm_cvtss_f32(_mm_add_ss(sum, _mm_movehdup_ps(sum)));
  }
};

#include "dot_products_body.h"
#undef TARGET
}  // namespace avx2

namespace avx512 {
#define TARGET __attribute__((target("avx512f")))

struct Vector {
  static constexpr int64_t STEP = 32;
  static constexpr int ROWS = 4;  // with two outputs, 16 accumulators of 32 registers
  struct Values {
    __m512 low, high;
  };

  TARGET static ALWAYS_INLINE Values zero() {
    return {_mm512_setzero_ps(), _mm512_setzero_ps()};
  }

  // bfloat16 is the upper half of a float: a shift and a mask turn one register of 32 into the even and the odd ones,
  // where widening 16 at a time takes a load and a shuffle more. The weights then follow that order.
  template <typename Hidden, typename Element>
  TARGET static ALWAYS_INLINE Values load(const Element* source) {
    if constexpr (std::is_same_v<Hidden, BFloat16>)
      return load_even_odd(source);
    else
      return {load_half(source), load_half(source + STEP / 2)};
  }

  TARGET static ALWAYS_INLINE Values load_even_odd(const BFloat16* source) {
    const __m512i bits = _mm512_loadu_si512(source);
    const __m512i odd = _mm512_and_si512(bits, _mm512_set1_epi32(static_cast<int>(0xffff0000)));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(bits, 16)), _mm512_castsi512_ps(odd)};
  }
  TARGET static ALWAYS_INLINE Values load_even_odd(const float* source) {
    const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    const __m512i odd = _mm512_setr_epi32(1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
    const __m512 low = _mm512_loadu_ps(source);
    const __m512 high = _mm512_loadu_ps(source + STEP / 2);
    return {_mm512_permutex2var_ps(low, even, high), _mm512_permutex2var_ps(low, odd, high)};
  }

  TARGET static ALWAYS_INLINE __m512 load_half(const float* source) {
    return _mm512_loadu_ps(source);
  }
  TARGET static ALWAYS_INLINE __m512 load_half(const BFloat16* source) {
    const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(source));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
  }
  TARGET static ALWAYS_INLINE __m512 load_half(const Half* source) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(source)));
  }

  TARGET static ALWAYS_INLINE Values multiply_add(const Values& a, const Values& b, const Values& c) {
    return {_mm512_fmadd_ps(a.low, b.low, c.low), _mm512_fmadd_ps(a.high, b.high, c.high)};
  }

  TARGET static ALWAYS_INLINE float reduce(const Values& v) {
    return _mm512_reduce_add_ps(_mm512_add_ps(v.low, v.high));
  }
};

#include "dot_products_body.h"
#undef TARGET
}  // namespace avx512

#endif  // SWIFT_KERNELS_X86

// Ascending: a machine that has one has those before it.
enum class Isa { portable, avx2, avx512 };

constexpr const char* ISA_NAMES[] = {"portable", "avx2", "avx512"};

Isa best_isa() {
#ifdef SWIFT_KERNELS_X86
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

}  // namespace

DotProductsFn select_dot_products(HiddenDtype hidden, WeightDtype weight, int outputs) {
  switch (select_isa()) {
#ifdef SWIFT_KERNELS_X86
    case Isa::avx512:
      return avx512::select(hidden, weight, outputs);
    case Isa::avx2:
      return avx2::select(hidden, weight, outputs);
#endif
    default:
      return portable::select(hidden, weight, outputs);
  }
}

}  // namespace swift_kernels
