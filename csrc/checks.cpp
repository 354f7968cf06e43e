#include "checks.h"

#include <algorithm>

#include "dot_products.h"

namespace swift_kernels {
namespace {

// Conditions that the weights of steps and of sequences share; `wanted` says which shapes are.
template <typename Wanted>
void check_weight(
    const Tensor& weight, const Tensor& bias, int64_t features, bool outputs_fit,
    const std::vector<int64_t>* widths, const Wanted& wanted) {
  CHECK_ARGUMENT(
      outputs_fit && weight.size(1) == features && weight.is_contiguous(), "weight has shape ", list(weight.sizes()),
      ": expected a contiguous ", wanted(), " for ",
      widths != nullptr ? "entries of widths " + list(*widths) : "a head");
  CHECK_ARGUMENT(
      (weight.scalar_type() == ScalarType::Float || weight.scalar_type() == ScalarType::BFloat16) &&
          bias.scalar_type() == weight.scalar_type() && bias.dim() == 1 && bias.size(0) == weight.size(0),
      "weight is ", dtype_name(weight), ", bias ", dtype_name(bias), " of shape ", list(bias.sizes()),
      ": expected both float32 or both bfloat16, bias of shape [", weight.size(0), "]");
}

template <typename Integer>
std::vector<int64_t> values_of(const Tensor& tensor) {
  const Integer* values = data<Integer>(tensor);
  return {values, values + tensor.size(0)};
}

}  // namespace

std::string dtype_name(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return "torch.float32";
    case ScalarType::BFloat16:
      return "torch.bfloat16";
    case ScalarType::Half:
      return "torch.float16";
    case ScalarType::Double:
      return "torch.float64";
    case ScalarType::Int:
      return "torch.int32";
    case ScalarType::Long:
      return "torch.int64";
    default:
      return torch::headeronly::toString(tensor.scalar_type());
  }
}

std::string list(std::span<const int64_t> values) {
  std::ostringstream out;
  out << "[";
  const char* separator = "";
  for (const int64_t value : values) {
    out << separator << value;
    separator = ", ";
  }
  out << "]";
  return out.str();
}

EntrySizes check_entries(std::span<const Tensor> hidden_states, const char* what) {
  CHECK_ARGUMENT(
      !hidden_states.empty(), "hidden_states is empty: expected one [", what, ", width] tensor per selected layer");
  const Tensor& first = hidden_states.front();
  EntrySizes sizes{};
  sizes.widths.reserve(hidden_states.size());
  for (size_t index = 0; index < hidden_states.size(); ++index) {
    const Tensor& entry = hidden_states[index];
    CHECK_ARGUMENT(
        entry.dim() == 2, "hidden_states[", index, "] has shape ", list(entry.sizes()), ": expected [", what,
        ", width]");
    CHECK_ARGUMENT(
        entry.size(0) == first.size(0), "hidden_states[", index, "] has ", entry.size(0), " ", what,
        ", hidden_states[0] has ", first.size(0), ": every entry holds the same ", what);
    CHECK_ARGUMENT(
        entry.scalar_type() == first.scalar_type() && entry.is_cpu(), "hidden_states[", index, "] is ",
        dtype_name(entry), entry.is_cpu() ? " on cpu" : " on another device", ", hidden_states[0] is ",
        dtype_name(first), " on cpu: every entry has one dtype and device");
    CHECK_ARGUMENT(
        entry.size(1) <= 1 || entry.stride(1) == 1, "hidden_states[", index, "] has strides ", list(entry.strides()),
        ": expected unit stride along the width");
    sizes.widths.push_back(entry.size(1));
    sizes.features += entry.size(1);
    sizes.chunks += chunk_count(entry.size(1));
  }
  sizes.rows = first.size(0);
  const ScalarType dtype = first.scalar_type();
  CHECK_ARGUMENT(
      dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half, "hidden_states are ",
      dtype_name(first), ": expected float32, bfloat16 or float16");
  return sizes;
}

void check_step_weight(
    const Tensor& weight, const Tensor& bias, int64_t features, const std::vector<int64_t>* widths) {
  const bool fits = weight.dim() == 2 && (weight.size(0) == 1 || weight.size(0) == 2);
  check_weight(weight, bias, features, fits, widths, [&] {
    const std::string count = std::to_string(features);
    return "[2, " + count + "] (gate, reward) or [1, " + count + "]";
  });
}

void check_sequence_weight(const Tensor& weight, const Tensor& bias, const EntrySizes& sizes) {
  const bool fits = weight.dim() == 2 && weight.size(0) > 0;
  check_weight(weight, bias, sizes.features, fits, &sizes.widths, [&] {
    return "[outputs, " + std::to_string(sizes.features) + "]";
  });
}

