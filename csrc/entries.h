// Where the entries of a token's features lie, and their dot products with the weights.
#pragma once

#include "torch_stable.h"

#include <cstdint>
#include <vector>

#include "dot_products.h"

namespace swift_kernels {

// An entry of some width: its first weight column, and the first of its partial sums.
struct Entry {
  const char* hidden;
  int64_t row_stride;  // elements between rows
  int64_t width;
  int64_t first_column;
  int64_t first_chunk;
};

// The entries that have a width.
std::vector<Entry> entries_of(const std::vector<Tensor>& hidden_states);

// Of a tensor that passed the checks.
HiddenDtype hidden_dtype(const Tensor& tensor);
WeightDtype weight_dtype(const Tensor& tensor);
int64_t hidden_bytes(HiddenDtype dtype);
int64_t weight_bytes(WeightDtype dtype);
float bias_value(const Tensor& bias, int64_t output);

// Writes the partial sums of some rows of every entry: [pairs of outputs, rows, chunks, 2]. `rows` holds their indices,
// counted from the row `first`; `chunks` counts those of all entries. Who computes a partial sum does not change it.
void reduce_chunks(
    const std::vector<Entry>& entries, HiddenDtype dtype, const Tensor& weight, int64_t first,
    const std::vector<int64_t>& rows, int64_t chunks, float* partials);

// Adds `count` floats that lie `stride` apart, in four interleaved sums, whose additions need not wait for one another.
inline float add_partials(const float* partials, int64_t count, int64_t stride = 2) {
  float sum[4] = {};
  for (int64_t i = 0; i < count; ++i)
    sum[i % 4] += partials[i * stride];
  return (sum[0] + sum[1]) + (sum[2] + sum[3]);
}

}  // namespace swift_kernels
