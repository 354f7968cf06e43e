"""Combining two scores of each candidate, or an answer's votes with their weights.

Arrays hold the candidates of one problem along their last axis; axes before it are batches, such as subsets of the
candidates. Greater is better. A candidate with a NaN in either input is absent: it has NaN, is never chosen, and the
others are ranked and scaled as if it were not there.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]

TIE = 1e-12
"""Sums of weights that differ by less, relative to what was summed, are equal."""


def rank_combination(scores: ArrayLike, rewards: ArrayLike) -> Floats:
    """Minus the worse of a candidate's two ranks, `[..., candidates]` (arXiv 2505.12225).

    Rank 1 is the best; equal values share the mean of their ranks.
    """
    from scipy.stats import rankdata

    first, second = _present(scores, rewards)
    ranks = [rankdata(-values, axis=-1, nan_policy="omit") for values in (first, second)]
    return -np.maximum(*ranks)


def min_max_mean(scores: ArrayLike, rewards: ArrayLike) -> Floats:
    """Mean of the two after min-max scaling, `[..., candidates]` (arXiv 2505.12225); see `weighted_mean`."""
    return weighted_mean(scores, rewards, 0.5)


def weighted_mean(scores: ArrayLike, rewards: ArrayLike, weight: float) -> Floats:
    """`weight * scores + (1 - weight) * rewards`, `[..., candidates]`, each scaled to 0..1 within its problem.

    Values that are all equal scale to 0. An infinite value stays infinite, so that it decides whatever the other
    value says, and the finite ones are scaled among themselves; where opposite infinities meet the result is NaN. At a
    weight of 0 or 1 the other values count for nothing, but for the NaN among them.
    """
    if not 0 <= weight <= 1:
        raise ValueError(f"weight is {weight}: expected 0..1, the share of the scores")
    first, second = _present(scores, rewards)
    absent = np.isnan(first)
    if weight in (0, 1):
        return np.where(absent, np.nan, _min_max(first if weight else second))
    with np.errstate(invalid="ignore"):  # opposite infinities
        return weight * _min_max(first) + (1 - weight) * _min_max(second)


def weighted_vote(answers: Sequence[str | None], weights: Sequence[float]) -> list[int]:
    """Indices of the candidates that hold the answer with the greatest sum of weights, or answers when sums are equal.

    A candidate without an answer (None) has no vote and is never chosen; without any vote the list is empty.
    """
    numbers: dict[str, int] = {}
    ids = [-1 if answer is None else numbers.setdefault(answer, len(numbers)) for answer in answers]
    return np.flatnonzero(weighted_vote_winners(np.array(ids, dtype=np.int64), weights)).tolist()


def weighted_vote_winners(answer_ids: ArrayLike, weights: ArrayLike) -> NDArray[np.bool_]:
    """Which candidates hold an answer with the greatest sum of weights, bool `[..., candidates]`.

    Args:
        answer_ids: equal integers for equal answers, negative for none, which has no vote and never wins.
        weights: of the votes; NaN counts 0, and so does the sum of opposite infinities.
    """
    ids, votes = np.asarray(answer_ids), np.asarray(weights, dtype=float)
    _check_same_shape("answers", ids, "weights", votes)
    votes = np.where(np.isnan(votes), 0.0, votes)
    voting = ids >= 0
    sums, summed = np.full(ids.shape, -np.inf), np.zeros(ids.shape)
    with np.errstate(invalid="ignore"):
        for answer in np.unique(ids[voting]):
            held = ids == answer
            own = np.where(held, votes, 0.0)
            total = own.sum(axis=-1, keepdims=True)
            sums = np.where(held, np.where(np.isnan(total), 0.0, total), sums)
            summed = np.where(held, np.abs(own).sum(axis=-1, keepdims=True), summed)
        best = sums.max(axis=-1, keepdims=True, initial=-np.inf)
        # Rounding is relative to what was added, not to what positive and negative weights leave of it.
        size = np.maximum(summed, np.where(sums == best, summed, 0.0).max(axis=-1, keepdims=True, initial=0.0))
        close = np.isfinite(size) & (best - sums <= TIE * size)
    return voting & ((sums == best) | close)


def fit_weight(
    score_tables: Sequence[Sequence[float]],
    reward_tables: Sequence[Sequence[float]],
    correct: Sequence[Sequence[bool]],
    grid: int = 21,
) -> float:
    """The weight of `weighted_mean` whose pick among all candidates is right most often over these problems.

    Args:
        score_tables, reward_tables, correct: a list a problem, a value a candidate.
        grid: how many weights are tried, evenly from 0 to 1.

    Returns:
        Of weights that do equally well the one nearest to 0.5, and of two as near the smaller. Equally good candidates
        are each as likely to be picked, and where all are NaN none is.
    """
    if grid < 2:
        raise ValueError(f"grid is {grid}: expected at least 2 weights to choose from")
    sizes = [len(grades) for grades in correct]
    for name, table in (("scores", score_tables), ("rewards", reward_tables)):
        if [len(row) for row in table] != sizes:
            raise ValueError(f"the {name} do not match the grades: expected one a candidate of {len(sizes)} problems")
    if not sizes:
        raise ValueError("there are no problems to fit a weight to: expected at least one")
    weights = np.linspace(0, 1, grid).tolist()
    problems = list(zip(score_tables, reward_tables, correct, strict=True))
    accuracies = [
        sum(_chance(weighted_mean(scores, rewards, weight), grades) for scores, rewards, grades in problems)
        for weight in weights
    ]
    # Sums of the same fractions differ in their last bits.
    best = max(accuracies) - 1e-9
    return min((w for w, found in zip(weights, accuracies, strict=True) if found >= best), key=lambda w: abs(w - 0.5))


def _chance(combined: Floats, correct: Sequence[bool]) -> float:
    """That the best candidate is right, where each of equals is as likely to be taken."""
    present = ~np.isnan(combined)
    if not present.any():
        return 0.0
    return float(np.asarray(correct, dtype=float)[combined == combined[present].max()].mean())


def _present(scores: ArrayLike, rewards: ArrayLike) -> tuple[Floats, Floats]:
    """Both as float64, NaN wherever either is."""
    first, second = np.asarray(scores, dtype=float), np.asarray(rewards, dtype=float)
    _check_same_shape("scores", first, "rewards", second)
    absent = np.isnan(first) | np.isnan(second)
    return np.where(absent, np.nan, first), np.where(absent, np.nan, second)


def _check_same_shape(name: str, first: NDArray, other: str, second: NDArray) -> None:
    if first.shape != second.shape or not first.ndim:
        raise ValueError(
            f"{name} of shape {list(first.shape)} and {other} of shape {list(second.shape)}: expected the same, with "
            "the candidates along the last axis"
        )


def _min_max(values: Floats) -> Floats:
    finite = np.isfinite(values)
    # Halved, so that the distance of huge values of opposite signs is finite.
    values = values / 2
    low = np.where(finite, values, np.inf).min(axis=-1, keepdims=True, initial=np.inf)
    high = np.where(finite, values, -np.inf).max(axis=-1, keepdims=True, initial=-np.inf)
    spread = np.where(high > low, high - low, 1.0)
    # Infinities and NaN stay as they are; without finite values there is nothing to scale.
    return np.where(finite, (values - np.where(np.isinf(low), 0.0, low)) / spread, values)