void check_state(
    int64_t rows, const Tensor& slots, const Tensor& sums, const Tensor& token_count,
    const std::optional<Tensor>& gate_reward) {
  CHECK_ARGUMENT(
      slots.scalar_type() == ScalarType::Long && slots.dim() == 1 && slots.size(0) == rows && slots.is_contiguous(),
      "slots is ", dtype_name(slots), " of shape ", list(slots.sizes()), ": expected contiguous int64 [", rows, "]");
  CHECK_ARGUMENT(
      sums.scalar_type() == ScalarType::Float && sums.dim() == 2 && sums.size(1) == 2 && sums.is_contiguous(),
      "sums is ", dtype_name(sums), " of shape ", list(sums.sizes()), ": expected contiguous float32 [slots, 2]");
  CHECK_ARGUMENT(
      token_count.scalar_type() == ScalarType::Int && token_count.dim() == 1 &&
          token_count.size(0) == sums.size(0) && token_count.is_contiguous(),
      "token_count is ", dtype_name(token_count), " of shape ", list(token_count.sizes()),
      ": expected contiguous int32 [", sums.size(0), "]");
  if (gate_reward)
    CHECK_ARGUMENT(
        gate_reward->scalar_type() == ScalarType::Float && gate_reward->dim() == 2 && gate_reward->size(0) == rows &&
            gate_reward->size(1) == 2 && gate_reward->is_contiguous(),
        "gate_reward is ", dtype_name(*gate_reward), " of shape ", list(gate_reward->sizes()),
        ": expected contiguous float32 [", rows, ", 2]");
}

void check_partials(const Tensor& partials, int64_t rows, int64_t needed, bool exactly) {
  CHECK_ARGUMENT(
      partials.scalar_type() == ScalarType::Float && partials.dim() == 3 && partials.size(0) >= rows &&
          (exactly ? partials.size(1) == needed : partials.size(1) >= needed) && partials.size(2) == 2 &&
          partials.is_contiguous(),
      "partials is ", dtype_name(partials), " of shape ", list(partials.sizes()),
      ": expected contiguous float32 [at least ", rows, ", ", exactly ? "" : "at least ", needed,
      ", 2]; a step of more rows than slots needs init_state(..., max_rows=rows)");
}

void check_cu_seqlens_metadata(const Tensor& cu_seqlens) {
  CHECK_ARGUMENT(
      (cu_seqlens.scalar_type() == ScalarType::Int || cu_seqlens.scalar_type() == ScalarType::Long) &&
          cu_seqlens.dim() == 1 && cu_seqlens.size(0) >= 1 && cu_seqlens.is_contiguous(),
      "cu_seqlens is ", dtype_name(cu_seqlens), " of shape ", list(cu_seqlens.sizes()),
      ": expected contiguous int32 or int64 [sequences + 1]");
}

void check_on_cpu(std::initializer_list<Named> tensors, const char* what) {
  for (const auto& [name, tensor] : tensors)
    CHECK_ARGUMENT(
        tensor == nullptr || tensor->is_cpu(), name, " is not on cpu, ", what, " are on cpu: expected one device");
}

CheckedSlots check_slots(const Tensor& slots, int64_t slot_count) {
  const int64_t* slot_of = data<int64_t>(slots);
  const int64_t rows = slots.size(0);
  CheckedSlots checked;
  checked.of_row.reserve(rows);
  checked.live.reserve(rows);
  int64_t highest = -1;
  bool ascending = true;
  for (int64_t row = 0; row < rows; ++row) {
    // A plain load the compiler might repeat.
    const int64_t slot = __atomic_load_n(slot_of + row, __ATOMIC_RELAXED);
    checked.of_row.push_back(slot);
    if (slot < 0)
      continue;
    ascending &= slot > highest;
    highest = std::max(highest, slot);
    checked.live.push_back(row);
  }
  CHECK_ARGUMENT(
      highest < slot_count, "slots contains ", highest, ": expected values below ", slot_count,
      ", or negative to skip a row");
  if (!ascending) {
    std::vector<int64_t> sorted;
    sorted.reserve(checked.live.size());
    for (const int64_t row : checked.live)
      sorted.push_back(checked.of_row[row]);
    std::sort(sorted.begin(), sorted.end());
    const auto repeated = std::adjacent_find(sorted.begin(), sorted.end());
    CHECK_ARGUMENT(
        repeated == sorted.end(), "slots contains ", *repeated, " more than once: expected distinct slots");
  }
  return checked;
}

std::vector<int64_t> check_cu_seqlens(const Tensor& cu_seqlens, int64_t tokens) {
  std::vector<int64_t> values =
      cu_seqlens.scalar_type() == ScalarType::Int ? values_of<int32_t>(cu_seqlens) : values_of<int64_t>(cu_seqlens);
  CHECK_ARGUMENT(values.front() == 0, "cu_seqlens starts at ", values.front(), ": expected 0");
  for (size_t index = 1; index < values.size(); ++index)
    CHECK_ARGUMENT(
        values[index] >= values[index - 1], "cu_seqlens[", index, "] is ", values[index], ", after ",
        values[index - 1], ": expected values that do not decrease");
  CHECK_ARGUMENT(
      values.back() == tokens, "cu_seqlens ends at ", values.back(), ": expected ", tokens, ", the number of tokens");
  return values;
}

}  // namespace swift_kernels
