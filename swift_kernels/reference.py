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
    gate, reward = gate_and_reward(logits)
    sums[target] += torch.stack([gate * reward, gate], dim=1)
    token_count[target] += 1
    if gate_reward is not None:
        gate_reward[live] = torch.stack([gate, reward], dim=1).to(gate_reward.dtype)


def gate_and_reward(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Outputs `[..., 2]` (`[..., 1]` without a gate) of the linear layer -> sigmoid gate and reward, each `[...]`."""
    reward = logits[..., -1]
    gate = torch.sigmoid(logits[..., 0]) if logits.shape[-1] == 2 else torch.ones_like(reward)
    return gate, reward


def finalize(sums: Tensor, token_count: Tensor) -> Tensor:
    """`[slots, 2]` sums and `[slots]` counts -> `[slots]` scores; NaN where no token was scored."""
    score = sums[:, 0] / sums[:, 1].clamp_min(GATE_SUM_FLOOR)
    return torch.where(token_count > 0, score, torch.nan)


def score_sequence(hidden_states: Sequence[Tensor], weight: Tensor, bias: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Scores whole packed sequences, differentiable in `hidden_states`, `weight` and `bias`.

    Args:
        hidden_states: one `[tokens, width]` tensor per selected entry; widths may differ.
        weight, bias: as in `score_step`.
        cu_seqlens: int `[sequences + 1]`, cumulative sequence lengths from 0 to `tokens`.

    Returns:
        `[sequences]` scores in float32 (float64 for float64 weights); NaN for a sequence of no tokens.
    """
    return pool(project(hidden_states, weight, bias), cu_seqlens)


def project(hidden_states: Sequence[Tensor], weight: Tensor, bias: Tensor) -> Tensor:
    """`W x + b` over the entries, without concatenating them: `[..., width]` each -> `[..., 2]` in fp32 or wider."""
    dtype = torch.promote_types(weight.dtype, torch.float32)
    logits = bias.to(dtype)
    offset = 0
    for entry in hidden_states:
        columns = weight[:, offset : offset + entry.shape[-1]].to(dtype)
        logits = logits + entry.to(dtype) @ columns.T
        offset += entry.shape[-1]
    return logits


def pool(logits: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Gate-weighted mean of `[tokens, 2]` (or `[tokens, 1]`) logits within each packed sequence -> `[sequences]`."""
    gate, reward = gate_and_reward(logits)
    lengths = cu_seqlens.diff().to(logits.device)
    sequence = torch.repeat_interleave(torch.arange(lengths.numel(), device=logits.device), lengths)
    sums = torch.zeros(lengths.numel(), 2, dtype=logits.dtype, device=logits.device)
    sums = sums.index_add(0, sequence, torch.stack([gate * reward, gate], dim=1))
    return finalize(sums, lengths)


def _pairwise_sum(values: Tensor) -> Tensor:
    """Sums the last dimension by halving: the order of additions depends on its length alone."""
    while values.shape[-1] > 1:
        half = values.shape[-1] // 2
        odd = values[..., 2 * half :]
        values = values[..., :half] + values[..., half : 2 * half]
        if odd.shape[-1]:
            values = torch.cat([values, odd], dim=-1)
    return values.squeeze(-1)
