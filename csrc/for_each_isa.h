// Includes the file that KERNEL_SOURCE names once for each instruction set, in a namespace of its own where `Vector` is
// that set's and TARGET lets functions use it. No include guard.

namespace swift_kernels {

namespace portable {
namespace {
#define TARGET
#include KERNEL_SOURCE
#undef TARGET
}  // namespace
}  // namespace portable

#ifdef SWIFT_KERNELS_X86

namespace avx2 {
namespace {
#define TARGET __attribute__((target("avx2,fma,f16c")))
#include KERNEL_SOURCE
#undef TARGET
}  // namespace
}  // namespace avx2

namespace avx512 {
namespace {
#define TARGET __attribute__((target("avx512f")))
#include KERNEL_SOURCE
#undef TARGET
}  // namespace
}  // namespace avx512

// An expression, evaluated in the namespace of the instruction set that is to run.
#define FOR_SELECTED_ISA(...)          \
  [&] {                                \
    switch (select_isa()) {            \
      case Isa::avx512:                \
        return avx512::__VA_ARGS__;    \
      case Isa::avx2:                  \
        return avx2::__VA_ARGS__;      \
      default:                         \
        return portable::__VA_ARGS__;  \
    }                                  \
  }()

#else

#define FOR_SELECTED_ISA(...) (select_isa(), portable::__VA_ARGS__)

#endif  // SWIFT_KERNELS_X86

}  // namespace swift_kernels
