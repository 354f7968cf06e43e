// swift_kernels::rms_norm and rms_norm_score for the CPU; swift_kernels/schema.py defines the ops, reference.py says
// what they mean.
//
// Rows are taken a few at a time: a first pass sums their squares and, where what the norm takes is scored, their dot
// products; they are still in the cache for the second, which writes them. What the norm returns is scored as written.

#include "torch_stable.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <optional>
#include <span>
#include <vector>

#include "checks.h"
#include "entries.h"
#include "norm_rows.h"
#include "parallel.h"
#include "state_update.h"

namespace swift_kernels {
namespace {

// What a thread takes at a time: rows that share a pass over the weights.
constexpr int64_t TASK_ROWS = 4;

void check_norm(const Tensor& hidden_states, const Tensor& norm_weight) {
  check_entries(std::span(&hidden_states, 1), "rows");
  const int64_t width = hidden_states.size(1);
  CHECK_ARGUMENT(
      norm_weight.scalar_type() == hidden_states.scalar_type() && norm_weight.dim() == 1 &&
          norm_weight.size(0) == width,
      "norm_weight is ", dtype_name(norm_weight), " of shape ", list(norm_weight.sizes()), ": expected ",
      dtype_name(hidden_states), " [", width, "], as the hidden states");
  CHECK_ARGUMENT(
      norm_weight.is_contiguous(), "norm_weight has strides ", list(norm_weight.strides()),
      ": expected a contiguous [", width, "]");
  check_on_cpu({{"norm_weight", &norm_weight}});
}

// What is scored on the way, and where its dot products go.
struct Scoring {
  const Tensor& weight;
  int64_t outputs;
  int64_t first_feature;
  bool output;  // what the norm returns, not what it takes
  const int64_t* slots;
  int64_t entry;
  float* partials;
  int64_t partials_stride;  // floats between rows
  const StateUpdate* update;  // for the last entry of a step

  bool is_live(int64_t row) const {
    return slots[row] >= 0;
  }

