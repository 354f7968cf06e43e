from __future__ import annotations

import math
from dataclasses import astuple

import numpy as np
import pytest

from swift_kernels.evaluation import calibration
from swift_kernels.evaluation.calibration import (
    Scaling,
    abstention,
    calibrate,
    fit_scaling,
    fold_of_problems,
    reliability,
)

NAN = float("nan")


def planted(problems: int, temperature: float, offset: float, seed: int = 0) -> tuple[list, list]:
    """Scores whose log-odds of being right are `score / temperature + offset`, and grades drawn by them."""
    generator = np.random.default_rng(seed)
    logits = generator.normal(0.0, 2.0, size=(problems, 8))
    correct = generator.random(logits.shape) < 1 / (1 + np.exp(-logits))
    return (temperature * (logits - offset)).tolist(), correct.tolist()


@pytest.mark.parametrize(
    ("temperature", "offset"), [(1.0, 0.0), (0.2, 3.0), (40.0, -1.5)], ids=["identity", "sharp", "flat"]
)
def test_the_planted_scaling_is_found(temperature: float, offset: float) -> None:
    found = fit_scaling(*planted(2000, temperature, offset))
    # 16,000 answers tell the slope to about 2% and the offset, a shift of logits, to about 0.04 (two standard errors).
    assert found.temperature == pytest.approx(temperature, rel=0.05)
    assert found.offset == pytest.approx(offset, abs=0.15)


def test_each_problem_weighs_the_same() -> None:
    scores, correct = planted(60, 1.0, 0.0)
    once = fit_scaling(scores, correct)
    # Every answer of a problem twice changes the number of answers, which Platt's targets see, and no weight.
    twice = fit_scaling([row * 2 for row in scores], [row * 2 for row in correct])
    assert astuple(twice) == pytest.approx(astuple(once), abs=0.02)


@pytest.mark.parametrize(
    ("scores", "correct"),
    [
        ([[1.0, -1.0]] * 20, [[True, False]] * 20),
        ([[-1.0, 1.0]] * 20, [[True, False]] * 20),
        ([[1.0, 1.0]] * 20, [[True, False]] * 20),
        ([[1e30, -1e30]] * 20, [[True, False]] * 20),
    ],
    ids=["separated", "inverted", "constant", "huge"],
)
def test_scores_at_their_ends_have_a_finite_temperature(scores: list, correct: list) -> None:
    found = fit_scaling(scores, correct)
    assert 0 < found.temperature < math.inf
    assert math.isfinite(found.offset)
    (row,) = found.probabilities(scores[:1])
    assert row[0] >= row[1] - 1e-9 if scores[0][0] >= scores[0][1] else row[0] <= row[1], "the order stays"


