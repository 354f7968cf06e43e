// What each instruction set can do with STEP columns at a time. One binary serves every CPU: functions carry their own
// target, because a translation unit compiled for AVX-512 could leak such code into inline functions that the linker
// then shares with the rest. `for_each_isa.h` includes a kernel's source once for each of these namespaces.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cstdint>
#include <type_traits>

#if defined(__x86_64__)
#define SWIFT_KERNELS_X86
#include <immintrin.h>
#endif

#define ALWAYS_INLINE inline __attribute__((always_inline))

namespace swift_kernels {

using c10::BFloat16;
using c10::Half;

// Hardware prefetchers do not see from one row to the next: rows are prefetched this many passes ahead, of as many rows
// as share a pass.
constexpr int64_t PREFETCH_PASSES = 2;

// Into the second-level cache: prefetching into the first level is slower than not prefetching at all.
template <int64_t BYTES>
ALWAYS_INLINE void prefetch(const void* address) {
  for (int64_t line = 0; line < BYTES; line += 64)
    __builtin_prefetch(static_cast<const char*>(address) + line, /*rw=*/0, /*locality=*/2);
}

// A `Vector` holds STEP columns as Values, in an order that may depend on the dtype of the hidden states: whatever
// meets them is loaded and stored with that dtype as the first template argument. `load_sums` and `store_sums` keep the
// order.

namespace portable {
#define TARGET

// Independent lanes, which compilers turn into whatever vectors the target has.
struct Vector {
  static constexpr int64_t STEP = 16;
  static constexpr int DOT_ROWS = 2;
  static constexpr int SUM_ROWS = 4;
  using Scalar = float;
  struct Values {
    float lane[STEP];
  };

  static ALWAYS_INLINE Values zero() {
    return {};
  }
  static ALWAYS_INLINE Scalar broadcast(float value) {
    return value;
  }

  template <typename Hidden, typename Element>
  static ALWAYS_INLINE Values load(const Element* source) {
    if constexpr (std::is_same_v<Element, Half>)
      return widen(source);
    else
      return each([&](int64_t i) { return static_cast<float>(source[i]); });
  }
  template <typename Hidden, typename Element>
  static ALWAYS_INLINE void store(Element* target, const Values& v) {
    for (int64_t i = 0; i < STEP; ++i)
      target[i] = static_cast<Element>(v.lane[i]);
  }
  static ALWAYS_INLINE Values load_sums(const float* source) {
    return load<float>(source);
  }
  static ALWAYS_INLINE void store_sums(float* target, const Values& v) {
    store<float>(target, v);
  }

  // To the nearest value of the dtype, ties to even.
  template <typename Hidden>
  static ALWAYS_INLINE Values round(const Values& v) {
    return each([&](int64_t i) { return static_cast<float>(static_cast<Hidden>(v.lane[i])); });
  }

  static ALWAYS_INLINE Values multiply_add(const Values& a, const Values& b, const Values& c) {
    return each([&](int64_t i) { return c.lane[i] + a.lane[i] * b.lane[i]; });
  }
  static ALWAYS_INLINE Values multiply_add(const Values& a, Scalar b, const Values& c) {
    return each([&](int64_t i) { return c.lane[i] + a.lane[i] * b; });
  }
  static ALWAYS_INLINE Values multiply(const Values& a, const Values& b) {
    return each([&](int64_t i) { return a.lane[i] * b.lane[i]; });
  }
  static ALWAYS_INLINE Values multiply(const Values& a, Scalar b) {
    return each([&](int64_t i) { return a.lane[i] * b; });
  }
  static ALWAYS_INLINE Values add(const Values& a, const Values& b) {
    return each([&](int64_t i) { return a.lane[i] + b.lane[i]; });
  }
  static ALWAYS_INLINE Values add(const Values& a, Scalar b) {
    return each([&](int64_t i) { return a.lane[i] + b; });
  }

  static ALWAYS_INLINE float reduce(Values v) {
    for (int64_t half = STEP / 2; half > 0; half /= 2)
      for (int64_t i = 0; i < half; ++i)
        v.lane[i] += v.lane[i + half];
    return v.lane[0];
  }

 private:
  // Out of line: a conversion without instructions of its own is long, and slow either way.
  __attribute__((noinline)) static Values widen(const Half* source) {
    return each([&](int64_t i) { return static_cast<float>(source[i]); });
  }

  template <typename Lane>
  static ALWAYS_INLINE Values each(const Lane& lane) {
    Values out;
    for (int64_t i = 0; i < STEP; ++i)
      out.lane[i] = lane(i);
    return out;
  }
};

#include "vector_tails.h"
#undef TARGET
}  // namespace portable

#ifdef SWIFT_KERNELS_X86

namespace avx2 {
#define TARGET __attribute__((target("avx2,fma,f16c")))

struct Vector {
  static constexpr int64_t STEP = 16;
  static constexpr int DOT_ROWS = 2;  // with two outputs, 8 accumulators of 16 registers
  static constexpr int SUM_ROWS = 4;  // with two outputs, 8 factors and 4 accumulators
  using Scalar = __m256;
  struct Values {
    __m256 low, high;
  };

