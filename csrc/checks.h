// What the ops accept: the conditions and messages of swift_kernels/checks.py.
#pragma once

#include "torch_stable.h"

#include <cstdint>
#include <initializer_list>
#include <optional>
#include <span>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

namespace swift_kernels {

// An invalid_argument surfaces in Python as ValueError, with this message and nothing around it.
template <typename... Parts>
[[noreturn]] __attribute__((noinline, cold)) void fail(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw std::invalid_argument(message.str());
}

#define CHECK_ARGUMENT(condition, ...) \
  do {                                 \
    if (!(condition))                  \
      fail(__VA_ARGS__);               \
  } while (false)

// As Python prints them.
std::string dtype_name(const Tensor& tensor);
std::string list(std::span<const int64_t> values);

// What `check_entries` finds: the rows (or tokens) of all entries, and how wide they are.
struct EntrySizes {
  int64_t rows;
  int64_t features;
  int64_t chunks;
  std::vector<int64_t> widths;
};

// Entries of [`what`, width].
EntrySizes check_entries(std::span<const Tensor> hidden_states, const char* what);

// A weight of this many features: of a step, with one or two outputs, or of sequences, with any number. `widths` are
// those of all entries, where they are known.
void check_step_weight(
    const Tensor& weight, const Tensor& bias, int64_t features, const std::vector<int64_t>* widths = nullptr);
void check_sequence_weight(const Tensor& weight, const Tensor& bias, const EntrySizes& sizes);

void check_state(
    int64_t rows, const Tensor& slots, const Tensor& sums, const Tensor& token_count,
    const std::optional<Tensor>& gate_reward);
void check_partials(const Tensor& partials, int64_t rows, int64_t needed, bool exactly);
void check_cu_seqlens_metadata(const Tensor& cu_seqlens);

struct Named {
  const char* name;
  const Tensor* tensor;
};

// That those which are not null are where `what`, a tensor on the CPU, is.
void check_on_cpu(std::initializer_list<Named> tensors, const char* what = "hidden_states");

// What a tensor of slots held when it was checked. Another thread may change the tensor while an op runs, so ops use
// these values alone: what is written through is what was checked.
struct CheckedSlots {
  std::vector<int64_t> of_row;  // negative where a row is skipped
  std::vector<int64_t> live;    // the rows that are not
};

// These read the tensors, once.
CheckedSlots check_slots(const Tensor& slots, int64_t slot_count);
std::vector<int64_t> check_cu_seqlens(const Tensor& cu_seqlens, int64_t tokens);

inline const Tensor* pointer(const std::optional<Tensor>& tensor) {
  return tensor ? &*tensor : nullptr;
}

}  // namespace swift_kernels
