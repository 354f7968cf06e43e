// swift_kernels::pool and pool_backward for the CPU; swift_kernels/schema.py defines the ops, reference.py says what
// they mean. Every sequence is one thread's, its tokens added in order.

#include "torch_stable.h"

#include <algorithm>
#include <cstdint>
#include <limits>
#include <tuple>
#include <vector>

#include "checks.h"
#include "parallel.h"
#include "state_update.h"

namespace swift_kernels {
namespace {

// The same constant as in reference.py.
constexpr float GATE_SUM_FLOOR = 1e-8f;

// Multiply-adds that a token of one head is worth: about an exponential and a division.
constexpr int64_t TOKEN_PRODUCTS = 64;

int64_t sequence_products(int64_t tokens, int64_t sequences, int64_t heads) {
  return ceil_div(tokens * heads * TOKEN_PRODUCTS, std::max<int64_t>(1, sequences));
}

// Keeps NaN, as torch.clamp_min does.
float at_least_floor(float gate_sum) {
  return gate_sum < GATE_SUM_FLOOR ? GATE_SUM_FLOOR : gate_sum;
}

std::tuple<Tensor, Tensor> pool(const Tensor& logits, const Tensor& cu_seqlens, bool gated) {
  const int64_t outputs = gated ? 2 : 1;
  CHECK_ARGUMENT(
      logits.scalar_type() == ScalarType::Float && logits.dim() == 2 && logits.size(1) % outputs == 0 &&
          logits.is_contiguous(),
      "logits is ", dtype_name(logits), " of shape ", list(logits.sizes()), ": expected contiguous float32 [tokens, ",
      gated ? "2 heads (gate and reward of each)" : "heads", "]");
  check_cu_seqlens_metadata(cu_seqlens);
  check_on_cpu({{"cu_seqlens", &cu_seqlens}}, "logits");
  const int64_t tokens = logits.size(0);
  const int64_t heads = logits.size(1) / outputs;
  const std::vector<int64_t> starts = check_cu_seqlens(cu_seqlens, tokens);
  const int64_t sequences = static_cast<int64_t>(starts.size()) - 1;
  Tensor scores = torch::stable::new_empty(logits, {sequences, heads});
  Tensor gate_reward = torch::stable::new_empty(logits, {tokens, heads, 2});

  const float* values = data<float>(logits);
  float* score = mutable_data<float>(scores);
  float* written = mutable_data<float>(gate_reward);
  for_items(sequences, sequence_products(tokens, sequences, heads), [&](int64_t begin, int64_t end) {
    for (int64_t item = begin * heads; item < end * heads; ++item) {
      const int64_t sequence = item / heads;
      const int64_t head = item % heads;
      float sum = 0.0f;
      float gate_sum = 0.0f;
      for (int64_t token = starts[sequence]; token < starts[sequence + 1]; ++token) {
        const float* logit = values + (token * heads + head) * outputs;
        const float gate = gated ? sigmoid(logit[0]) : 1.0f;
        const float reward = logit[outputs - 1];
        sum += gate * reward;
        gate_sum += gate;
        written[(token * heads + head) * 2] = gate;
        written[(token * heads + head) * 2 + 1] = reward;
      }
      const bool empty = starts[sequence] == starts[sequence + 1];
      score[item] = empty ? std::numeric_limits<float>::quiet_NaN() : sum / at_least_floor(gate_sum);
    }
  });
  return {scores, gate_reward};
}

Tensor pool_backward(
    const Tensor& grad_scores, const Tensor& scores, const Tensor& gate_reward, const Tensor& cu_seqlens, bool gated) {
  CHECK_ARGUMENT(
      gate_reward.scalar_type() == ScalarType::Float && gate_reward.dim() == 3 && gate_reward.size(2) == 2 &&
          gate_reward.is_contiguous(),
      "gate_reward is ", dtype_name(gate_reward), " of shape ", list(gate_reward.sizes()),
      ": expected contiguous float32 [tokens, heads, 2]");
  check_cu_seqlens_metadata(cu_seqlens);
  const int64_t tokens = gate_reward.size(0);
  const int64_t heads = gate_reward.size(1);
  const int64_t sequences = cu_seqlens.size(0) - 1;
  for (const auto& [name, tensor] : {Named{"grad_scores", &grad_scores}, Named{"scores", &scores}})
    CHECK_ARGUMENT(
        tensor->scalar_type() == ScalarType::Float && tensor->dim() == 2 && tensor->size(0) == sequences &&
            tensor->size(1) == heads && tensor->is_contiguous(),
        name, " is ", dtype_name(*tensor), " of shape ", list(tensor->sizes()), ": expected contiguous float32 [",
        sequences, ", ", heads, "]");
  check_on_cpu({{"grad_scores", &grad_scores}, {"scores", &scores}, {"cu_seqlens", &cu_seqlens}}, "gate_reward");
  const std::vector<int64_t> starts = check_cu_seqlens(cu_seqlens, tokens);
  const int64_t outputs = gated ? 2 : 1;
  Tensor grad_logits = torch::stable::new_empty(gate_reward, {tokens, heads * outputs});

  const float* of_token = data<float>(gate_reward);
  const float* of_score = data<float>(grad_scores);
  const float* score_of = data<float>(scores);
  float* written = mutable_data<float>(grad_logits);
  for_items(sequences, sequence_products(tokens, sequences, heads), [&](int64_t begin, int64_t end) {
    for (int64_t item = begin * heads; item < end * heads; ++item) {
      const int64_t sequence = item / heads;
      const int64_t head = item % heads;
      float gate_sum = 0.0f;
      for (int64_t token = starts[sequence]; token < starts[sequence + 1]; ++token)
        gate_sum += of_token[(token * heads + head) * 2];
      // Where the floor holds it is a constant, and the score drops out.
      const float score = gate_sum < GATE_SUM_FLOOR ? 0.0f : score_of[item];
      const float scale = of_score[item] / at_least_floor(gate_sum);
      for (int64_t token = starts[sequence]; token < starts[sequence + 1]; ++token) {
        const float gate = of_token[(token * heads + head) * 2];
        const float reward = of_token[(token * heads + head) * 2 + 1];
        float* grad = written + (token * heads + head) * outputs;
        grad[outputs - 1] = scale * gate;
        if (gated)
          grad[0] = scale * gate * (1.0f - gate) * (reward - score);
      }
    }
  });
  return grad_logits;
}

STABLE_TORCH_LIBRARY_IMPL(swift_kernels, CPU, m) {
  m.impl("pool", TORCH_BOX(&pool));
  m.impl("pool_backward", TORCH_BOX(&pool_backward));
}

}  // namespace
}  // namespace swift_kernels
