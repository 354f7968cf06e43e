"""Scores of the tests, in float64, from the hidden states that transformers itself returns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from swift_kernels import SwiftHead, reference
from swift_kernels.checks import FEATURE_CHUNK
from swift_kernels.features import scored_tokens, top_logprobs

EPS = torch.finfo(torch.float32).eps


def dot_depth(widths: Sequence[int]) -> int:
    """Longest chain of float32 roundings between a product and `W x + b`, for every kernel.

    A chunk of at most 1,024 products is summed over at least 8 lanes (AVX2 with one accumulator) and a tree of 3
    more additions; then the chunks of all entries are added one after the other, and the bias. A product rounds once.
    """
    longest = min(max(widths), FEATURE_CHUNK)
    chunks = sum(-(-width // FEATURE_CHUNK) for width in widths)
    return 1 + -(-longest // 8) + 3 + chunks + 1


def gate_error(logit: Tensor, gate: Tensor) -> Tensor:
    """How far a gate may be off whose logit is exact, to first order; `tests/ops/approximations.py` has a GPU's errors.

    A GPU takes e^-x as 2^(-x log2 e). The product and its factor round, which moves the power by |x| eps of itself, and
    `ex2` by sqrt(2) eps more; a gate moves by 1 - gate times as much. The sum rounds by eps / 2, and the quotient is
    off by 2 eps: (4 + |x|) eps at the most. What underflows becomes 0.
    """
    return ((1.5 + logit.abs()) * (1 - gate) + 2.5) * EPS * gate + torch.finfo(torch.float32).tiny


def oracle(tokens: Sequence[Sequence[Tensor]], head: SwiftHead) -> tuple[Tensor, Tensor]:
    """Score and error bound of each row, from the float64 definition.

    Args:
        tokens: for each row, the features of its scored tokens: entries of `[tokens, width]`.

    The bound is first order in eps. With n = `dot_depth`, gate and reward logits are off by n eps sum|W x|. A reward
    enters the score with weight g / sum g; a gate logit with weight g (r - score) / sum g, as sigmoid' <= sigmoid. The
    sums over t tokens add (t + 4) eps of the mean |r|, 4 for product, clamp and division, and the gates `gate_error`.
    """
    scores, bounds = [], []
    for entries in tokens:
        count = entries[0].shape[0]
        if count == 0:
            scores.append(torch.tensor(torch.nan, dtype=torch.float64))
            bounds.append(torch.tensor(0.0, dtype=torch.float64))
            continue
        features = torch.cat([entry.double() for entry in entries], dim=1)
        weight, bias = head.weight.detach().double(), head.bias.detach().double()
        logits = features @ weight.T + bias
        magnitude = features.abs() @ weight.abs().T + bias.abs()
        gate, reward = reference.gate_and_reward(logits)
        score = (gate * reward).sum() / gate.sum().clamp_min(reference.GATE_SUM_FLOOR)
        scale = magnitude[:, -1]
        if head.config.gate:
            scale = scale + magnitude[:, 0] * (reward - score).abs()
        depth = dot_depth(head.config.widths)
        error = EPS * (depth * (gate * scale).sum() + (count + 4) * (gate * reward.abs()).sum())
        if head.config.gate:
            error = error + (gate_error(logits[:, 0], gate) * (reward - score).abs()).sum()
        scores.append(score)
        bounds.append(error / gate.sum())
    return torch.stack(scores), torch.stack(bounds)


def captured_tokens(output: Any, head: SwiftHead, responses: Sequence[Sequence[int]], eos: Sequence[int]) -> list:
    """The features of each row's scored tokens, from what `generate(output_hidden_states=True)` returned."""
    config = head.config
    rows = []
    for row, response in enumerate(responses):
        steps = [index + 1 for index in scored_tokens(response, eos, config.span)]  # step 0 is the prefill
        if config.features == "logits":
            # `output.logits[k]` are the raw logits after feeding what step k fed.
            rows.append([torch.stack([output.logits[step][row] for step in steps]) if steps else torch.zeros(0, 1)])
        elif config.features == "top_logprobs":
            # The token that follows the one step k fed is the response's k-th.
            logits = [output.logits[step][row] for step in steps]
            sampled = torch.tensor([response[step] for step in steps]).to(output.logits[0].device)
            rows.append(
                [top_logprobs(torch.stack(logits), config.top_logprobs, sampled) if steps else torch.zeros(0, 1)]
            )
        else:
            rows.append(
                [
                    torch.stack([output.hidden_states[step][layer][row, -1] for step in steps])
                    if steps
                    else torch.zeros(0, width)
                    for layer, width in zip(config.layers, config.widths, strict=True)
                ]
            )
    return rows


def assert_scores(actual: Tensor, expected: Tensor, bound: Tensor) -> None:
    actual = actual.cpu().double()
    assert torch.equal(actual.isnan(), expected.isnan()), (actual, expected)
    excess = ((actual - expected).abs() - bound).nan_to_num(0.0)
    assert (excess <= 0).all(), f"error {(actual - expected).abs().tolist()} above the bound {bound.tolist()}"


@dataclass(frozen=True)
class Bounded:
    """A float64 value, and how far from it a result of the kernels may be."""

    value: Tensor
    bound: Tensor

    def check(self, actual: Tensor, what: str) -> None:
        assert actual.shape == self.value.shape, f"{what} has shape {list(actual.shape)}"
        error = (actual.detach().cpu().double() - self.value).abs()
        assert torch.equal(error.isnan(), self.value.isnan()), f"{what} is {actual}, expected {self.value}"
        excess = (error - self.bound)[~error.isnan()]
        assert (excess <= 0).all(), (
            f"{what}: {int((excess > 0).sum())} errors above the bound, by {float(excess.max())}"
        )


