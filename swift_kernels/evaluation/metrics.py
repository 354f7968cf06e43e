"""What a selector wins, problem by problem, and how sure that is.

Accuracy at k is the expectation over all subsets of k of a problem's N candidates, not over the first k: the same
expectation at a smaller variance. Ties are resolved in expectation. Intervals are bootstrapped over problems, since
the candidates of one problem are no independent observations.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from swift_kernels.selection.pick import majority_indices

CONFIDENCE = 0.95
RESAMPLES = 10_000
FLIPS = 10_000
SUBSETS = 512
"""Subsets a vote is counted over; where there are more, this many are drawn with a fixed seed."""


@dataclass(frozen=True)
class Estimate:
    """A mean over problems with its bootstrap interval."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Difference(Estimate):
    """A mean paired difference; `p` is that of `sign_flip_p`."""

    p: float


def best_of_k(scores: Sequence[float], correct: Sequence[bool], k: int) -> float:
    """Probability that the best-scored of k random candidates is right; NaN scores are never chosen."""
    _check(len(scores), len(correct), k)
    order = np.argsort(np.nan_to_num(-np.asarray(scores, dtype=float), nan=np.inf), kind="stable")
    ranked = np.asarray(scores, dtype=float)[order]
    right = np.where(np.isnan(ranked), 0.0, np.asarray(correct, dtype=float)[order])
    # Among equal scores each is as likely to be taken.
    starts = np.flatnonzero(np.r_[True, ranked[1:] != ranked[:-1]])
    sizes = np.diff(np.r_[starts, len(ranked)])
    right = np.repeat(np.add.reduceat(right, starts) / sizes, sizes)
    n = len(scores)
    # The candidate of rank i (from 0) is the best of those subsets whose other members all rank below it.
    weights = [math.comb(n - 1 - rank, k - 1) / math.comb(n, k) for rank in range(n)]
    return float(np.dot(weights, right))


def pass_at_k(correct: Sequence[bool], k: int) -> float:
    """Probability that at least one of k random candidates is right: what a perfect selector would reach."""
    n, right = len(correct), sum(correct)
    _check(n, n, k)
    return 1.0 - math.comb(n - right, k) / math.comb(n, k)


def vote_at_k(answers: Sequence[str | None], correct: Sequence[bool], k: int) -> float:
    """Probability that the majority vote of k random candidates is right; tied answers share it equally.

    Exact where there are at most `SUBSETS` subsets.
    """
    n = len(answers)
    _check(n, len(correct), k)
    if math.comb(n, k) <= SUBSETS:
        subsets = list(itertools.combinations(range(n), k))
    else:
        generator = np.random.default_rng(0)
        subsets = [tuple(generator.choice(n, k, replace=False)) for _ in range(SUBSETS)]
    total = 0.0
    for subset in subsets:
        # Tied answers hold equally many candidates, so the mean over those is the mean over the answers.
        winners = majority_indices([answers[index] for index in subset])
        if winners:
            total += sum(correct[subset[index]] for index in winners) / len(winners)
    return total / len(subsets)


def within_problem_auc(scores: Sequence[float], correct: Sequence[bool]) -> float:
    """Probability that a right candidate outscores a wrong one of the same problem; NaN where one kind is missing.

    A candidate without a score counts as the worst.
    """
    from scipy.stats import rankdata

    right, wrong = sum(correct), len(correct) - sum(correct)
    if not right or not wrong:
        return math.nan
    ranks = rankdata(np.nan_to_num(np.asarray(scores, dtype=float), nan=-np.inf))
    # The rank sum of Mann and Whitney; ties have the mean of their ranks.
    return float((ranks[np.asarray(correct, dtype=bool)].sum() - right * (right + 1) / 2) / (right * wrong))


