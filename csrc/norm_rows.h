#pragma once

#include <cstdint>

#include "dot_products.h"

namespace swift_kernels {

// How a normalised value meets the weight of its norm; reference.rms_norm says which models do which.
enum class NormRounding {
  product,  // round(weight * normalised)
  value_first,  // round(weight * round(normalised))
  unit_offset,  // round((1 + weight) * normalised)
};

// Writes one row: its values times `scale`, the inverse of their root mean square, and the weight.
using NormRowFn =
    void (*)(const void* hidden, const void* weight, float scale, int64_t width, void* output);

// The implementation for this machine.
NormRowFn select_norm_row(HiddenDtype hidden, NormRounding rounding);

}  // namespace swift_kernels
