from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Sequence
from fractions import Fraction
from functools import partial

import numpy as np
import pytest

from swift_kernels.evaluation import metrics, selectors
from swift_kernels.evaluation.selectors import Selector
from swift_kernels.selection import combine

NAN = float("nan")
ANSWERS = ["4", "5", "5", "4", None, "4", "6"]
CORRECT = [True, False, False, True, False, True, False]
SCORES = [0.3, 1.0, 2.0, 0.3, 5.0, -7.0, 0.2]
REWARDS = [2.0, -1.0, 2.0, 2.0, 0.5, 9.0, -3.0]
WITH_NAN = [0.3, NAN, 2.0, 0.3, 5.0, NAN, 0.2]

Pick = Callable[[Sequence[int]], "dict[int, Fraction]"]
"""The chance of each candidate of a subset to be picked."""


def brute_force(pick: Pick, k: int) -> float:
    outcomes = [
        sum(chance for index, chance in pick(subset).items() if CORRECT[index])
        for subset in itertools.combinations(range(len(CORRECT)), k)
    ]
    return float(sum(outcomes) / len(outcomes))


def vote(weights: Sequence[float]) -> Pick:
    def pick(subset: Sequence[int]) -> dict[int, Fraction]:
        votes: Counter[str] = Counter()
        for index in subset:
            if ANSWERS[index] is not None and not math.isnan(weights[index]):
                votes[ANSWERS[index]] += weights[index]
        winners = [answer for answer, count in votes.items() if count == max(votes.values())]
        chances = {}
        for answer in winners:
            holders = [i for i in subset if ANSWERS[i] == answer and not math.isnan(weights[i])]
            chances |= {index: Fraction(1, len(winners) * len(holders)) for index in holders}
        return chances

    return pick


def greatest(values: Callable[[Sequence[int]], dict[int, float]]) -> Pick:
    def pick(subset: Sequence[int]) -> dict[int, Fraction]:
        found = values(subset)
        best = [index for index, value in found.items() if value == max(found.values())]
        return {index: Fraction(1, len(best)) for index in best}

    return pick


def rank_values(scores: Sequence[float], rewards: Sequence[float], subset: Sequence[int]) -> dict[int, float]:
    members = [index for index in subset if not math.isnan(scores[index])]

    def rank(table: Sequence[float], index: int) -> float:
        above = sum(table[other] > table[index] for other in members)
        equal = sum(table[other] == table[index] for other in members)
        return above + (equal + 1) / 2

    return {index: -max(rank(scores, index), rank(rewards, index)) for index in members}


def scaled_values(scores: Sequence[float], rewards: Sequence[float], subset: Sequence[int]) -> dict[int, float]:
    members = [index for index in subset if not math.isnan(scores[index])]

    def scale(table: Sequence[float], index: int) -> float:
        own = [table[other] for other in members]
        return (table[index] - min(own)) / ((max(own) - min(own)) or 1.0)

    return {index: (scale(scores, index) + scale(rewards, index)) / 2 for index in members}


ONES = [1.0] * 7
WEIGHTS = [0.5, 0.25, 0.25, 0.125, 8.0, 0.125, 0.75]
RULES: dict[str, tuple[Selector, Pick]] = {
    "vote": (selectors.vote([ANSWERS]), vote(ONES)),
    "weighted-vote": (selectors.vote([ANSWERS], [WEIGHTS]), vote(WEIGHTS)),
    "vote-with-nan": (selectors.vote([ANSWERS], [WITH_NAN]), vote(WITH_NAN)),
    "rank": (
        selectors.combined(combine.rank_combination, [SCORES], [REWARDS]),
        greatest(partial(rank_values, SCORES, REWARDS)),
    ),
    "rank-with-nan": (
        selectors.combined(combine.rank_combination, [WITH_NAN], [REWARDS]),
        greatest(partial(rank_values, WITH_NAN, REWARDS)),
    ),
    "min-max": (
        selectors.combined(combine.min_max_mean, [SCORES], [REWARDS]),
        greatest(partial(scaled_values, SCORES, REWARDS)),
    ),
    "min-max-with-nan": (
        selectors.combined(combine.min_max_mean, [WITH_NAN], [REWARDS]),
        greatest(partial(scaled_values, WITH_NAN, REWARDS)),
    ),
}


@pytest.mark.parametrize("k", range(1, 8))
@pytest.mark.parametrize("name", RULES)
def test_a_rule_is_the_mean_over_subsets(name: str, k: int) -> None:
    rule, pick = RULES[name]
    assert metrics.picked_at_k(partial(rule, 0), CORRECT, k) == pytest.approx(brute_force(pick, k), abs=1e-12)


@pytest.mark.parametrize("name", ["none", "nan", "no-vote"])
def test_nothing_to_pick_is_never_right(name: str) -> None:
    rule = {
        "none": selectors.vote([[None, None]]),
        "no-vote": selectors.vote([["1", "2"]], [[NAN, NAN]]),
        "nan": selectors.combined(combine.min_max_mean, [[NAN, NAN]], [[1.0, 2.0]]),
    }[name]
    assert metrics.picked_at_k(partial(rule, 0), [True, True], 2) == 0


def test_subsets_are_sampled_where_there_are_many() -> None:
    answers = ["1"] * 12 + ["2"] * 8
    correct = [True] * 12 + [False] * 8
    assert math.comb(20, 5) > metrics.SUBSETS
    rule = partial(selectors.vote([answers]), 0)
    value = metrics.picked_at_k(rule, correct, 5)
    assert value == metrics.picked_at_k(rule, correct, 5)
    exact = sum(math.comb(12, i) * math.comb(8, 5 - i) for i in range(3, 6)) / math.comb(20, 5)
    # Five standard errors of a share over that many subsets.
    assert abs(value - exact) < 5 * math.sqrt(exact * (1 - exact) / metrics.SUBSETS)


@pytest.mark.parametrize(("n", "k"), [(7, 3), (20, 5), (64, 32), (5, 5)])
def test_subsets_hold_distinct_candidates(n: int, k: int) -> None:
    found = metrics.subsets(n, k)
    assert found.shape == (min(math.comb(n, k), metrics.SUBSETS), k)
    assert all(len(set(row)) == k for row in found.tolist())
    assert set(np.unique(found)) == set(range(n))
