#pragma once

#include <cstdint>

#include "dot_products.h"

namespace swift_kernels {

// Sums of the rows of one entry, each row times a factor, in columns [0, columns): what a gradient of the logits makes
// of the weights. Pointers refer to the first of these columns.
struct WeightedSums {
  const void* hidden;
  int64_t hidden_stride;  // elements between rows
  int64_t rows;  // at least one
  const float* factors;  // [rows, outputs]
  int64_t outputs;
  int64_t columns;
  float* sums;  // [outputs, columns]
  int64_t sums_stride;  // floats between the outputs
};

// Floats of scratch that a task needs.
int64_t weighted_sums_scratch(int64_t outputs, int64_t columns);

// `next` is what the same thread works on afterwards, whose first rows `task` prefetches; `scratch` is the thread's
// own.
using WeightedSumsFn = void (*)(const WeightedSums& task, const WeightedSums& next, float* scratch);

// The implementation for this machine.
WeightedSumsFn select_weighted_sums(HiddenDtype hidden);

}  // namespace swift_kernels
