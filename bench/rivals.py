"""What a user would write instead of `score_step`, each as well as its user would write it.

A rival holds its weights in the layout and dtype that suit it best and adds to sums of its own. It knows nothing of
slots: every row is live, which spares it the routing that `score_step` does. All run on any device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from swift_kernels import reference, schema
from swift_kernels.state import ScoreState

Step = Callable[[Sequence[Tensor]], None]
Compiled = Literal["these rows", "any rows", None]


@dataclass
class Contender:
    """One way to score: `step` takes the hidden states of one token of every row and adds to the sums."""

    name: str
    step: Step
    sums: Tensor
    token_count: Tensor
    logits_dtype: torch.dtype
    """What the outputs of its linear layers are rounded to, before they are added up in float32."""

    def scores(self) -> Tensor:
        return reference.finalize(self.sums, self.token_count)

    def reset(self) -> None:
        self.sums.zero_()
        self.token_count.zero_()


def ours(weight: Tensor, bias: Tensor, rows: int, widths: Sequence[int]) -> Contender:
    state = ScoreState(rows, widths, weight.device)
    slots = torch.arange(rows, device=weight.device)

    def step(hidden_states: Sequence[Tensor]) -> None:
        schema.score_step(
            hidden_states, weight, bias, slots, state.sums, state.token_count, state.partials, state.arrivals
        )

    return Contender("swift_kernels", step, state.sums, state.token_count, torch.float32)


def upstream(weight: Tensor, bias: Tensor, rows: int) -> Contender:
    """As the authors' code does: every layer to float32, concatenated, through one nn.Linear."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], device=weight.device)
    with torch.no_grad():
        linear.weight.copy_(weight)
        linear.bias.copy_(bias)

    def logits(hidden_states: Sequence[Tensor]) -> Tensor:
        return linear(torch.cat([entry.float() for entry in hidden_states], dim=1))

    return _contender("upstream", logits, rows, torch.float32, weight.device, None)


def cat_linear(weight: Tensor, bias: Tensor, rows: int, dtype: torch.dtype, compiled: Compiled) -> Contender:
    cast_weight, cast_bias = weight.to(dtype), bias.to(dtype)

    def logits(hidden_states: Sequence[Tensor]) -> Tensor:
        return F.linear(torch.cat(list(hidden_states), dim=1).to(dtype), cast_weight, cast_bias).float()

    return _contender(_name("cat", dtype, compiled), logits, rows, dtype, weight.device, compiled)


def layer_linears(
    weight: Tensor, bias: Tensor, rows: int, widths: Sequence[int], dtype: torch.dtype, compiled: Compiled
) -> Contender:
    layer_weights = [columns.contiguous() for columns in weight.to(dtype).split(list(widths), dim=1)]

    def logits(hidden_states: Sequence[Tensor]) -> Tensor:
        total = bias
        for entry, columns in zip(hidden_states, layer_weights, strict=True):
            total = total + F.linear(entry.to(dtype), columns).float()
        return total

    return _contender(_name("per layer", dtype, compiled), logits, rows, dtype, weight.device, compiled)


def rivals(weight: Tensor, bias: Tensor, rows: int, widths: Sequence[int], any_rows: bool = False) -> list[Contender]:
    """Upstream, and {cat, per-layer linear} x {float32, bfloat16} x {eager, compiled}.

    Compiled for these rows alone, which is fastest, or as torch.compile does by default: for any number of rows from
    the second on that it meets.
    """
    every = [upstream(weight, bias, rows)]
    for compiled in (None, "any rows" if any_rows else "these rows"):
        for dtype in (torch.float32, torch.bfloat16):
            every.append(cat_linear(weight, bias, rows, dtype, compiled))
            every.append(layer_linears(weight, bias, rows, widths, dtype, compiled))
    return every


def _contender(
    name: str,
    logits: Callable[[Sequence[Tensor]], Tensor],
    rows: int,
    logits_dtype: torch.dtype,
    device: torch.device,
    compiled: Compiled,
) -> Contender:
    sums = torch.zeros(rows, 2, device=device)
    token_count = torch.zeros(rows, dtype=torch.int32, device=device)

    def step(hidden_states: Sequence[Tensor]) -> None:
        gate, reward = reference.gate_and_reward(logits(hidden_states))
        sums.add_(torch.stack([gate * reward, gate], dim=1))
        token_count.add_(1)

    if compiled:
        step = torch.compile(step, dynamic=None if compiled == "any rows" else False)
    return Contender(name, step, sums, token_count, logits_dtype)


def _name(what: str, dtype: torch.dtype, compiled: Compiled) -> str:
    return f"{what}, {'bf16' if dtype == torch.bfloat16 else 'fp32'}, {'compiled' if compiled else 'eager'}"