  TARGET static ALWAYS_INLINE Values zero() {
    return {_mm256_setzero_ps(), _mm256_setzero_ps()};
  }
  TARGET static ALWAYS_INLINE Scalar broadcast(float value) {
    return _mm256_set1_ps(value);
  }

  template <typename Hidden, typename Element>
  TARGET static ALWAYS_INLINE Values load(const Element* source) {
    return {load_half(source), load_half(source + STEP / 2)};
  }
  template <typename Hidden>
  TARGET static ALWAYS_INLINE void store(float* target, const Values& v) {
    store_sums(target, v);
  }
  template <typename Hidden>
  TARGET static ALWAYS_INLINE void store(BFloat16* target, const Values& v) {
    // Packing works within 128 bits; the permutation puts its four quarters in order.
    const __m256i low = _mm256_srli_epi32(_mm256_castps_si256(round_bfloat16(v.low)), 16);
    const __m256i high = _mm256_srli_epi32(_mm256_castps_si256(round_bfloat16(v.high)), 16);
    const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(low, high), 0b11011000);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(target), packed);
  }
  template <typename Hidden>
  TARGET static ALWAYS_INLINE void store(Half* target, const Values& v) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(target), to_half(v.low));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(target + STEP / 2), to_half(v.high));
  }
  TARGET static ALWAYS_INLINE Values load_sums(const float* source) {
    return {_mm256_loadu_ps(source), _mm256_loadu_ps(source + STEP / 2)};
  }
  TARGET static ALWAYS_INLINE void store_sums(float* target, const Values& v) {
    _mm256_storeu_ps(target, v.low);
    _mm256_storeu_ps(target + STEP / 2, v.high);
  }

  template <typename Hidden>
  TARGET static ALWAYS_INLINE Values round(const Values& v) {
    if constexpr (std::is_same_v<Hidden, BFloat16>)
      return {round_bfloat16(v.low), round_bfloat16(v.high)};
    else if constexpr (std::is_same_v<Hidden, Half>)
      return {_mm256_cvtph_ps(to_half(v.low)), _mm256_cvtph_ps(to_half(v.high))};
    else
      return v;
  }

  TARGET static ALWAYS_INLINE Values multiply_add(const Values& a, const Values& b, const Values& c) {
    return {_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)};
  }
  TARGET static ALWAYS_INLINE Values multiply_add(const Values& a, Scalar b, const Values& c) {
    return {_mm256_fmadd_ps(a.low, b, c.low), _mm256_fmadd_ps(a.high, b, c.high)};
  }
  TARGET static ALWAYS_INLINE Values multiply(const Values& a, const Values& b) {
    return {_mm256_mul_ps(a.low, b.low), _mm256_mul_ps(a.high, b.high)};
  }
  TARGET static ALWAYS_INLINE Values multiply(const Values& a, Scalar b) {
    return {_mm256_mul_ps(a.low, b), _mm256_mul_ps(a.high, b)};
  }
  TARGET static ALWAYS_INLINE Values add(const Values& a, const Values& b) {
    return {_mm256_add_ps(a.low, b.low), _mm256_add_ps(a.high, b.high)};
  }
  TARGET static ALWAYS_INLINE Values add(const Values& a, Scalar b) {
    return {_mm256_add_ps(a.low, b), _mm256_add_ps(a.high, b)};
  }

  TARGET static ALWAYS_INLINE float reduce(const Values& v) {
    const __m256 lanes = _mm256_add_ps(v.low, v.high);
    __m128 sum = _mm_add_ps(_mm256_castps256_ps128(lanes), _mm256_extractf128_ps(lanes, 1));
    sum = _mm_add_ps(sum, _mm_movehl_ps(sum, sum));
    return _mm_cvtss_f32(_mm_add_ss(sum, _mm_movehdup_ps(sum)));
  }

 private:
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

  TARGET static ALWAYS_INLINE __m256 round_bfloat16(__m256 v) {
    const __m256i bits = _mm256_castps_si256(v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i up = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    const __m256i rounded = _mm256_and_si256(up, _mm256_set1_epi32(static_cast<int>(0xffff0000)));
    const __m256 nan = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fc00000));
    return _mm256_blendv_ps(_mm256_castsi256_ps(rounded), nan, _mm256_cmp_ps(v, v, _CMP_UNORD_Q));
  }
  TARGET static ALWAYS_INLINE __m128i to_half(__m256 v) {
    return _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }
};

#include "vector_tails.h"
#undef TARGET
}  // namespace avx2

namespace avx512 {
#define TARGET __attribute__((target("avx512f")))

struct Vector {
  static constexpr int64_t STEP = 32;
  static constexpr int DOT_ROWS = 4;  // with two outputs, 16 accumulators of 32 registers
  static constexpr int SUM_ROWS = 8;  // with two outputs, 16 factors and 4 accumulators
  using Scalar = __m512;
  struct Values {
    __m512 low, high;
  };