@dataclass(frozen=True)
class SequenceOracle:
    """What `schema.score_sequence` returns in float64, and its gradients for `grad_scores`."""

    logits: Bounded
    scores: Bounded
    grad_weight: Bounded
    grad_bias: Bounded
    grad_entries: list[Bounded]


def weighted_sum_depth(tokens: int) -> int:
    """Longest chain of float32 roundings in a gradient of the weight, for every kernel.

    A product rounds once; 256 of them at most are added one after the other, then the sums of such blocks.
    """
    return 1 + min(tokens, 256) + -(-tokens // 256)


def sequence_oracle(
    entries: Sequence[Tensor], weight: Tensor, bias: Tensor, cu_seqlens: Tensor, gated: bool, grad_scores: Tensor
) -> SequenceOracle:
    """Values by autograd in float64; bounds first order in u = eps / 2, with a margin of 5% for the rest.

    d(x) is the bound of x. With n = `dot_depth`: d(logit) = n u sum|W x|. A sigmoid has a slope of at most 1/4, and is
    computed to `gate_error`: d(g) = d(a) / 4 + gate_error. Over the k tokens of a sequence, with G = sum g and
    s = sum g r / G, each sum rounds k times, each product once, and a quotient is off by 2 eps on a GPU:
        d(G) = sum d(g) + k u G                d(s) = sum(|r - s| d(g) + g d(r)) / G + (2 k + 6) u sum(g |r|) / G
    The logits' gradients are p = (grad / G) g for the reward and p (1 - g) (r - s) for the gate, so
        d(p) = |p| (d(G) / G + 5 u) + |grad / G| d(g)
        d(gate) = d(p) (1 - g) |r - s| + |p| (d(g) + u) |r - s| + |p| (1 - g) (d(r) + d(s) + u |r - s|) + 2 u |gate|
    They are summed over the tokens (with m = `weighted_sum_depth` for the weight, at most every token for the bias), or
    over the outputs for the entries, and rounded to the dtype of what they are the gradient of.
    """
    u = EPS / 2
    features = torch.cat([entry.detach().double() for entry in entries], dim=1)
    doubles = [tensor.detach().double().requires_grad_() for tensor in (weight, bias)]
    tokens, heads = features.shape[0], weight.shape[0] // (2 if gated else 1)
    logits = reference.project([features], *doubles)
    logits.retain_grad()
    scores, gate_reward = reference.pool(logits, cu_seqlens, gated)
    scores.nan_to_num(0.0).backward(grad_scores.double().where(~scores.isnan(), 0.0))
    w, b = (tensor.detach() for tensor in doubles)
    magnitude = features.abs() @ w.abs().T + b.abs()
    logit_bound = dot_depth([entry.shape[1] for entry in entries]) * u * magnitude

    sequence = torch.repeat_interleave(torch.arange(cu_seqlens.numel() - 1), cu_seqlens.diff())

    def over_sequences(values: Tensor) -> Tensor:
        return torch.zeros(cu_seqlens.numel() - 1, heads, dtype=torch.float64).index_add(0, sequence, values)

    score = scores.detach().nan_to_num(0.0)
    gate, reward = gate_reward.detach().unbind(-1)
    d_reward = logit_bound.unflatten(1, (heads, -1))[..., -1]
    d_gate = torch.zeros_like(gate)
    if gated:
        gate_logit = logits.detach().unflatten(1, (heads, -1))[..., 0]
        d_gate = logit_bound.unflatten(1, (heads, -1))[..., 0] / 4 + gate_error(gate_logit, gate)
    count = cu_seqlens.diff()[:, None]
    total = over_sequences(gate).clamp_min(reference.GATE_SUM_FLOOR)
    distance = (reward - score[sequence]).abs()
    d_total = over_sequences(d_gate) + count * u * total
    d_score = over_sequences(distance * d_gate + gate * d_reward) / total
    d_score = d_score + (2 * count + 6) * u * over_sequences(gate * reward.abs()) / total

    scale = (grad_scores.double() / total)[sequence].abs()
    p = scale * gate
    d_p = p * ((d_total / total)[sequence] + 5 * u) + scale * d_gate
    d_logits = d_p
    if gated:
        d_distance = d_reward + d_score[sequence] + u * distance
        d_gates = d_p * (1 - gate) * distance + p * (d_gate + u) * distance + p * (1 - gate) * d_distance
        d_logits = torch.stack([d_gates + 2 * u * p * (1 - gate) * distance, d_p], dim=-1).flatten(1)

    grad = logits.grad

    def rounded(value: Tensor, bound: Tensor, dtype: torch.dtype) -> Bounded:
        info = torch.finfo(dtype)
        return Bounded(value, 1.05 * bound + info.eps / 2 * value.abs() + info.smallest_normal * info.eps)

    bounds = d_logits.T @ features.abs() + weighted_sum_depth(tokens) * u * (grad.abs().T @ features.abs())
    d_features = d_logits @ w.abs() + (weight.shape[0] + 1) * u * (grad.abs() @ w.abs())
    widths = [entry.shape[1] for entry in entries]
    return SequenceOracle(
        logits=Bounded(logits.detach(), 1.05 * logit_bound),
        scores=Bounded(scores.detach(), 1.05 * d_score),
        grad_weight=rounded(doubles[0].grad, bounds, weight.dtype),
        grad_bias=rounded(doubles[1].grad, d_logits.sum(0) + tokens * u * grad.abs().sum(0), bias.dtype),
        grad_entries=[
            rounded(value, bound, entry.dtype)
            for entry, value, bound in zip(
                entries, (grad @ w).split(widths, dim=1), d_features.split(widths, dim=1), strict=True
            )
        ],
    )
