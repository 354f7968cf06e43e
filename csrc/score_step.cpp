// swift_kernels::score_step for the CPU; swift_kernels/schema.py defines the op, reference.py says what it means.

#include "torch_stable.h"

#include <optional>
#include <vector>

#include "checks.h"
#include "entries.h"
#include "parallel.h"
#include "state_update.h"

namespace swift_kernels {
namespace {

void score_step(
    const std::vector<Tensor>& hidden_states, const Tensor& weight, const Tensor& bias, const Tensor& slots,
    const Tensor& sums, const Tensor& token_count, const Tensor& partials, const Tensor& arrivals,
    const std::optional<Tensor>& gate_reward) {
  const EntrySizes sizes = check_entries(hidden_states, "rows");
  check_step_weight(weight, bias, sizes.features, &sizes.widths);
  check_state(sizes.rows, slots, sums, token_count, gate_reward);
  check_partials(partials, sizes.rows, sizes.chunks, /*exactly=*/true);
  CHECK_ARGUMENT(
      arrivals.scalar_type() == ScalarType::Int && arrivals.dim() == 1 && arrivals.size(0) >= sizes.rows,
      "arrivals is ", dtype_name(arrivals), " of shape ", list(arrivals.sizes()), ": expected int32 [at least ",
      sizes.rows, "]");
  check_on_cpu({
      {"weight", &weight},
      {"bias", &bias},
      {"slots", &slots},
      {"sums", &sums},
      {"token_count", &token_count},
      {"partials", &partials},
      {"arrivals", &arrivals},
      {"gate_reward", pointer(gate_reward)},
  });
  const CheckedSlots checked = check_slots(slots, sums.size(0));
  const std::vector<int64_t>& live = checked.live;
  if (live.empty())
    return;

  float* scratch = mutable_data<float>(partials);
  reduce_chunks(
      entries_of(hidden_states), hidden_dtype(hidden_states.front()), weight, /*first=*/0, live, sizes.chunks,
      scratch);
  const StateUpdate update(bias, checked, sums, token_count, gate_reward);
  for_items(static_cast<int64_t>(live.size()), 2 * sizes.chunks + 64, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      update.add_token(live[i], scratch + i * sizes.chunks * 2, sizes.chunks);
  });
}

STABLE_TORCH_LIBRARY_IMPL(swift_kernels, CPU, m) {
  m.impl("score_step", TORCH_BOX(&score_step));
}

}  // namespace
}  // namespace swift_kernels
