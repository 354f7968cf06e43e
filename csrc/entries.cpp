#include "entries.h"

#include <algorithm>

#include "parallel.h"

namespace swift_kernels {
namespace {

// What a thread takes at a time: enough rows to share the weights in its cache, few enough chunks that a single row
// occupies every thread. With several pairs of outputs the tile is read again from the second-level cache: 256 KB of
// bfloat16.
constexpr int64_t TASK_ROWS = 32;
constexpr int64_t TASK_CHUNKS = 4;

int64_t groups_of(const Entry& entry) {
  return ceil_div(chunk_count(entry.width), TASK_CHUNKS);
}

}  // namespace

std::vector<Entry> entries_of(const std::vector<Tensor>& hidden_states) {
  std::vector<Entry> entries;
  entries.reserve(hidden_states.size());
  int64_t column = 0;
  int64_t chunk = 0;
  for (const Tensor& tensor : hidden_states) {
    const int64_t width = tensor.size(1);
    if (width == 0)
      continue;
    entries.push_back({data<char>(tensor), tensor.stride(0), width, column, chunk});
    column += width;
    chunk += chunk_count(width);
  }
  return entries;
}

HiddenDtype hidden_dtype(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return HiddenDtype::float32;
    case ScalarType::BFloat16:
      return HiddenDtype::bfloat16;
    default:
      return HiddenDtype::float16;
  }
}

WeightDtype weight_dtype(const Tensor& tensor) {
  return tensor.scalar_type() == ScalarType::Float ? WeightDtype::float32 : WeightDtype::bfloat16;
}

int64_t hidden_bytes(HiddenDtype dtype) {
  return dtype == HiddenDtype::float32 ? 4 : 2;
}

int64_t weight_bytes(WeightDtype dtype) {
  return dtype == WeightDtype::float32 ? 4 : 2;
}

float bias_value(const Tensor& bias, int64_t output) {
  if (bias.scalar_type() == ScalarType::Float)
    return data<float>(bias)[output];
  return static_cast<float>(data<c10::BFloat16>(bias)[output]);
}

void reduce_chunks(
    const std::vector<Entry>& entries, HiddenDtype dtype, const Tensor& weight, int64_t first,
    const std::vector<int64_t>& rows, int64_t chunks, float* partials) {
  if (entries.empty())
    return;
  const int64_t row_count = static_cast<int64_t>(rows.size());
  const int64_t tiles = ceil_div(row_count, TASK_ROWS);
  const int64_t outputs = weight.size(0);
  const int64_t features = weight.size(1);
  const WeightDtype dtype_of_weight = weight_dtype(weight);
  const char* weights = data<char>(weight);
  // In the order entry, tile, group, tasks follow one another in memory.
  std::vector<int64_t> first_tasks;
  first_tasks.reserve(entries.size());
  int64_t tasks = 0;
  for (const Entry& entry : entries) {
    first_tasks.push_back(tasks);
    tasks += groups_of(entry) * tiles;
  }
  const DotProductsFn of_pair = select_dot_products(dtype, dtype_of_weight, 2);
  const DotProductsFn of_one = select_dot_products(dtype, dtype_of_weight, 1);

  const auto products_of = [&](int64_t task, int64_t pair) {
    const auto after = std::upper_bound(first_tasks.begin(), first_tasks.end(), task);
    const Entry& entry = entries[after - first_tasks.begin() - 1];
    const int64_t in_entry = task - *(after - 1);
    const int64_t first_row = in_entry / groups_of(entry) * TASK_ROWS;
    const int64_t chunk = in_entry % groups_of(entry) * TASK_CHUNKS;
    const int64_t column = chunk * FEATURE_CHUNK;
    DotProducts products;
    products.hidden = entry.hidden + (first * entry.row_stride + column) * hidden_bytes(dtype);
    products.hidden_stride = entry.row_stride;
    products.rows = rows.data() + first_row;
    products.row_count = std::min(TASK_ROWS, row_count - first_row);
    products.weight = weights + (pair * 2 * features + entry.first_column + column) * weight_bytes(dtype_of_weight);
    products.weight_stride = features;
    products.columns = std::min(TASK_CHUNKS * FEATURE_CHUNK, entry.width - column);
    products.partials = partials + ((pair * row_count + first_row) * chunks + entry.first_chunk + chunk) * 2;
    products.partials_stride = chunks * 2;
    return products;
  };

  run_tasks(
      tasks, worthwhile_threads(row_count * features * ceil_div(outputs, 2), tasks), 0,
      [&](int64_t task, int64_t next_task, float*) {
        DotProducts products = products_of(task, 0);
        for (int64_t pair = 0; pair * 2 < outputs; ++pair) {
          const bool last = (pair + 1) * 2 >= outputs;
          const DotProducts next = last ? products_of(next_task, 0) : products_of(task, pair + 1);
          (pair * 2 + 1 < outputs ? of_pair : of_one)(products, next);
          products = next;
        }
      });
}

}  // namespace swift_kernels
