#pragma once

#include <cstdint>

namespace swift_kernels {

// Columns per partial sum; the same constant as FEATURE_CHUNK in checks.py.
constexpr int64_t FEATURE_CHUNK = 1024;

constexpr int64_t ceil_div(int64_t value, int64_t divisor) {
  return (value + divisor - 1) / divisor;
}

constexpr int64_t chunk_count(int64_t width) {
  return ceil_div(width, FEATURE_CHUNK);
}

enum class HiddenDtype { float32, bfloat16, float16 };
enum class WeightDtype { float32, bfloat16 };

// Floats of one chunk of one row: the outputs (the second stays unwritten where there is one), and with squares their
// sum after them.
constexpr int64_t chunk_floats(bool squares) {
  return squares ? 3 : 2;
}

// Dot products of some rows of one entry with the weights of its columns [0, columns), one partial sum for every
// FEATURE_CHUNK of them. Pointers refer to the first of these columns.
struct DotProducts {
  const void* hidden;
  int64_t hidden_stride;  // elements between rows
  const int64_t* rows;  // indices of the rows to read
  int64_t row_count;
  const void* weight;
  int64_t weight_stride;  // elements between the outputs
  int64_t columns;
  float* partials;  // [row_count, chunks, chunk_floats]
  int64_t partials_stride;  // floats between rows
};

// `next` is what the same thread works on afterwards: `task` prefetches its weights and its first rows.
using DotProductsFn = void (*)(const DotProducts& task, const DotProducts& next);

// The implementation for this machine, with `outputs` of 1 or 2; also of the rows with themselves where `squares`, then
// also without outputs.
DotProductsFn select_dot_products(HiddenDtype hidden, WeightDtype weight, int outputs, bool squares = false);

}  // namespace swift_kernels