def estimate(values: Sequence[float], seed: int = 0) -> Estimate:
    """Mean of per-problem values and its percentile bootstrap interval; NaN values are left out."""
    sample = np.asarray(values, dtype=float)
    sample = sample[~np.isnan(sample)]
    if not len(sample):
        return Estimate(math.nan, math.nan, math.nan)
    generator = np.random.default_rng(seed)
    means = np.empty(RESAMPLES)
    chunk = max(1, 10_000_000 // len(sample))
    for start in range(0, RESAMPLES, chunk):
        size = min(chunk, RESAMPLES - start)
        means[start : start + size] = sample[generator.integers(len(sample), size=(size, len(sample)))].mean(axis=1)
    return Estimate(float(sample.mean()), *_interval(means))


def estimate_runs(runs: Sequence[Sequence[float]], seed: int = 0) -> Estimate:
    """Mean over runs and problems, and its interval from resampling both: `runs` holds each run's per-problem values.

    One run gives the interval of `estimate`. Problems without a value, NaN, have none in any run.
    """
    sample = np.asarray(runs, dtype=float)
    sample = sample[:, ~np.isnan(sample).any(axis=0)]
    if len(sample) == 1 or not sample.shape[1]:
        return estimate(sample[0], seed)
    generator = np.random.default_rng(seed)
    runs_drawn = generator.multinomial(len(sample), [1 / len(sample)] * len(sample), size=RESAMPLES) / len(sample)
    means = np.empty(RESAMPLES)
    chunk = max(1, 10_000_000 // sample.size)
    for start in range(0, RESAMPLES, chunk):
        stop = min(start + chunk, RESAMPLES)
        problems = generator.integers(sample.shape[1], size=(stop - start, sample.shape[1]))
        means[start:stop] = (sample[:, problems].mean(axis=2).T * runs_drawn[start:stop]).sum(axis=1)
    return Estimate(float(sample.mean()), *_interval(means))


def difference_runs(first: Sequence[Sequence[float]], second: Sequence[Sequence[float]], seed: int = 0) -> Difference:
    """Of `first - second`, paired by run and problem; the p-value is that of the problems' means over runs."""
    values = np.asarray(first, dtype=float) - np.asarray(second, dtype=float)
    found = estimate_runs(values.tolist(), seed)
    return Difference(found.mean, found.low, found.high, sign_flip_p(values.mean(axis=0).tolist(), seed=seed))


def difference(first: Sequence[float], second: Sequence[float], seed: int = 0) -> Difference:
    """Of `first - second`, paired by problem; pairs that hold a NaN are left out."""
    values = [a - b for a, b in zip(first, second, strict=True)]
    found = estimate(values, seed)
    return Difference(found.mean, found.low, found.high, sign_flip_p(values, seed=seed))


def sign_flip_p(differences: Sequence[float], flips: int = FLIPS, seed: int = 0) -> float:
    """Two-sided p-value of paired differences being symmetric about zero, by a sign-flip permutation test.

    Were the two sides alike, each problem's difference would be as likely with the other sign. Of `flips` random
    choices of all signs, k have a mean at least as far from zero as the one observed, and p is (k + 1) / (flips + 1):
    never 0, and 1 where nothing differs. NaN values are left out; without any other p is NaN.
    """
    sample = np.asarray(differences, dtype=float)
    sample = sample[~np.isnan(sample)]
    if not len(sample):
        return math.nan
    # Means that are equal but for rounding count as equally far.
    observed = abs(sample.mean()) - 1e-12
    generator = np.random.default_rng(seed)
    as_far = 0
    chunk = max(1, 10_000_000 // len(sample))
    for start in range(0, flips, chunk):
        size = min(chunk, flips - start)
        signs = 2.0 * generator.integers(2, size=(size, len(sample)), dtype=np.int8) - 1.0
        as_far += int(np.count_nonzero(np.abs(signs @ sample) / len(sample) >= observed))
    return (as_far + 1) / (flips + 1)


def without_nan(value: Any) -> Any:
    """For JSON, which has no NaN: null."""
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def _interval(means: np.ndarray) -> tuple[float, float]:
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return float(low), float(high)


def _check(n: int, others: int, k: int) -> None:
    if n != others:
        raise ValueError(f"{n} candidates but {others} grades")
    if not 1 <= k <= n:
        raise ValueError(f"k is {k}: expected 1..{n}, the number of candidates")
