"""Intervals cover as often as they say, ratios are taken within rounds, and no difference is called one."""

from __future__ import annotations

import itertools
import math
import random
import statistics

import pytest

from bench.summary import FEWEST_SAMPLES, Ratio, Summary, find_outliers, interval_ranks


@pytest.mark.parametrize("count", [FEWEST_SAMPLES, 7, 9, 20, 101, 400])
def test_the_interval_covers_the_median_with_95_percent(count):
    low, high = interval_ranks(count)
    assert (low, high) == (count - 1 - high, count - 1 - low)

    def covered(low: int) -> float:
        # The true median lies outside where at most `low` samples are on one side of it.
        return 1 - 2 * sum(math.comb(count, k) for k in range(low + 1)) / 2**count

    assert covered(low) >= 0.95
    assert covered(low + 1) < 0.95, "a narrower interval would do"


def test_the_interval_covers_skewed_samples_as_often():
    generator = random.Random(0)
    covered = 0
    for _ in range(2000):
        summary = Summary.of([generator.expovariate(1.0) for _ in range(25)])
        covered += summary.low <= math.log(2) <= summary.high
    # The exact probability for 25 samples is 0.957; four standard deviations of 2,000 draws are 0.018.
    assert covered / 2000 == pytest.approx(0.957, abs=0.018)


def test_too_few_undisturbed_samples_make_no_figure():
    assert Summary.of([1.0] * (FEWEST_SAMPLES - 1) + [None] * 50) is None
    assert Ratio.of([1.0, None] * 5, [None, 1.0] * 5) is None


def test_disturbed_samples_and_outliers_are_counted():
    summary = Summary.of([1.0, 1.1, 0.9, 1.05, None, 0.95, 1.0, 30.0, None])
    assert (summary.count, summary.disturbed, summary.outliers) == (7, 2, 1)
    assert summary.median == 1.0
    assert find_outliers([1.0] * 9 + [2.0]) == [], "without a spread nothing is far from it"


def test_ratios_are_of_the_same_round():
    """A machine that slows down to a third in the middle changes no ratio within a round."""
    speed = [1.0] * 10 + [3.0] * 10
    fast = [0.010 * factor for factor in speed]
    slow = [0.011 * factor for factor in speed]
    ratio = Ratio.of(slow, fast)
    assert ratio.median == pytest.approx(1.1)
    assert ratio.differs
    assert not Ratio.of(fast, fast[::-1]).differs


@pytest.mark.parametrize(
    ("ratio", "percent", "text"),
    [
        (Ratio(2.061, 2.012, 2.114), False, "2.06x (2.01-2.11)"),
        (Ratio(15.4, 14.96, 16.2), False, "15.4x (15.0-16.2)"),
        (Ratio(1.01, 0.99, 1.03), False, "no difference (0.99-1.03)"),
        (Ratio(1.0, 1.0, 1.03), False, "no difference (1.00-1.03)"),
        (Ratio(0.9904, 0.985, 0.9975), True, "99.0% (98.5-99.8)"),
        (Ratio(1.001, 0.99, 1.02), True, "no difference (99.0-102.0)"),
    ],
    ids=["times", "ten times", "no difference", "touches one", "percent", "no difference in percent"],
)
def test_ratios_in_words(ratio, percent, text):
    assert ratio.text(percent) == text


def test_medians_do_not_depend_on_the_order():
    samples = [3.0, 1.0, 2.0, 5.0, 4.0, 6.0]
    found = {Summary.of(order) for order in itertools.islice(itertools.permutations(samples), 50)}
    assert len(found) == 1
    assert found.pop().median == statistics.median(samples)
