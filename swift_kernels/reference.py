"""The oracle: what a SWIFT score is, in plain PyTorch (arXiv 2505.12225, section 3).

Everything fused in this package is checked against these few functions. They accept any floating dtype up to
float64 and accumulate in the dtype of `sums` (float32 in production, float64 as the oracle of the tests).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

GATE_SUM_FLOOR = 1e-8
"""Lower clamp of the gate sum, as upstream has it: with every gate underflown the score is 0, not NaN."""


def score_step(
    hidden_states: Sequence[Tensor],
    weight: Tensor,
    bias: Tensor,
    slots: Tensor,
    sums: Tensor,
    token_count: Tensor,
    partials: Tensor | None = None,
    arrivals: Tensor | None = None,
    gate_reward: Tensor | None = None,
) -> None:
    """Adds one token of every row to the running gate-weighted mean of the slot the row is routed to.

    Args:
        hidden_states: one `[rows, width]` tensor per selected entry, in ascending layer order.
        weight: `[2, features]` (row 0 gate, row 1 reward), or `[1, features]` (reward alone: a plain mean).
        bias: `[2]` or `[1]`.
        slots: int64 `[rows]`, distinct where not negative; a negative slot skips its row.
        sums: `[slots, 2]`, updated in place: sum of gate * reward, sum of gate.
        token_count: int32 `[slots]`, updated in place.
        partials, arrivals: scratch of the fused kernels, unused here.
        gate_reward: optional `[rows, 2]`, receives this token's sigmoid gate and reward of every scored row.

    Each row is reduced by a tree of elementwise additions, so its score does not depend on the number of rows.
    """
    live = (slots >= 0).nonzero().squeeze(1)
    target = slots[live]
    logits = bias.to(sums.dtype).expand(live.numel(), -1)
    offset = 0
    for entry in hidden_states:
        columns = weight[:, offset : offset + entry.shape[1]].to(sums.dtype)
        logits = logits + _pairwise_sum(entry[live].to(sums.dtype)[:, None, :] * columns)
        offset += entry.shape[1]
    _add_tokens(logits, live, target, sums, token_count, gate_reward)


def gate_and_reward(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Outputs `[..., 2]` (`[..., 1]` without a gate) of the linear layer -> sigmoid gate and reward, each `[...]`."""
    reward = logits[..., -1]
    gate = torch.sigmoid(logits[..., 0]) if logits.shape[-1] == 2 else torch.ones_like(reward)
    return gate, reward


def finalize(sums: Tensor, token_count: Tensor) -> Tensor:
    """`[slots, 2]` sums and `[slots]` counts -> `[slots]` scores; NaN where no token was scored."""
    score = sums[:, 0] / sums[:, 1].clamp_min(GATE_SUM_FLOOR)
    return torch.where(token_count > 0, score, torch.nan)


def rms_norm(
    hidden_states: Tensor, norm_weight: Tensor, eps: float, unit_offset: bool = False, round_first: bool = True
) -> Tensor:
    """RMSNorm of `[rows, width]` with a weight of `[width]`, as the models of transformers write it.

    Args:
        unit_offset: the weight is `1 + norm_weight` (Gemma), and the product is rounded once.
        round_first: the normalised value is rounded to its dtype before it meets the weight (Llama and most others);
            without either, the product is rounded once (OLMo2).
    """
    dtype = torch.promote_types(hidden_states.dtype, torch.float32)
    values = hidden_states.to(dtype)
    mean_square = _pairwise_sum(values * values)[:, None] / hidden_states.shape[1]
    normalised = values * torch.rsqrt(mean_square + eps)
    if unit_offset:
        return (normalised * (1 + norm_weight.to(dtype))).to(hidden_states.dtype)
    if round_first:
        return norm_weight * normalised.to(hidden_states.dtype)
    return (norm_weight.to(dtype) * normalised).to(hidden_states.dtype)


def rms_norm_score(
    hidden_states: Tensor,
    norm_weight: Tensor,
    eps: float,
    unit_offset: bool,
    round_first: bool,
    weight: Tensor,
    bias: Tensor,
    entry: int,
    first_feature: int,
    score_output: bool,
    last: bool,
    slots: Tensor,
    sums: Tensor,
    token_count: Tensor,
    partials: Tensor,
    gate_reward: Tensor | None = None,
) -> Tensor:
    """Normalises every row and takes the dot products of one entry on the way; the last entry closes the step.

    Args:
        hidden_states, norm_weight, eps, unit_offset, round_first: as in `rms_norm`.
        weight, bias, slots, sums, token_count, gate_reward: as in `score_step`.
        entry: which of the head's entries this is; entries come in order, each once a step.
        first_feature: the column of `weight` where the entry begins.
        score_output: the entry is what the norm returns, not what it takes (the model's last hidden state).
        last: adds up the dot products of entries 0..`entry` of the rows and updates the state.
        partials: `[at least rows, more than entry, 2]`, carries the dot products of a step from entry to entry.

    Returns:
        `rms_norm` of every row, also of those that are skipped.
    """
    output = rms_norm(hidden_states, norm_weight, eps, unit_offset, round_first)
    live = (slots >= 0).nonzero().squeeze(1)
    scored = (output if score_output else hidden_states)[live].to(sums.dtype)
    columns = weight[:, first_feature : first_feature + hidden_states.shape[1]].to(sums.dtype)
    partials[live, entry, : weight.shape[0]] = _pairwise_sum(scored[:, None, :] * columns)
    if last:
        logits = bias.to(sums.dtype).expand(live.numel(), -1)
        for earlier in range(entry + 1):
            logits = logits + partials[live, earlier, : weight.shape[0]]
        _add_tokens(logits, live, slots[live], sums, token_count, gate_reward)
    return output


