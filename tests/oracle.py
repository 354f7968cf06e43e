"""Scores of the tests, in float64, from the hidden states that transformers itself returns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from swift_kernels import SwiftHead, reference
from swift_kernels.checks import FEATURE_CHUNK
from swift_kernels.features import scored_tokens

EPS = torch.finfo(torch.float32).eps


def dot_depth(widths: Sequence[int]) -> int:
    """Longest chain of float32 roundings between a product and `W x + b`, for every kernel.

    A chunk of at most 1,024 products is summed over at least 8 lanes (AVX2 with one accumulator) and a tree of 3
    more additions; then the chunks of all entries are added one after the other, and the bias. A product rounds once.
    """
    longest = min(max(widths), FEATURE_CHUNK)
    chunks = sum(-(-width // FEATURE_CHUNK) for width in widths)
    return 1 + -(-longest // 8) + 3 + chunks + 1


def oracle(tokens: Sequence[Sequence[Tensor]], head: SwiftHead) -> tuple[Tensor, Tensor]:
    """Score and error bound of each row, from the float64 definition.

    Args:
        tokens: for each row, the features of its scored tokens: entries of `[tokens, width]`.

    The bound is first order in eps. With n = `dot_depth`, gate and reward logits are off by n eps sum|W x|. A reward
    enters the score with weight g / sum g; a gate logit with weight g (r - score) / sum g, as sigmoid' <= sigmoid. The
    sums over t tokens add (t + 4) eps of the mean |r|, 4 for sigmoid, product, clamp and division.
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
        error = depth * (gate * scale).sum() + (count + 4) * (gate * reward.abs()).sum()
        scores.append(score)
        bounds.append(EPS * error / gate.sum())
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
