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


SIMULATIONS = 1000
# What 1,000 experiments may show of a true 95% is 93.2 to 96.8 with 99% probability: the range asked for.
COVERED = (0.93, 0.97)


@pytest.fixture(scope="module")
def population() -> np.ndarray:
    """Best-of-4 of 8 answers a problem by scores that know something, on problems that differ much in difficulty."""
    generator = np.random.default_rng(10)
    correct = generator.random((20_000, 8)) < generator.beta(0.6, 0.9, size=20_000)[:, None]
    scores = generator.normal(size=correct.shape) + correct
    return np.array(
        [metrics.best_of_k(row, grades, 4) for row, grades in zip(scores.tolist(), correct.tolist(), strict=True)]
    )


@pytest.mark.parametrize("problems", [20, 60, 200])
def test_intervals_cover_the_truth_in_a_thousand_simulations(
    problems: int, population: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A fifth of the resamples: an end of the interval then varies by a hundredth of its length, in every experiment.
    monkeypatch.setattr(metrics, "RESAMPLES", 2000)
    generator = np.random.default_rng(11)
    found = [metrics.estimate(generator.choice(population, problems), seed) for seed in range(SIMULATIONS)]
    covered = float(np.mean([each.low <= population.mean() <= each.high for each in found]))
    print(f"{problems} problems: {covered:.1%} of {SIMULATIONS} intervals cover the truth")
    assert COVERED[0] <= covered <= COVERED[1]


@pytest.mark.parametrize(
    ("share", "problems"), [(0.97, 60), (0.95, 20), (0.9, 24), (0.05, 40), (0.4, 30)], ids=lambda value: str(value)
)
def test_intervals_of_shares_cover_the_truth_near_their_ends(
    share: float, problems: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics, "RESAMPLES", 1000)
    generator = np.random.default_rng(12)
    draws = (generator.random((400, problems)) < share).astype(float)
    found = [metrics.estimate(row, shares=True) for row in draws.tolist()]
    # Right or wrong alone comes in steps: no interval covers 95% of the time exactly, and this one never less.
    assert np.mean([each.low <= share <= each.high for each in found]) > 0.93
    assert all(0 <= each.low < each.high <= 1 for each in found)


def test_a_share_of_all_is_not_certain() -> None:
    assert metrics.estimate([1.0] * 20, shares=True).low == pytest.approx(20 / (20 + 1.959964**2))
    assert metrics.estimate([0.25] * 20, shares=True) == metrics.Estimate(0.25, 0.25, 0.25)


@pytest.mark.parametrize(
    ("ps", "expected"),
    [
        ([0.01, 0.04, 0.03], [0.03, 0.06, 0.06]),
        ([0.5, 0.9], [1.0, 1.0]),
        ([0.02], [0.02]),
        ([0.01, NAN, 0.02], [0.02, NAN, 0.02]),
        ([], []),
    ],
    ids=["three", "capped", "one", "nan", "none"],
)
def test_holm_adjusts_for_several_comparisons(ps: list[float], expected: list[float]) -> None:
    assert metrics.holm(ps) == pytest.approx(expected, nan_ok=True)


def test_weights_count_as_copies_do() -> None:
    found = metrics.estimate([1.0, 0.0, 0.5, NAN], weights=[2.0, 1.0, 0.0, 1.0])
    assert found.mean == pytest.approx(2 / 3)
    assert found.low == 0.0
    assert found.high == 1.0


@pytest.mark.parametrize("value", [{"mean": None}, {"a": [{"p": None, "ece": 1.0}]}, {"other": None}])
def test_null_is_read_as_the_nan_it_was(value: dict[str, object]) -> None:
    assert metrics.without_nan(metrics.with_nan(value)) == value
    assert ("nan" in str(metrics.with_nan(value))) == ("other" not in value)