  TARGET static ALWAYS_INLINE Values zero() {
    return {_mm512_setzero_ps(), _mm512_setzero_ps()};
  }
  TARGET static ALWAYS_INLINE Scalar broadcast(float value) {
    return _mm512_set1_ps(value);
  }

  // bfloat16 is the upper half of a float: a shift and a mask turn one register of 32 into the even and the odd ones,
  // where widening 16 at a time takes a load and a shuffle more. What meets them then follows that order.
  template <typename Hidden, typename Element>
  TARGET static ALWAYS_INLINE Values load(const Element* source) {
    if constexpr (std::is_same_v<Hidden, BFloat16>)
      return load_even_odd(source);
    else
      return {load_half(source), load_half(source + STEP / 2)};
  }
  template <typename Hidden, typename Element>
  TARGET static ALWAYS_INLINE void store(Element* target, const Values& v) {
    if constexpr (std::is_same_v<Hidden, BFloat16>)
      store_even_odd(target, v);
    else {
      store_half(target, v.low);
      store_half(target + STEP / 2, v.high);
    }
  }
  TARGET static ALWAYS_INLINE Values load_sums(const float* source) {
    return {_mm512_loadu_ps(source), _mm512_loadu_ps(source + STEP / 2)};
  }
  TARGET static ALWAYS_INLINE void store_sums(float* target, const Values& v) {
    _mm512_storeu_ps(target, v.low);
    _mm512_storeu_ps(target + STEP / 2, v.high);
  }

  template <typename Hidden>
  TARGET static ALWAYS_INLINE Values round(const Values& v) {
    if constexpr (std::is_same_v<Hidden, BFloat16>)
      return {round_bfloat16(v.low), round_bfloat16(v.high)};
    else if constexpr (std::is_same_v<Hidden, Half>)
      return {_mm512_cvtph_ps(to_half(v.low)), _mm512_cvtph_ps(to_half(v.high))};
    else
      return v;
  }

  TARGET static ALWAYS_INLINE Values multiply_add(const Values& a, const Values& b, const Values& c) {
    return {_mm512_fmadd_ps(a.low, b.low, c.low), _mm512_fmadd_ps(a.high, b.high, c.high)};
  }
  TARGET static ALWAYS_INLINE Values multiply_add(const Values& a, Scalar b, const Values& c) {
    return {_mm512_fmadd_ps(a.low, b, c.low), _mm512_fmadd_ps(a.high, b, c.high)};
  }
  TARGET static ALWAYS_INLINE Values multiply(const Values& a, const Values& b) {
    return {_mm512_mul_ps(a.low, b.low), _mm512_mul_ps(a.high, b.high)};
  }
  TARGET static ALWAYS_INLINE Values multiply(const Values& a, Scalar b) {
    return {_mm512_mul_ps(a.low, b), _mm512_mul_ps(a.high, b)};
  }
  TARGET static ALWAYS_INLINE Values add(const Values& a, const Values& b) {
    return {_mm512_add_ps(a.low, b.low), _mm512_add_ps(a.high, b.high)};
  }
  TARGET static ALWAYS_INLINE Values add(const Values& a, Scalar b) {
    return {_mm512_add_ps(a.low, b), _mm512_add_ps(a.high, b)};
  }

  TARGET static ALWAYS_INLINE float reduce(const Values& v) {
    return _mm512_reduce_add_ps(_mm512_add_ps(v.low, v.high));
  }

 private:
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
  TARGET static ALWAYS_INLINE void store_even_odd(BFloat16* target, const Values& v) {
    const __m512i even = _mm512_srli_epi32(_mm512_castps_si512(round_bfloat16(v.low)), 16);
    _mm512_storeu_si512(target, _mm512_or_si512(even, _mm512_castps_si512(round_bfloat16(v.high))));
  }
  TARGET static ALWAYS_INLINE void store_even_odd(float* target, const Values& v) {
    const __m512i first = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    const __m512i second = _mm512_setr_epi32(8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
    _mm512_storeu_ps(target, _mm512_permutex2var_ps(v.low, first, v.high));
    _mm512_storeu_ps(target + STEP / 2, _mm512_permutex2var_ps(v.low, second, v.high));
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
  TARGET static ALWAYS_INLINE void store_half(float* target, __m512 v) {
    _mm512_storeu_ps(target, v);
  }
  TARGET static ALWAYS_INLINE void store_half(Half* target, __m512 v) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(target), to_half(v));
  }

  TARGET static ALWAYS_INLINE __m512 round_bfloat16(__m512 v) {
    const __m512i bits = _mm512_castps_si512(v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i up = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    const __m512i rounded = _mm512_and_si512(up, _mm512_set1_epi32(static_cast<int>(0xffff0000)));
    const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    return _mm512_castsi512_ps(_mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7fc00000)));
  }
  TARGET static ALWAYS_INLINE __m256i to_half(__m512 v) {
    return _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }
};

#include "vector_tails.h"
#undef TARGET
}  // namespace avx512

#endif  // SWIFT_KERNELS_X86

}  // namespace swift_kernels
