#pragma once

#include <cstdint>

namespace swift_kernels {

// Columns per partial sum; the same constant as FEATURE_CHUNK in checks.py.
constexpr int64_t FEATURE_CHUNK = 1024;

enum class HiddenDtype { float32, bfloat16, float16 };
enum class WeightDtype { float32, bfloat16 };

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
  float* partials;  // [row_count, chunks, 2]; with one output the second value stays unwritten
  int64_t partials_stride;  // floats between rows
};

// `next` is what the same thread works on afterwards: `task` prefetches its weights and its first rows.
using DotProductsFn = void (*)(const DotProducts& task, const DotProducts& next);

// The implementation for this machine's instruction set, or for the lower one that SWIFT_KERNELS_CPU_ISA asks for.
// Throws std::invalid_argument if that variable names one that is unknown or not supported here.
DotProductsFn select_dot_products(HiddenDtype hidden, WeightDtype weight, int outputs);

}  // namespace swift_kernels
