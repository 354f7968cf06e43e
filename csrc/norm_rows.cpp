#include "norm_rows.h"

#include "isa.h"
#include "vectors.h"

#define KERNEL_SOURCE "norm_rows_body.h"
#include "for_each_isa.h"

namespace swift_kernels {

NormRowFn select_norm_row(HiddenDtype hidden, NormRounding rounding) {
  return FOR_SELECTED_ISA(select(hidden, rounding));
}

}  // namespace swift_kernels
