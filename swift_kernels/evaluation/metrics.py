"""What a selector wins, problem by problem, and how sure that is.

Accuracy at k is the expectation over all subsets of k of a problem's N candidates, not over the first k: the same
expectation at a smaller variance. Ties are resolved in expectation. Intervals are bootstrapped over problems, since
the candidates of one problem are no independent observations.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

CONFIDENCE = 0.95
RESAMPLES = 10_000
FLIPS = 10_000
SUBSETS = 512
"""Subsets that a choice is made in whose rule looks at all of them, as a vote does; where there are more, this many are
drawn with a fixed seed."""


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
    right = by_rank(scores, np.where(np.isnan(np.asarray(scores, dtype=float)), 0.0, np.asarray(correct, dtype=float)))
    n = len(scores)
    # The candidate of rank i (from 0) is the best of those subsets whose other members all rank below it.
    weights = [math.comb(n - 1 - rank, k - 1) / math.comb(n, k) for rank in range(n)]
    return float(np.dot(weights, right))


def by_rank(scores: Sequence[float], values: Sequence[float] | np.ndarray) -> np.ndarray:
    """Values in the order of descending scores, NaN last; those of equal scores have their mean."""
    sample = np.asarray(scores, dtype=float)
    missing = np.isnan(sample)
    order = np.lexsort((-sample, missing))
    ranked, absent = sample[order], missing[order]
    starts = np.flatnonzero(np.r_[True, (ranked[1:] != ranked[:-1]) & ~(absent[1:] & absent[:-1])])
    sizes = np.diff(np.r_[starts, len(ranked)])
    return np.repeat(np.add.reduceat(np.asarray(values, dtype=float)[order], starts) / sizes, sizes)


def pass_at_k(correct: Sequence[bool], k: int) -> float:
    """Probability that at least one of k random candidates is right: what a perfect selector would reach."""
    n, right = len(correct), sum(correct)
    _check(n, n, k)
    return 1.0 - math.comb(n - right, k) / math.comb(n, k)


def picked_at_k(chances: Callable[[np.ndarray], np.ndarray], correct: Sequence[bool], k: int) -> float:
    """Probability that what a rule picks among k random candidates is right; for rules that look at all k of them.

    Args:
        chances: of subsets of the candidates' indices, `[subsets, k]`, the chance that each member is picked, likewise.
    """
    _check(len(correct), len(correct), k)
    chosen = subsets(len(correct), k)
    return float((chances(chosen) * np.asarray(correct, dtype=float)[chosen]).sum(axis=1).mean())


@lru_cache(maxsize=64)
def subsets(n: int, k: int) -> np.ndarray:
    """Indices `[subsets, k]` of all subsets of k of n, or of `SUBSETS` random ones where there are more."""
    if math.comb(n, k) <= SUBSETS:
        found = np.array(list(itertools.combinations(range(n), k)))
    else:
        found = np.random.default_rng(0).permuted(np.tile(np.arange(n), (SUBSETS, 1)), axis=1)[:, :k]
    found.flags.writeable = False
    return found


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


def estimate(
    values: Sequence[float], seed: int = 0, weights: Sequence[float] | None = None, *, shares: bool = False
) -> Estimate:
    """Mean of per-problem values and its bootstrap interval; NaN values and those of weight 0 are left out.

    With `shares` the values are in 0..1, and the interval takes in that of `_wilson`: near 0 and 1 few problems hold
    too little of the other kind for a bootstrap, which of 20 right ones would say 100 to 100%.
    """
    sample = np.asarray(values, dtype=float)
    weight = np.ones(len(sample)) if weights is None else np.asarray(weights, dtype=float)
    known = ~np.isnan(sample) & (weight > 0)
    sample, weight = sample[known], weight[known]
    if not len(sample):
        return Estimate(math.nan, math.nan, math.nan)
    generator = np.random.default_rng(seed)
    means = np.empty(RESAMPLES)
    chunk = max(1, 10_000_000 // len(sample))
    for start in range(0, RESAMPLES, chunk):
        size = min(chunk, RESAMPLES - start)
        drawn = generator.integers(len(sample), size=(size, len(sample)))
        if weights is None:
            means[start : start + size] = sample[drawn].mean(axis=1)
        else:
            means[start : start + size] = (sample * weight)[drawn].sum(axis=1) / weight[drawn].sum(axis=1)
    mean = float(np.average(sample, weights=weight))
    low, high = _interval(means, len(sample))
    if shares:
        below, above = _wilson(mean, float(np.average((sample - mean) ** 2, weights=weight)), len(sample))
        low, high = min(low, below), max(high, above)
    return Estimate(mean, low, high)


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
    return Estimate(float(sample.mean()), *_interval(means, sample.shape[1]))


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


def holm(ps: Sequence[float]) -> list[float]:
    """p-values of several comparisons, each adjusted so that the chance of any false alarm stays as stated (Holm)."""
    adjusted = [math.nan] * len(ps)
    known = sorted((index for index, p in enumerate(ps) if not math.isnan(p)), key=lambda index: ps[index])
    largest = 0.0
    for rank, index in enumerate(known):
        largest = max(largest, min(1.0, (len(known) - rank) * ps[index]))
        adjusted[index] = largest
    return adjusted


def without_nan(value: Any) -> Any:
    """For JSON, which has no NaN: null."""
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def with_nan(value: Any) -> Any:
    """The reverse of `without_nan`, for the figures that may be NaN."""
    if isinstance(value, dict):
        return {
            key: math.nan if item is None and key in ("mean", "low", "high", "p", "ece", "area") else with_nan(item)
            for key, item in value.items()
        }
    return [with_nan(item) for item in value] if isinstance(value, list) else value


def _interval(means: np.ndarray, problems: int) -> tuple[float, float]:
    """Quantiles of the resampled means, moved outwards as far as Student's t is wider than the normal distribution.

    Resampling n problems makes the spread of their mean too small by (n - 1) / n; the plain percentiles of 20 problems
    cover 93% (Hesterberg, "What Teachers Should Know About the Bootstrap", 2015, section 5.3).
    """
    from scipy.special import ndtr, stdtrit

    tail = (1 - CONFIDENCE) / 2
    if problems > 1:
        tail = float(ndtr(math.sqrt(problems / (problems - 1)) * stdtrit(problems - 1, tail)))
    low, high = np.quantile(means, [tail, 1 - tail])
    return float(low), float(high)


def _wilson(mean: float, variance: float, problems: int) -> tuple[float, float]:
    """Wilson's score interval of a share, for as many right-or-wrong problems as would vary as these values do."""
    if variance == 0 and 0 < mean < 1:
        return mean, mean
    count = problems if variance == 0 else problems * max(1.0, mean * (1 - mean) / variance)
    z = 1.959964
    center = (mean * count + z**2 / 2) / (count + z**2)
    reach = z / (count + z**2) * math.sqrt(mean * (1 - mean) * count + z**2 / 4)
    return max(0.0, center - reach), min(1.0, center + reach)


def _check(n: int, others: int, k: int) -> None:
    if n != others:
        raise ValueError(f"{n} candidates but {others} grades")
    if not 1 <= k <= n:
        raise ValueError(f"k is {k}: expected 1..{n}, the number of candidates")
