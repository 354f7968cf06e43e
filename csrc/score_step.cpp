// swift_kernels::score_step for the CPU; swift_kernels/schema.py defines the op, reference.py says what it means.
//
// Written on PyTorch's stable ABI and free of Python's: one binary serves every torch from 2.10 on and every Python.

#define TORCH_TARGET_VERSION (((0ULL + 2) << 56) | ((0ULL + 10) << 48))

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "dot_products.h"

namespace swift_kernels {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// What a thread takes at a time: enough rows to share the weights in its cache, few enough chunks that a single row
// occupies every thread.
constexpr int64_t TASK_ROWS = 32;
constexpr int64_t TASK_CHUNKS = 4;

// Multiply-adds that are worth a thread: about 5 us of work, against 1 to 2 us to wake one.
constexpr int64_t MIN_PRODUCTS_PER_THREAD = 32 * FEATURE_CHUNK;

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

template <typename Values>
std::string list(const Values& values) {
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

struct Arguments {
  const std::vector<Tensor>& hidden_states;
  const Tensor& weight;
  const Tensor& bias;
  const Tensor& slots;
  const Tensor& sums;
  const Tensor& token_count;
  const Tensor& partials;
  const Tensor& arrivals;
  const std::optional<Tensor>& gate_reward;
};

int64_t ceil_div(int64_t value, int64_t divisor) {
  return (value + divisor - 1) / divisor;
}

int64_t chunk_count(int64_t width) {
  return ceil_div(width, FEATURE_CHUNK);
}

// The conditions and messages of checks.check_step.
void check_metadata(const Arguments& arguments) {
  const std::vector<Tensor>& hidden_states = arguments.hidden_states;
  CHECK_ARGUMENT(
      !hidden_states.empty(), "hidden_states is empty: expected one [rows, width] tensor per selected layer");
  const Tensor& first = hidden_states.front();
  const ScalarType dtype = first.scalar_type();
  std::vector<int64_t> widths;
  widths.reserve(hidden_states.size());
  int64_t features = 0;
  int64_t chunks = 0;
  for (size_t index = 0; index < hidden_states.size(); ++index) {
    const Tensor& entry = hidden_states[index];
    CHECK_ARGUMENT(
        entry.dim() == 2, "hidden_states[", index, "] has shape ", list(entry.sizes()), ": expected [rows, width]");
    CHECK_ARGUMENT(
        entry.size(0) == first.size(0), "hidden_states[", index, "] has ", entry.size(0),
        " rows, hidden_states[0] has ", first.size(0), ": every entry holds the same rows");
    CHECK_ARGUMENT(
        entry.scalar_type() == dtype && entry.is_cpu(), "hidden_states[", index, "] is ", dtype_name(entry),
        entry.is_cpu() ? " on cpu" : " on another device", ", hidden_states[0] is ", dtype_name(first),
        " on cpu: every entry has one dtype and device");
    CHECK_ARGUMENT(
        entry.size(1) <= 1 || entry.stride(1) == 1, "hidden_states[", index, "] has strides ", list(entry.strides()),
        ": expected unit stride along the width");
    widths.push_back(entry.size(1));
    features += entry.size(1);
    chunks += chunk_count(entry.size(1));
  }
  CHECK_ARGUMENT(
      dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half, "hidden_states are ",
      dtype_name(first), ": expected float32, bfloat16 or float16");

  const Tensor& weight = arguments.weight;
  const int64_t outputs = weight.dim() == 2 ? weight.size(0) : 0;
  CHECK_ARGUMENT(
      (outputs == 1 || outputs == 2) && weight.size(1) == features && weight.is_contiguous(), "weight has shape ",
      list(weight.sizes()), ": expected a contiguous [2, ", features, "] (gate, reward) or [1, ", features,
      "] for entries of widths ", list(widths));
  const Tensor& bias = arguments.bias;
  CHECK_ARGUMENT(
      (weight.scalar_type() == ScalarType::Float || weight.scalar_type() == ScalarType::BFloat16) &&
          bias.scalar_type() == weight.scalar_type() && bias.dim() == 1 && bias.size(0) == outputs,
      "weight is ", dtype_name(weight), ", bias ", dtype_name(bias), " of shape ", list(bias.sizes()),
      ": expected both float32 or both bfloat16, bias of shape [", outputs, "]");

  const int64_t rows = first.size(0);
  const Tensor& slots = arguments.slots;
  CHECK_ARGUMENT(
      slots.scalar_type() == ScalarType::Long && slots.dim() == 1 && slots.size(0) == rows && slots.is_contiguous(),
      "slots is ", dtype_name(slots), " of shape ", list(slots.sizes()), ": expected contiguous int64 [", rows, "]");
  const Tensor& sums = arguments.sums;
  CHECK_ARGUMENT(
      sums.scalar_type() == ScalarType::Float && sums.dim() == 2 && sums.size(1) == 2 && sums.is_contiguous(),
      "sums is ", dtype_name(sums), " of shape ", list(sums.sizes()), ": expected contiguous float32 [slots, 2]");
  const Tensor& token_count = arguments.token_count;
  CHECK_ARGUMENT(
      token_count.scalar_type() == ScalarType::Int && token_count.dim() == 1 &&
          token_count.size(0) == sums.size(0) && token_count.is_contiguous(),
      "token_count is ", dtype_name(token_count), " of shape ", list(token_count.sizes()),
      ": expected contiguous int32 [", sums.size(0), "]");
  const Tensor& partials = arguments.partials;
  CHECK_ARGUMENT(
      partials.scalar_type() == ScalarType::Float && partials.dim() == 3 && partials.size(0) >= rows &&
          partials.size(1) == chunks && partials.size(2) == 2 && partials.is_contiguous(),
      "partials is ", dtype_name(partials), " of shape ", list(partials.sizes()),
      ": expected contiguous float32 [at least ", rows, ", ", chunks,
      ", 2]; a step of more rows than slots needs init_state(..., max_rows=rows)");
  const Tensor& arrivals = arguments.arrivals;
  CHECK_ARGUMENT(
      arrivals.scalar_type() == ScalarType::Int && arrivals.dim() == 1 && arrivals.size(0) >= rows, "arrivals is ",
      dtype_name(arrivals), " of shape ", list(arrivals.sizes()), ": expected int32 [at least ", rows, "]");
  if (arguments.gate_reward) {
    const Tensor& gate_reward = *arguments.gate_reward;
    CHECK_ARGUMENT(
        gate_reward.scalar_type() == ScalarType::Float && gate_reward.dim() == 2 && gate_reward.size(0) == rows &&
            gate_reward.size(1) == 2 && gate_reward.is_contiguous(),
        "gate_reward is ", dtype_name(gate_reward), " of shape ", list(gate_reward.sizes()),
        ": expected contiguous float32 [", rows, ", 2]");
  }

  const std::pair<const char*, const Tensor*> named[] = {
      {"weight", &weight},     {"bias", &bias},         {"slots", &slots},
      {"sums", &sums},         {"token_count", &token_count}, {"partials", &partials},
      {"arrivals", &arrivals}, {"gate_reward", arguments.gate_reward ? &*arguments.gate_reward : &first},
  };
  for (const auto& [name, tensor] : named)
    CHECK_ARGUMENT(tensor->is_cpu(), name, " is not on cpu, hidden_states are on cpu: expected one device");
}

// The conditions and messages of checks.check_slots. Returns the rows that are not skipped.
std::vector<int64_t> live_rows(const int64_t* slots, int64_t rows, int64_t slot_count) {
  std::vector<int64_t> live;
  live.reserve(rows);
  int64_t highest = -1;
  bool ascending = true;
  for (int64_t row = 0; row < rows; ++row) {
    if (slots[row] < 0)
      continue;
    ascending &= slots[row] > highest;
    highest = std::max(highest, slots[row]);
    live.push_back(row);
  }
  CHECK_ARGUMENT(
      highest < slot_count, "slots contains ", highest, ": expected values below ", slot_count,
      ", or negative to skip a row");
  if (!ascending) {
    std::vector<int64_t> sorted;
    sorted.reserve(live.size());
    for (const int64_t row : live)
      sorted.push_back(slots[row]);
    std::sort(sorted.begin(), sorted.end());
    const auto repeated = std::adjacent_find(sorted.begin(), sorted.end());
    CHECK_ARGUMENT(
        repeated == sorted.end(), "slots contains ", *repeated, " more than once: expected distinct slots");
  }
  return live;
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

float bias_value(const Tensor& bias, int64_t output) {
  if (bias.scalar_type() == ScalarType::Float)
    return static_cast<const float*>(bias.const_data_ptr())[output];
  return static_cast<float>(static_cast<const c10::BFloat16*>(bias.const_data_ptr())[output]);
}

// Where an entry lies: its first weight column, its first partial sum, and the first of its groups of TASK_CHUNKS.
struct Entry {
  const char* hidden;
  int64_t row_stride;
  int64_t width;
  int64_t first_column;
  int64_t first_chunk;
  int64_t first_group;
  int64_t groups;
};

std::vector<Entry> entries_of(const std::vector<Tensor>& hidden_states) {
  std::vector<Entry> entries;
  entries.reserve(hidden_states.size());
  int64_t column = 0;
  int64_t chunk = 0;
  int64_t group = 0;
  for (const Tensor& tensor : hidden_states) {
    const int64_t width = tensor.size(1);
    if (width == 0)
      continue;
    const int64_t groups = ceil_div(chunk_count(width), TASK_CHUNKS);
    const char* hidden = static_cast<const char*>(tensor.const_data_ptr());
    entries.push_back({hidden, tensor.stride(0), width, column, chunk, group, groups});
    column += width;
    chunk += chunk_count(width);
    group += groups;
  }
  return entries;
}

// Writes the partial sums [live rows, chunks, 2]. Threads claim tasks as they go, so that one that wakes late or loses
// its core holds nothing up; who computes a partial sum does not change it.
void reduce_chunks(
    const std::vector<Entry>& entries, const Tensor& weight, const std::vector<int64_t>& live, int64_t chunks,
    HiddenDtype dtype, float* partials) {
  if (entries.empty())
    return;
  const int64_t rows = static_cast<int64_t>(live.size());
  const int64_t tiles = ceil_div(rows, TASK_ROWS);
  const int64_t task_count = (entries.back().first_group + entries.back().groups) * tiles;
  const int64_t features = weight.size(1);
  const int64_t hidden_bytes = dtype == HiddenDtype::float32 ? 4 : 2;
  const WeightDtype weight_dtype =
      weight.scalar_type() == ScalarType::Float ? WeightDtype::float32 : WeightDtype::bfloat16;
  const int64_t weight_bytes = weight_dtype == WeightDtype::float32 ? 4 : 2;
  const char* weights = static_cast<const char*>(weight.const_data_ptr());
  const DotProductsFn dot_products = select_dot_products(dtype, weight_dtype, static_cast<int>(weight.size(0)));

  // In the order entry, tile, group, tasks follow one another in memory.
  const auto task_at = [&](int64_t index) {
    const auto after = std::upper_bound(
        entries.begin(), entries.end(), index,
        [&](int64_t task, const Entry& entry) { return task < entry.first_group * tiles; });
    const Entry& entry = *(after - 1);
    const int64_t in_entry = index - entry.first_group * tiles;
    const int64_t first_row = in_entry / entry.groups * TASK_ROWS;
    const int64_t chunk = in_entry % entry.groups * TASK_CHUNKS;
    const int64_t column = chunk * FEATURE_CHUNK;
    DotProducts task;
    task.hidden = entry.hidden + column * hidden_bytes;
    task.hidden_stride = entry.row_stride;
    task.rows = live.data() + first_row;
    task.row_count = std::min(TASK_ROWS, rows - first_row);
    task.weight = weights + (entry.first_column + column) * weight_bytes;
    task.weight_stride = features;
    task.columns = std::min(TASK_CHUNKS * FEATURE_CHUNK, entry.width - column);
    task.partials = partials + (first_row * chunks + entry.first_chunk + chunk) * 2;
    task.partials_stride = chunks * 2;
    return task;
  };

  std::atomic<int64_t> claimed{0};
  const auto work = [&](int64_t, int64_t) {
    int64_t index = claimed.fetch_add(1, std::memory_order_relaxed);
    if (index >= task_count)
      return;
    DotProducts task = task_at(index);
    while (index < task_count) {
      // Claimed ahead of its turn, for this task to prefetch what it needs.
      index = claimed.fetch_add(1, std::memory_order_relaxed);
      const DotProducts next = index < task_count ? task_at(index) : task;
      dot_products(task, next);
      task = next;
    }
  };
  const int64_t threads = std::clamp<int64_t>(
      rows * features / MIN_PRODUCTS_PER_THREAD, 1, std::min<int64_t>(torch::stable::get_num_threads(), task_count));
  torch::stable::parallel_for(0, threads, 1, work);
}

// Four interleaved sums, whose additions need not wait for one another.
float add_partials(const float* partials, int64_t chunks) {
  float sum[4] = {};
  for (int64_t chunk = 0; chunk < chunks; ++chunk)
    sum[chunk % 4] += partials[chunk * 2];
  return (sum[0] + sum[1]) + (sum[2] + sum[3]);
}

void update_slots(
    const Arguments& arguments, const std::vector<int64_t>& live, int64_t chunks, const float* partials) {
  const bool gated = arguments.weight.size(0) == 2;
  const float gate_bias = gated ? bias_value(arguments.bias, 0) : 0.0f;
  const float reward_bias = bias_value(arguments.bias, gated ? 1 : 0);
  const int64_t* slots = static_cast<const int64_t*>(arguments.slots.const_data_ptr());
  float* sums = static_cast<float*>(arguments.sums.mutable_data_ptr());
  int32_t* token_count = static_cast<int32_t*>(arguments.token_count.mutable_data_ptr());
  float* gate_reward =
      arguments.gate_reward ? static_cast<float*>(arguments.gate_reward->mutable_data_ptr()) : nullptr;

  const auto work = [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const float* row_partials = partials + i * chunks * 2;
      const float gate =
          gated ? 1.0f / (1.0f + std::exp(-(add_partials(row_partials, chunks) + gate_bias))) : 1.0f;
      const float reward = add_partials(row_partials + (gated ? 1 : 0), chunks) + reward_bias;
      const int64_t slot = slots[live[i]];
      sums[slot * 2] += gate * reward;
      sums[slot * 2 + 1] += gate;
      token_count[slot] += 1;
      if (gate_reward != nullptr) {
        gate_reward[live[i] * 2] = gate;
        gate_reward[live[i] * 2 + 1] = reward;
      }
    }
  };
  const int64_t row_additions = 2 * chunks + 64;
  torch::stable::parallel_for(
      0, static_cast<int64_t>(live.size()), std::max<int64_t>(1, MIN_PRODUCTS_PER_THREAD / row_additions), work);
}

void score_step(
    const std::vector<Tensor>& hidden_states, const Tensor& weight, const Tensor& bias, const Tensor& slots,
    const Tensor& sums, const Tensor& token_count, const Tensor& partials, const Tensor& arrivals,
    const std::optional<Tensor>& gate_reward) {
  const Arguments arguments{hidden_states, weight, bias, slots, sums, token_count, partials, arrivals, gate_reward};
  check_metadata(arguments);
  const std::vector<int64_t> live =
      live_rows(static_cast<const int64_t*>(slots.const_data_ptr()), slots.size(0), sums.size(0));
  if (live.empty())
    return;
  const int64_t chunks = partials.size(1);
  float* scratch = static_cast<float*>(partials.mutable_data_ptr());
  reduce_chunks(entries_of(hidden_states), weight, live, chunks, hidden_dtype(hidden_states.front()), scratch);
  update_slots(arguments, live, chunks, scratch);
}

STABLE_TORCH_LIBRARY_IMPL(swift_kernels, CPU, m) {
  m.impl("score_step", TORCH_BOX(&score_step));
}

}  // namespace
}  // namespace swift_kernels