def project(hidden_states: Sequence[Tensor], weight: Tensor, bias: Tensor) -> Tensor:
    """`W x + b` over the entries, without concatenating them.

    Args:
        hidden_states: one `[tokens, width]` tensor per selected entry; widths may differ.
        weight: `[outputs, features]`; bias: `[outputs]`.

    Returns:
        `[tokens, outputs]` in float32 (float64 for float64 weights).
    """
    dtype = torch.promote_types(weight.dtype, torch.float32)
    logits = bias.to(dtype)
    offset = 0
    for entry in hidden_states:
        columns = weight[:, offset : offset + entry.shape[-1]].to(dtype)
        logits = logits + entry.to(dtype) @ columns.T
        offset += entry.shape[-1]
    return logits


def project_backward(hidden_states: Sequence[Tensor], grad_logits: Tensor) -> Tensor:
    """Gradient of `project` for the weight, `[outputs, features]`, from that of the logits, `[tokens, outputs]`."""
    return torch.cat([grad_logits.T @ entry.to(grad_logits.dtype) for entry in hidden_states], dim=1)


def pool(logits: Tensor, cu_seqlens: Tensor, gated: bool = True) -> tuple[Tensor, Tensor]:
    """Gate-weighted means within packed sequences, for one or more heads.

    Args:
        logits: `[tokens, 2 heads]`, gate and reward of each head; `[tokens, heads]`, the rewards, where not `gated`.
        cu_seqlens: int `[sequences + 1]`, cumulative sequence lengths from 0 to `tokens`.

    Returns:
        Scores `[sequences, heads]`, NaN for a sequence of no tokens; and the sigmoid gate and the reward of every
        token, `[tokens, heads, 2]`.
    """
    gate, reward = gate_and_reward(logits.unflatten(1, (-1, 2 if gated else 1)))
    lengths = cu_seqlens.diff().to(logits.device)
    sequence = torch.repeat_interleave(torch.arange(lengths.numel(), device=logits.device), lengths)
    sums = torch.zeros(lengths.numel(), *gate.shape[1:], 2, dtype=logits.dtype, device=logits.device)
    sums = sums.index_add(0, sequence, torch.stack([gate * reward, gate], dim=-1))
    scores = torch.stack([finalize(head_sums, lengths) for head_sums in sums.unbind(1)], dim=1)
    return scores, torch.stack([gate, reward], dim=-1)


def pool_backward(
    grad_scores: Tensor, scores: Tensor, gate_reward: Tensor, cu_seqlens: Tensor, gated: bool = True
) -> Tensor:
    """Gradient of `pool`'s scores for the logits.

    With g = sigmoid(a), G = max(sum g, floor): d score / d r_t = g_t / G, and d score / d a_t = g_t (1 - g_t)
    (r_t - score) / G; where the floor holds, G is constant, and the score drops out.
    """
    gate, reward = gate_reward.unbind(-1)
    lengths = cu_seqlens.diff().to(gate.device)
    sequence = torch.repeat_interleave(torch.arange(lengths.numel(), device=gate.device), lengths)
    gate_sums = torch.zeros_like(scores).index_add(0, sequence, gate)
    score = torch.where(gate_sums < GATE_SUM_FLOOR, 0.0, scores)
    scale = grad_scores / gate_sums.clamp_min(GATE_SUM_FLOOR)
    grad_reward = scale[sequence] * gate
    if not gated:
        return grad_reward
    grad_gate = grad_reward * (1 - gate) * (reward - score[sequence])
    return torch.stack([grad_gate, grad_reward], dim=-1).flatten(1)


def score_sequence(
    hidden_states: Sequence[Tensor], weight: Tensor, bias: Tensor, cu_seqlens: Tensor, gated: bool = True
) -> tuple[Tensor, Tensor]:
    """Scores whole packed sequences with one or more heads: `pool(project(...))`, differentiable.

    `weight` is `[2 heads, features]`, gate and reward of each head (`[heads, features]` where not `gated`).
    Returns scores `[sequences, heads]` and gates and rewards `[tokens, heads, 2]`.
    """
    return pool(project(hidden_states, weight, bias), cu_seqlens, gated)


def _add_tokens(
    logits: Tensor, live: Tensor, target: Tensor, sums: Tensor, token_count: Tensor, gate_reward: Tensor | None
) -> None:
    """Adds one token with these logits to the slots `target` of the rows `live`."""
    gate, reward = gate_and_reward(logits)
    sums[target] += torch.stack([gate * reward, gate], dim=1)
    token_count[target] += 1
    if gate_reward is not None:
        gate_reward[live] = torch.stack([gate, reward], dim=1).to(gate_reward.dtype)


def _pairwise_sum(values: Tensor) -> Tensor:
    """Sums the last dimension by halving: the order of additions depends on its length alone."""
    while values.shape[-1] > 1:
        half = values.shape[-1] // 2
        odd = values[..., 2 * half :]
        values = values[..., :half] + values[..., half : 2 * half]
        if odd.shape[-1]:
            values = torch.cat([values, odd], dim=-1)
    return values.squeeze(-1)