  // `chunks` are the partial sums of one row, each `floats` long.
  void finish_row(int64_t row, const float* chunks, int64_t count, int64_t floats) const {
    float* row_partials = partials + row * partials_stride;
    for (int64_t o = 0; o < outputs; ++o)
      row_partials[entry * 2 + o] = add_partials(chunks + o, count, floats);
    if (update != nullptr)
      update->add_token(row, row_partials, entry + 1);
  }
};

Tensor normalise(
    const Tensor& hidden_states, const Tensor& norm_weight, double eps, NormRounding rounding, const Scoring* scoring) {
  const Tensor output = torch::stable::new_empty(hidden_states, hidden_states.sizes());
  const int64_t rows = hidden_states.size(0);
  const int64_t width = hidden_states.size(1);
  const int64_t chunks = chunk_count(width);
  const HiddenDtype dtype = hidden_dtype(hidden_states);
  const NormRowFn norm_row = select_norm_row(dtype, rounding);
  const DotProductsFn squares = select_dot_products(dtype, WeightDtype::float32, 0, /*squares=*/true);
  DotProductsFn dots = nullptr;
  const char* weight = nullptr;
  int64_t weight_stride = 0;
  if (scoring != nullptr) {
    const WeightDtype dtype_of_weight = weight_dtype(scoring->weight);
    dots = select_dot_products(dtype, dtype_of_weight, static_cast<int>(scoring->outputs), !scoring->output);
    weight = data<char>(scoring->weight) + scoring->first_feature * weight_bytes(dtype_of_weight);
    weight_stride = scoring->weight.size(1);
  }

  static constexpr int64_t ROWS[TASK_ROWS] = {0, 1, 2, 3};
  const auto rows_of = [&](const char* first, int64_t stride, int64_t task, bool with_squares, float* partials) {
    DotProducts products;
    products.hidden = first + task * TASK_ROWS * stride * hidden_bytes(dtype);
    products.hidden_stride = stride;
    products.rows = ROWS;
    products.row_count = std::min(TASK_ROWS, rows - task * TASK_ROWS);
    products.weight = weight;
    products.weight_stride = weight_stride;
    products.columns = width;
    products.partials = partials;
    products.partials_stride = chunks * chunk_floats(with_squares);
    return products;
  };

  const char* hidden = data<char>(hidden_states);
  const int64_t stride = hidden_states.stride(0);
  char* written = mutable_data<char>(output);
  const auto run = [&](int64_t task, int64_t next, float* partials) {
    const DotProducts products = rows_of(hidden, stride, task, true, partials);
    const int64_t first = task * TASK_ROWS;
    bool live = false;
    for (int64_t r = 0; scoring != nullptr && r < products.row_count; ++r)
      live |= scoring->is_live(first + r);
    const bool score_input = live && !scoring->output;
    (score_input ? dots : squares)(products, rows_of(hidden, stride, next, true, partials));

    for (int64_t r = 0; r < products.row_count; ++r) {
      const float sum = add_partials(partials + r * products.partials_stride + 2, chunks, chunk_floats(true));
      const float scale = 1.0f / std::sqrt(sum / static_cast<float>(width) + static_cast<float>(eps));
      norm_row(
          hidden + (first + r) * stride * hidden_bytes(dtype), norm_weight.const_data_ptr(), scale, width,
          written + (first + r) * width * hidden_bytes(dtype));
    }
    if (!live)
      return;
    if (scoring->output) {
      const DotProducts of_output = rows_of(written, width, task, false, partials);
      dots(of_output, of_output);
    }
    const int64_t floats = chunk_floats(!scoring->output);
    for (int64_t r = 0; r < products.row_count; ++r)
      if (scoring->is_live(first + r))
        scoring->finish_row(first + r, partials + r * chunks * floats, chunks, floats);
  };

  // A value costs a product for its square, two to normalise it, and one for every output.
  const int64_t products = rows * width * (3 + (scoring != nullptr ? scoring->outputs : 0));
  const int64_t tasks = ceil_div(rows, TASK_ROWS);
  run_tasks(tasks, worthwhile_threads(products, tasks), TASK_ROWS * chunks * chunk_floats(true), run);
  return output;
}

NormRounding rounding_of(bool unit_offset, bool round_first) {
  if (unit_offset)
    return NormRounding::unit_offset;
  return round_first ? NormRounding::value_first : NormRounding::product;
}

Tensor rms_norm(
    const Tensor& hidden_states, const Tensor& norm_weight, double eps, bool unit_offset, bool round_first) {
  check_norm(hidden_states, norm_weight);
  return normalise(hidden_states, norm_weight, eps, rounding_of(unit_offset, round_first), nullptr);
}

Tensor rms_norm_score(
    const Tensor& hidden_states, const Tensor& norm_weight, double eps, bool unit_offset, bool round_first,
    const Tensor& weight, const Tensor& bias, int64_t entry, int64_t first_feature, bool score_output, bool last,
    const Tensor& slots, const Tensor& sums, const Tensor& token_count, const Tensor& partials,
    const std::optional<Tensor>& gate_reward) {
  check_norm(hidden_states, norm_weight);
  const int64_t rows = hidden_states.size(0);
  const int64_t width = hidden_states.size(1);
  const int64_t features = weight.dim() == 2 ? weight.size(1) : 0;
  check_step_weight(weight, bias, features);
  CHECK_ARGUMENT(
      0 <= first_feature && first_feature <= features - width, "first_feature is ", first_feature, ": expected 0..",
      features - width, ", for ", width, " of ", features, " features");
  check_state(rows, slots, sums, token_count, gate_reward);
  CHECK_ARGUMENT(entry >= 0, "entry is ", entry, ": expected 0 or more");
  check_partials(partials, rows, entry + 1, /*exactly=*/false);
  check_on_cpu({
      {"weight", &weight},
      {"bias", &bias},
      {"slots", &slots},
      {"sums", &sums},
      {"token_count", &token_count},
      {"partials", &partials},
      {"gate_reward", pointer(gate_reward)},
  });
  const CheckedSlots checked = check_slots(slots, sums.size(0));

  const StateUpdate update(bias, checked, sums, token_count, gate_reward);
  const Scoring scoring{
      weight,
      weight.size(0),
      first_feature,
      score_output,
      checked.of_row.data(),
      entry,
      mutable_data<float>(partials),
      partials.size(1) * 2,
      last ? &update : nullptr,
  };
  return normalise(hidden_states, norm_weight, eps, rounding_of(unit_offset, round_first), &scoring);
}

STABLE_TORCH_LIBRARY_IMPL(swift_kernels, CPU, m) {
  m.impl("rms_norm", TORCH_BOX(&rms_norm));
  m.impl("rms_norm_score", TORCH_BOX(&rms_norm_score));
}

}  // namespace
}  // namespace swift_kernels
