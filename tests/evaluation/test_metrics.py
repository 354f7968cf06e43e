from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from swift_kernels.evaluation import metrics

NAN = float("nan")


def brute_force(scores: list[float], correct: list[bool], k: int) -> float:
    """Over every subset, the share of right answers among its best-scored ones."""
    outcomes = []
    for subset in itertools.combinations(range(len(scores)), k):
        scored = [index for index in subset if not math.isnan(scores[index])]
        best = max((scores[index] for index in scored), default=0.0)
        top = [index for index in scored if scores[index] == best]
        outcomes.append(sum(correct[index] for index in top) / len(top) if top else 0.0)
    return sum(outcomes) / len(outcomes)


SCORES = {
    "distinct": [0.3, -1.0, 2.0, 0.1, 5.0, -7.0, 0.2],
    "nan": [0.3, NAN, 2.0, NAN, 5.0, -7.0, 0.2],
    "all-nan": [NAN] * 7,
}
CORRECT = [True, False, False, True, False, True, True]


@pytest.mark.parametrize("k", range(1, 8))
@pytest.mark.parametrize("name", SCORES)
def test_best_of_k_is_the_mean_over_subsets(name: str, k: int) -> None:
    assert metrics.best_of_k(SCORES[name], CORRECT, k) == pytest.approx(brute_force(SCORES[name], CORRECT, k))


def test_best_of_k_resolves_ties_in_expectation() -> None:
    # Taking each of the tied candidates is as likely, whatever the subset: all tied is a random pick.
    assert metrics.best_of_k([1.0] * 7, CORRECT, 3) == pytest.approx(4 / 7)
    assert metrics.best_of_k([1.0, 1.0, 0.0], [True, False, False], 3) == pytest.approx(0.5)


@pytest.mark.parametrize("k", range(1, 8))
def test_pass_at_k_is_the_mean_over_subsets(k: int) -> None:
    expected = np.mean([any(subset) for subset in itertools.combinations(CORRECT, k)])
    assert metrics.pass_at_k(CORRECT, k) == pytest.approx(expected)


@pytest.mark.parametrize("k", range(1, 8))
def test_vote_at_k_is_the_mean_over_subsets(k: int) -> None:
    answers = ["4", "5", "5", "4", None, "4", "6"]
    correct = [True, False, False, True, False, True, False]
    outcomes = []
    for subset in itertools.combinations(range(7), k):
        votes = [answers[index] for index in subset if answers[index] is not None]
        most = max((votes.count(vote) for vote in votes), default=0)
        winners = {vote for vote in votes if votes.count(vote) == most}
        outcomes.append(("4" in winners) / len(winners) if winners else 0.0)
    assert metrics.vote_at_k(answers, correct, k) == pytest.approx(np.mean(outcomes))


def test_vote_samples_subsets_where_there_are_many() -> None:
    answers = ["1"] * 12 + ["2"] * 8
    correct = [True] * 12 + [False] * 8
    assert math.comb(20, 5) > metrics.SUBSETS
    value = metrics.vote_at_k(answers, correct, 5)
    assert value == metrics.vote_at_k(answers, correct, 5)
    exact = sum(math.comb(12, i) * math.comb(8, 5 - i) for i in range(3, 6)) / math.comb(20, 5)
    # Five standard errors of a share over that many subsets.
    assert abs(value - exact) < 5 * math.sqrt(exact * (1 - exact) / metrics.SUBSETS)


def test_auc_counts_pairs() -> None:
    scores, correct = [3.0, 1.0, 2.0, 2.0, NAN], [True, False, True, False, True]
    values = [-10.0 if math.isnan(score) else score for score in scores]
    pairs = [
        (good > bad) + 0.5 * (good == bad)
        for good, right in zip(values, correct, strict=True)
        if right
        for bad, other in zip(values, correct, strict=True)
        if not other
    ]
    assert metrics.within_problem_auc(scores, correct) == pytest.approx(np.mean(pairs))
    assert math.isnan(metrics.within_problem_auc([1.0, 2.0], [True, True]))


def test_intervals_cover_the_truth() -> None:
    generator = np.random.default_rng(1)
    draws = generator.random((80, 120)) < 0.4
    covered = [low <= 0.4 <= high for low, high in ((e.low, e.high) for e in map(metrics.estimate, draws))]
    # 95% of the experiments, within four standard errors.
    assert abs(np.mean(covered) - 0.95) < 4 * math.sqrt(0.95 * 0.05 / len(draws))


def test_estimate_leaves_out_nan_and_survives_nothing() -> None:
    assert metrics.estimate([1.0, NAN, 0.0]).mean == 0.5
    assert math.isnan(metrics.estimate([NAN]).mean)
    assert metrics.estimate([0.25] * 9) == metrics.Estimate(0.25, 0.25, 0.25)


def test_flipping_signs_counts_flips_that_are_as_far_from_zero() -> None:
    # All four choices of signs are as likely; two of them reach the mean of two equal differences.
    p = metrics.sign_flip_p([0.5, 0.5, NAN], flips=10_000)
    # Five standard errors of a share over that many flips.
    assert abs(p - 0.5) < 5 * math.sqrt(0.25 / 10_000)
    assert p == metrics.sign_flip_p([-0.5, -0.5])


@pytest.mark.parametrize(
    ("differences", "expected"),
    [([0.0] * 8, 1.0), ([1e-17, -1e-16, 1e-16], 1.0), ([0.1, -0.1], 1.0), ([0.25] * 40, 1 / 10_001)],
    ids=["none", "rounding", "balanced", "clear"],
)
def test_p_at_its_ends(differences: list[float], expected: float) -> None:
    assert metrics.sign_flip_p(differences) == expected


def test_p_is_uniform_where_nothing_differs() -> None:
    generator = np.random.default_rng(2)
    simulations, flips = 200, 199
    found = np.sort([metrics.sign_flip_p(generator.normal(size=30), flips, seed) for seed in range(simulations)])
    ranks = np.arange(simulations)
    distance = max((found - ranks / simulations).max(), ((ranks + 1) / simulations - found).max())
    # Kolmogorov-Smirnov: passed by chance once in a thousand; p comes in steps of 1 / (flips + 1).
    assert distance < 1.95 / math.sqrt(simulations) + 1 / (flips + 1)


def test_difference_is_paired() -> None:
    found = metrics.difference([1.0, 0.5, NAN, 1.0], [0.5, 0.0, 1.0, 0.5])
    assert found == metrics.Difference(0.5, 0.5, 0.5, metrics.sign_flip_p([0.5] * 3))
    with pytest.raises(ValueError, match="zip"):
        metrics.difference([1.0], [0.5, 0.0])
    assert math.isnan(metrics.difference([NAN], [1.0]).p)
