#include "dot_products.h"

#include "isa.h"
#include "vectors.h"

#define KERNEL_SOURCE "dot_products_body.h"
#include "for_each_isa.h"

namespace swift_kernels {

DotProductsFn select_dot_products(HiddenDtype hidden, WeightDtype weight, int outputs, bool squares) {
  return FOR_SELECTED_ISA(select(hidden, weight, outputs, squares));
}

}  // namespace swift_kernels
