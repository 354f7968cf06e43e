#pragma once

namespace swift_kernels {

// Ascending: a machine that has one has those before it.
enum class Isa { portable, avx2, avx512 };

// This machine's instruction set, or the lower one that SWIFT_KERNELS_CPU_ISA asks for. Throws std::invalid_argument if
// that variable names one that is unknown or not supported here.
Isa select_isa();

}  // namespace swift_kernels