@pytest.mark.parametrize(
    ("scores", "correct", "message"),
    [
        ([[1.0, 2.0]], [[True, True]], "all answers are right"),
        ([[1.0, 2.0]], [[False, False]], "all answers are wrong"),
        ([[NAN, NAN]], [[True, False]], "no answer has a finite score"),
        ([[math.inf, -math.inf]], [[True, False]], "no answer has a finite score"),
    ],
    ids=["right", "wrong", "no-score", "infinite"],
)
def test_nothing_to_fit_to_is_said(scores: list, correct: list, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fit_scaling(scores, correct)


def test_a_problem_is_not_judged_by_a_scaling_that_it_fitted() -> None:
    scores, correct = planted(50, 1.0, 0.0)
    keys = [str(index // 2) for index in range(50)]
    parts = fold_of_problems(keys)
    assert all(parts[index] == parts[index + 1] for index in range(0, 50, 2)), "a key's problems stay together"
    assert sorted(map(parts.count, set(parts))) == [10] * 5
    _, before = calibrate(scores, correct, keys)
    flipped = [[not grade for grade in row] if index < 2 else row for index, row in enumerate(correct)]
    _, after = calibrate(scores, flipped, keys)
    own = [index for index, part in enumerate(parts) if part == parts[0]]
    assert [after[index] for index in own] == [before[index] for index in own]
    assert after != before


def test_calibration_mends_what_was_wrong() -> None:
    scores, correct = planted(400, 0.1, 2.0)
    found, probabilities = calibrate(scores, correct, [str(index) for index in range(400)])
    assert found.before.ece > 0.15
    # 3,200 answers in 15 bins: chance alone makes about sqrt(2 / pi * 0.25 * 15 / 3200) = 0.027.
    assert found.after.ece < 0.03
    assert found.after.brier.mean < found.before.brier.mean
    assert np.shape(probabilities) == (400, 8)
    assert found.abstention.accuracy[0].mean > found.abstention.accuracy[-1].mean


def test_ece_of_a_hand_made_case() -> None:
    # Bins [0.2, 0.267) and [0.8, 0.867): |0.25 - 0.5| for two answers, |0.8 - 1| for two.
    found = reliability([[0.25, 0.25], [0.8, 0.8, NAN]], [[True, False], [True, True, False]])
    assert found.ece == pytest.approx((2 * 0.25 + 2 * 0.2) / 4)
    assert [(each.confidence, each.accuracy, each.count) for each in found.bins] == [(0.25, 0.5, 2), (0.8, 1.0, 2)]
    assert found.brier.mean == pytest.approx(((0.75**2 + 0.25**2) / 2 + 0.2**2) / 2)


@pytest.mark.parametrize("p", [0.0, 1.0])
def test_chances_at_the_ends_have_a_bin(p: float) -> None:
    assert reliability([[p]], [[True]]).ece == 1 - p


def test_reliability_of_nothing() -> None:
    found = reliability([[NAN]], [[True]])
    assert math.isnan(found.ece)
    assert found.bins == []


def test_abstention_leaves_out_the_least_sure() -> None:
    found = abstention([0.9, 0.1, 0.5, 0.7, NAN], [1.0, 0.0, 0.0, 1.0, 1.0])
    by_coverage = dict(zip(np.round(found.coverage, 1), found.accuracy, strict=True))
    assert by_coverage[0.2].mean == by_coverage[0.4].mean == 1.0
    assert by_coverage[0.6].mean == pytest.approx(2 / 3)
    assert by_coverage[0.8].mean == pytest.approx(1 / 2), "who is not sure at all is left out first"
    assert by_coverage[1.0].mean == pytest.approx(3 / 5)
    assert found.area == pytest.approx((1 + 1 + 2 / 3 + 1 / 2 + 3 / 5) / 5)


def test_equally_sure_picks_count_in_expectation() -> None:
    found = abstention([1.0] * 8 + [0.5] * 2, [1.0] * 4 + [0.0] * 6)
    assert found.accuracy[0].mean == found.accuracy[3].mean == pytest.approx(0.5)
    # Half of ten problems: their spread, not that of their mean.
    assert found.accuracy[4].high - found.accuracy[4].low > 0.4


def test_one_problem_cannot_be_calibrated() -> None:
    with pytest.raises(ValueError, match="expected at least 2"):
        calibrate([[1.0, 2.0]], [[True, False]], ["a"])


def test_scaling_keeps_nan() -> None:
    [[first, second]] = Scaling(2.0, 0.0).probabilities([[NAN, 0.0]])
    assert math.isnan(first)
    assert second == 0.5
    assert calibration.picked([NAN, NAN], [NAN, NAN], [True, True])[1] == 0.0


@pytest.mark.parametrize("problems", [40, 100])
def test_a_head_that_knows_nothing_wins_nothing_by_abstaining(problems: int) -> None:
    generator = np.random.default_rng(5)
    gaps = []
    for _ in range(60):
        correct = generator.random((problems, 4)) < generator.beta(1, 1.5, size=problems)[:, None]
        scores = generator.normal(size=correct.shape)
        found, _ = calibrate(scores.tolist(), correct.tolist(), [str(index) for index in range(problems)])
        gaps.append(found.abstention.accuracy[1].mean - found.abstention.accuracy[-1].mean)
    # Within three standard errors of none.
    assert abs(np.mean(gaps)) < 3 * np.std(gaps) / math.sqrt(len(gaps))


def test_a_part_without_which_there_is_one_kind_is_named() -> None:
    correct = [[True, True]] * 9 + [[True, False]]
    with pytest.raises(ValueError, match="without one part in 5 of the problems, all answers are right"):
        calibrate([[1.0, 0.0]] * 10, correct, [str(index) for index in range(10)])


@pytest.mark.parametrize("size", [1e160, 1e300], ids=str)
def test_huge_scores_have_a_temperature_or_are_refused(size: float) -> None:
    scores, correct = planted(40, 1.0, 0.0)
    found = fit_scaling([[size * score for score in row] for row in scores], correct)
    assert found.temperature == pytest.approx(size * fit_scaling(scores, correct).temperature, rel=1e-3)
