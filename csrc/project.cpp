// swift_kernels::project and project_backward for the CPU; swift_kernels/schema.py defines the ops, reference.py says
// what they mean.

#include "torch_stable.h"

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <vector>

#include "checks.h"
#include "entries.h"
#include "parallel.h"
#include "weighted_sums.h"

namespace swift_kernels {
namespace {

// Tokens are projected in blocks whose partial sums take a megabyte: with two outputs, those of 993 tokens of
// 33 x 4096 features, 268 MB in bfloat16.
constexpr int64_t PARTIALS_FLOATS = (1 << 20) / sizeof(float);
constexpr int64_t MIN_BLOCK_TOKENS = 32;
constexpr int64_t MAX_BLOCK_TOKENS = 4096;

// Columns of a task of the backward pass: whole rows of most models, read from end to end, while the sums of two
// outputs stay in the second-level cache. Fewer where that leaves threads without work, down to what prefetching a row
// is worth.
constexpr int64_t MAX_TASK_COLUMNS = 4096;
constexpr int64_t MIN_TASK_COLUMNS = 256;
constexpr int64_t TASKS_PER_THREAD = 8;

Tensor project(const std::vector<Tensor>& hidden_states, const Tensor& weight, const Tensor& bias) {
  const EntrySizes sizes = check_entries(hidden_states, "tokens");
  check_sequence_weight(weight, bias, sizes);
  check_on_cpu({{"weight", &weight}, {"bias", &bias}});
  const int64_t outputs = weight.size(0);
  const Tensor logits = torch::stable::new_empty(weight, {sizes.rows, outputs}, ScalarType::Float);
  float* written = mutable_data<float>(logits);
  if (sizes.rows == 0)
    return logits;

  const std::vector<Entry> entries = entries_of(hidden_states);
  const int64_t token_floats = ceil_div(outputs, 2) * sizes.chunks * 2;
  const int64_t block_tokens = std::min(
      sizes.rows,
      std::clamp(PARTIALS_FLOATS / std::max<int64_t>(token_floats, 1), MIN_BLOCK_TOKENS, MAX_BLOCK_TOKENS));
  std::vector<float> partials(block_tokens * token_floats);
  std::vector<int64_t> tokens(block_tokens);
  std::iota(tokens.begin(), tokens.end(), int64_t{0});
  std::vector<float> biases;
  for (int64_t output = 0; output < outputs; ++output)
    biases.push_back(bias_value(bias, output));
  for (int64_t first = 0; first < sizes.rows; first += block_tokens) {
    const int64_t count = std::min(block_tokens, sizes.rows - first);
    tokens.resize(count);
    reduce_chunks(
        entries, hidden_dtype(hidden_states.front()), weight, first, tokens, sizes.chunks, partials.data());
    for_items(count, token_floats, [&](int64_t begin, int64_t end) {
      for (int64_t token = begin; token < end; ++token)
        for (int64_t output = 0; output < outputs; ++output) {
          const float* of_pair = partials.data() + (output / 2 * count + token) * sizes.chunks * 2;
          written[(first + token) * outputs + output] =
              add_partials(of_pair + output % 2, sizes.chunks) + biases[output];
        }
    });
  }
  return logits;
}

Tensor project_backward(const std::vector<Tensor>& hidden_states, const Tensor& grad_logits) {
  const EntrySizes sizes = check_entries(hidden_states, "tokens");
  CHECK_ARGUMENT(
      grad_logits.scalar_type() == ScalarType::Float && grad_logits.dim() == 2 &&
          grad_logits.size(0) == sizes.rows && grad_logits.is_contiguous(),
      "grad_logits is ", dtype_name(grad_logits), " of shape ", list(grad_logits.sizes()),
      ": expected contiguous float32 [", sizes.rows, ", outputs]");
  check_on_cpu({{"grad_logits", &grad_logits}});
  const int64_t outputs = grad_logits.size(1);
  if (sizes.rows == 0)
    return torch::stable::new_zeros(grad_logits, {outputs, sizes.features});
  const Tensor grad_weight = torch::stable::new_empty(grad_logits, {outputs, sizes.features});

  const std::vector<Entry> entries = entries_of(hidden_states);
  const HiddenDtype dtype = hidden_dtype(hidden_states.front());
  const WeightedSumsFn weighted_sums = select_weighted_sums(dtype);
  const int64_t products = sizes.rows * sizes.features * outputs;
  const auto task_count = [&](int64_t columns) {
    int64_t count = 0;
    for (const Entry& entry : entries)
      count += ceil_div(entry.width, columns);
    return count;
  };
  const int64_t wanted_tasks = TASKS_PER_THREAD * worthwhile_threads(products, products);
  int64_t task_columns = MAX_TASK_COLUMNS;
  while (task_columns > MIN_TASK_COLUMNS && wanted_tasks > TASKS_PER_THREAD && task_count(task_columns) < wanted_tasks)
    task_columns /= 2;

  std::vector<WeightedSums> tasks;
  tasks.reserve(task_count(task_columns));
  for (const Entry& entry : entries)
    for (int64_t column = 0; column < entry.width; column += task_columns) {
      WeightedSums task;
      task.hidden = entry.hidden + column * hidden_bytes(dtype);
      task.hidden_stride = entry.row_stride;
      task.rows = sizes.rows;
      task.factors = data<float>(grad_logits);
      task.outputs = outputs;
      task.columns = std::min(task_columns, entry.width - column);
      task.sums = mutable_data<float>(grad_weight) + entry.first_column + column;
      task.sums_stride = sizes.features;
      tasks.push_back(task);
    }
  const int64_t count = static_cast<int64_t>(tasks.size());
  run_tasks(
      count, worthwhile_threads(products, count), weighted_sums_scratch(outputs, task_columns),
      [&](int64_t task, int64_t next, float* scratch) { weighted_sums(tasks[task], tasks[next], scratch); });
  return grad_weight;
}

STABLE_TORCH_LIBRARY_IMPL(swift_kernels, CPU, m) {
  m.impl("project", TORCH_BOX(&project));
  m.impl("project_backward", TORCH_BOX(&project_backward));
}

}  // namespace
}  // namespace swift_kernels
