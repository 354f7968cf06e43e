#pragma once

// PyTorch's stable ABI, from 2.10 on: one binary serves every later torch, and every Python.
#define TORCH_TARGET_VERSION (((0ULL + 2) << 56) | ((0ULL + 10) << 48))

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

namespace swift_kernels {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <typename Value>
const Value* data(const Tensor& tensor) {
  return static_cast<const Value*>(tensor.const_data_ptr());
}

template <typename Value>
Value* mutable_data(const Tensor& tensor) {
  return static_cast<Value*>(tensor.mutable_data_ptr());
}

}  // namespace swift_kernels
