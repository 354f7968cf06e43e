#pragma once

#include "torch_stable.h"

#include <cmath>
#include <cstdint>
#include <optional>

#include "checks.h"
#include "entries.h"

namespace swift_kernels {

inline float sigmoid(float value) {
  return 1.0f / (1.0f + std::exp(-value));
}

// Adds tokens to the slots that their rows are routed to; `slots` outlives it.
class StateUpdate {
 public:
  StateUpdate(
      const Tensor& bias, const CheckedSlots& slots, const Tensor& sums, const Tensor& token_count,
      const std::optional<Tensor>& gate_reward)
      : gated_(bias.size(0) == 2),
        gate_bias_(gated_ ? bias_value(bias, 0) : 0.0f),
        reward_bias_(bias_value(bias, gated_ ? 1 : 0)),
        slots_(slots.of_row.data()),
        sums_(mutable_data<float>(sums)),
        token_count_(mutable_data<int32_t>(token_count)),
        gate_reward_(gate_reward ? mutable_data<float>(*gate_reward) : nullptr) {}

  // `partials` are the dot products of one row that is not skipped, [count, 2].
  void add_token(int64_t row, const float* partials, int64_t count) const {
    const float gate = gated_ ? sigmoid(add_partials(partials, count) + gate_bias_) : 1.0f;
    const float reward = add_partials(partials + (gated_ ? 1 : 0), count) + reward_bias_;
    const int64_t slot = slots_[row];
    sums_[slot * 2] += gate * reward;
    sums_[slot * 2 + 1] += gate;
    token_count_[slot] += 1;
    if (gate_reward_ != nullptr) {
      gate_reward_[row * 2] = gate;
      gate_reward_[row * 2 + 1] = reward;
    }
  }

 private:
  bool gated_;
  float gate_bias_;
  float reward_bias_;
  const int64_t* slots_;
  float* sums_;
  int32_t* token_count_;
  float* gate_reward_;
};

}  // namespace swift_kernels
