"""What is known of the features before training: mean and deviation of each, and where a ridge regression ends.

Hidden states have features a thousand times larger than others, and means far from 0. On standardised features every
weight learns at one pace; folded into the weights, they cost nothing when scoring.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from swift_kernels.training.split import NothingToLearnError

TOKENS_AT_ONCE = 4096

CONSTANT = 1e-6
"""Deviation, relative to the mean, below which a feature is rounding noise about a constant and gets no weight."""

RIDGE_RESPONSES = 4096
"""At most so many responses enter a ridge regression, whose cost grows with their cube."""

PENALTIES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
"""Of a ridge regression, relative to the mean squared length of a candidate's features."""


class NotFiniteError(NothingToLearnError):
    """A feature of the response of this index is NaN or infinite."""

    def __init__(self, response: int, what: str) -> None:
        super().__init__(f"response {response} {what}")
        self.response, self.what = response, what


class StoredFeatures(Protocol):
    """Stored features, such as `activations.Activations`."""

    @property
    def widths(self) -> tuple[int, ...]: ...

    @property
    def lengths(self) -> tuple[int, ...]: ...

    def batch(self, indices: Tensor, device: torch.device | str = "cpu") -> tuple[list[Tensor], Tensor]: ...


@dataclass(frozen=True)
class Statistics:
    """float64 `[features]`: `mean`, and `inverse_deviation`, which is 0 for a feature that does not vary."""

    mean: Tensor
    inverse_deviation: Tensor

    def fold(self, weight: Tensor, bias: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
        """Weights for raw features from those for standardised ones, in float64, differentiable.

        `weight` `[outputs, len(columns)]`: V of V (x - mean) / deviation + c becomes W = V / deviation, b = c - W mean.
        """
        raw = weight.double() * self.inverse_deviation[columns]
        return raw, bias.double() - raw @ self.mean[columns]


def identity(features: int, device: torch.device) -> Statistics:
    """Features as they are."""
    return Statistics(
        torch.zeros(features, dtype=torch.float64, device=device),
        torch.ones(features, dtype=torch.float64, device=device),
    )


def parts(responses: Tensor, lengths: Sequence[int]) -> Iterator[Tensor]:
    """The responses in order, so many at once that they have `TOKENS_AT_ONCE` tokens or are a single one."""
    part: list[int] = []
    tokens = 0
    for response in responses.tolist():
        if part and tokens + lengths[response] > TOKENS_AT_ONCE:
            yield torch.tensor(part)
            part, tokens = [], 0
        part.append(response)
        tokens += lengths[response]
    if part:
        yield torch.tensor(part)


def survey(store: StoredFeatures, responses: Tensor, keep: Tensor, device: torch.device) -> tuple[Statistics, Tensor]:
    """One pass over distinct responses, in float64: statistics over their tokens, and the mean features of some.

    `keep` is bool `[responses]`. Returns the statistics, and float32 `[kept responses, features]`.

    Raises:
        NothingToLearnError: a feature is NaN or infinite.
    """
    features = sum(store.widths)
    # Squares are taken of the distance from a point near the mean: E[x^2] - E[x]^2 would cancel.
    pivot = torch.zeros(features, dtype=torch.float64, device=device)
    total, squares = torch.zeros_like(pivot), torch.zeros_like(pivot)
    means = torch.empty(int(keep.sum()), features, device=device)
    tokens = done = kept = 0
    for part in parts(responses, store.lengths):
        entries, cu_seqlens = store.batch(part, device)
        sizes = cu_seqlens.diff().to(device)
        sequence = torch.arange(len(part), device=device).repeat_interleave(sizes)
        chosen = keep[done : done + len(part)].to(device)
        rows = slice(kept, kept + int(chosen.sum()))
        first = 0
        for entry in entries:
            columns = slice(first, first + entry.shape[1])
            first = columns.stop
            values = entry.double()
            if tokens == 0:
                pivot[columns] = values.mean(dim=0)
            sums = values.new_zeros(len(part), values.shape[1]).index_add(0, sequence, values)
            means[rows, columns] = (sums / sizes[:, None])[chosen].to(means)
            values -= pivot[columns]
            total[columns] += values.sum(dim=0)
            squares[columns] += values.square_().sum(dim=0)
        _check_finite(squares, entries, sequence, part)
        tokens += len(sequence)
        done += len(part)
        kept = rows.stop
    offset = total / tokens
    mean = pivot + offset
    deviation = (squares / tokens - offset.square()).clamp_min(0).sqrt()
    varies = deviation > CONSTANT * mean.abs()
    return Statistics(mean, torch.where(varies, 1 / deviation, 0.0)), means


def check_finite(store: StoredFeatures, responses: Tensor, device: torch.device) -> None:
    """Raises `NothingToLearnError` when a feature of the responses is NaN or infinite."""
    for part in parts(responses, store.lengths):
        entries, cu_seqlens = store.batch(part, device)
        sequence = torch.arange(len(part), device=device).repeat_interleave(cu_seqlens.diff().to(device))
        _check_finite(torch.cat([entry.sum(dim=0, dtype=torch.float64) for entry in entries]), entries, sequence, part)


def _check_finite(sums: Tensor, entries: Sequence[Tensor], sequence: Tensor, part: Tensor) -> None:
    """`sums` show whether anything is wrong; only then every value is looked at."""
    if torch.isfinite(sums).all():
        return
    bad = torch.stack([~torch.isfinite(entry).all(dim=1) for entry in entries])
    rows = bad.any(dim=0).nonzero()[:, 0]
    if len(rows):
        row = int(rows[0])
        entry = int(bad[:, row].nonzero()[0])
        values = entries[entry][row]
        raise NotFiniteError(
            int(part[sequence[row].cpu()]),
            f"has {int((~torch.isfinite(values)).sum())} of {len(values)} features NaN or infinite in entry {entry} of "
            f"its token {int((sequence[:row] == sequence[row]).sum())}: what the model computed is not finite (is its "
            "dtype too narrow?), or the store is damaged",
        )


def ridge_paths(features: Tensor, labels: Tensor, counts: Tensor, penalties: Sequence[float] = PENALTIES) -> Tensor:
    """Ridge regressions of labels on the candidates' mean standardised features, one for each penalty.

    Args:
        features: `[candidates, features]`, labels: `[candidates]`, counts: `[candidates]`, how often each occurs.

    Returns:
        float64 weights `[penalties, features]`, without an intercept.
    """
    mean = (features * counts[:, None]).sum(dim=0, dtype=torch.float64) / counts.sum()
    centred = (features - mean.to(features)) * counts.sqrt().to(features)[:, None]
    counts = counts.double()
    target = (labels.double() - (counts @ labels.double()) / counts.sum()) * counts.sqrt()
    candidates, width = centred.shape
    # The smaller of the two Gram matrices; products in float32 and blocks of columns, sums in float64.
    dual = candidates < width
    rows = centred if dual else centred.T
    gram = torch.zeros(len(rows), len(rows), dtype=torch.float64, device=features.device)
    for block in rows.split(2048, dim=1):
        gram += (block @ block.T).double()
    length = gram.trace() / candidates
    side = target if dual else centred.T.double() @ target
    weights = []
    for penalty in penalties:
        damped = gram + penalty * length * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
        solution = torch.cholesky_solve(side[:, None], torch.linalg.cholesky(damped))[:, 0]
        weights.append((solution.to(centred.dtype) @ centred).double() if dual else solution)
    return torch.stack(weights)


def logistic_scale(scores: Tensor, labels: Tensor) -> tuple[float, float]:
    """a and c of sigmoid(a score + c), fitted to the labels by Newton's method: scores that losses take as logits."""
    inputs = torch.stack([scores.double(), torch.ones_like(scores, dtype=torch.float64)], dim=1)
    spread = float(inputs[:, 0].std().clamp_min(1e-12))
    inputs[:, 0] /= spread
    solution = torch.zeros(2, dtype=torch.float64, device=scores.device)
    for _ in range(50):
        probability = (inputs @ solution).sigmoid()
        # The prior keeps scores that separate the labels from growing without bound.
        slope = inputs.T @ (labels.double() - probability) - solution
        curvature = (inputs * (probability * (1 - probability))[:, None]).T @ inputs
        solution = solution + torch.linalg.solve(curvature + torch.eye(2).to(curvature), slope)
    return float(solution[0]) / spread, float(solution[1])
