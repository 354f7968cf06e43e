#include "weighted_sums.h"

#include "isa.h"
#include "vectors.h"

namespace swift_kernels {
namespace {

// Rows whose sum is one term of the total.
constexpr int64_t SUM_BLOCK = 256;

// Rows that stay in the second-level cache while pairs of outputs take turns: 256 KB of 4,096 bfloat16 columns.
constexpr int64_t TILE_ROWS = 32;

// To whole vectors of any instruction set.
constexpr int64_t padded_columns(int64_t columns) {
  return ceil_div(columns, 32) * 32;
}

}  // namespace
}  // namespace swift_kernels

#define KERNEL_SOURCE "weighted_sums_body.h"
#include "for_each_isa.h"

namespace swift_kernels {

int64_t weighted_sums_scratch(int64_t outputs, int64_t columns) {
  return outputs * padded_columns(columns);
}

WeightedSumsFn select_weighted_sums(HiddenDtype hidden) {
  return FOR_SELECTED_ISA(select(hidden));
}

}  // namespace swift_kernels
