from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swift_kernels.selection.combine import (
    fit_weight,
    min_max_mean,
    rank_combination,
    weighted_mean,
    weighted_vote,
    weighted_vote_winners,
)

NAN, INF = math.nan, math.inf

# Multiples of 1/8 and powers of two: maps of them are exact, and so is what is equal before and after.
VALUES = st.integers(-64, 64).map(lambda eighths: eighths / 8) | st.just(NAN)
PAIRS = st.lists(st.tuples(VALUES, VALUES), min_size=1, max_size=8).map(
    lambda rows: ([first for first, _ in rows], [second for _, second in rows])
)
RULES = pytest.mark.parametrize("rule", [rank_combination, min_max_mean], ids=["rank", "min-max"])

Rule = Callable[[Any, Any], np.ndarray]


@pytest.mark.parametrize(
    ("scores", "rewards", "expected"),
    [
        ([3, 2, 1], [1, 3, 2], [-3, -2, -3]),
        ([5, 5, 1], [9, 8, 7], [-1.5, -2, -3]),
        ([3, NAN, 1, 2], [1, 5, NAN, 7], [-2, NAN, NAN, -2]),
        ([0.5], [7], [-1]),
        ([4, 4, 4], [1, 2, 3], [-3, -2, -2]),
        ([INF, -INF, 0], [-INF, 0, INF], [-3, -3, -2]),
        ([NAN, NAN], [1, 2], [NAN, NAN]),
    ],
    ids=["distinct", "ties-share", "nan-is-absent", "one", "constant", "infinite", "none"],
)
def test_rank_combination(scores: list[float], rewards: list[float], expected: list[float]) -> None:
    np.testing.assert_array_equal(rank_combination(scores, rewards), expected)


@pytest.mark.parametrize(
    ("scores", "rewards", "expected"),
    [
        ([0, 1, 2], [10, 30, 20], [0, 0.75, 0.75]),
        ([7, 7, 7], [0, 4, 1], [0, 0.5, 0.125]),
        ([0, 100, 1, NAN], [0, NAN, 1, 5], [0, NAN, 1, NAN]),
        ([3], [4], [0]),
        ([-INF, 0, 1], [5, 0, 10], [-INF, 0, 1]),
        ([INF, 0, 1], [-INF, 0, 10], [NAN, 0, 1]),
        ([INF, INF], [1, 0], [INF, INF]),
        ([NAN], [1], [NAN]),
    ],
    ids=["both", "constant-is-0", "nan-is-absent", "one", "infinite", "opposite", "all-infinite", "none"],
)
def test_min_max_mean(scores: list[float], rewards: list[float], expected: list[float]) -> None:
    np.testing.assert_array_equal(min_max_mean(scores, rewards), expected)


@pytest.mark.parametrize(
    ("weight", "expected"),
    [(0, [0, 1, 0.5, NAN]), (0.25, [0.25, 0.75, 0.5, NAN]), (1, [1, 0, 0.5, NAN])],
    ids=["rewards-alone", "between", "scores-alone"],
)
def test_weighted_mean(weight: float, expected: list[float]) -> None:
    np.testing.assert_array_equal(weighted_mean([4, 2, 3, NAN], [1, 3, 2, 9], weight), expected)


def test_a_weight_of_nothing_takes_nothing_of_an_infinite_value() -> None:
    np.testing.assert_array_equal(weighted_mean([INF, 0, 1], [2, 1, 0], 0), [1, 0.5, 0])


@RULES
def test_leading_axes_are_batches(rule: Rule) -> None:
    generator = np.random.default_rng(0)
    scores, rewards = generator.integers(0, 5, size=(2, 3, 4, 6)).astype(float)
    scores[0, 1, 2] = NAN
    found = rule(scores, rewards)
    for place in itertools.product(range(3), range(4)):
        np.testing.assert_array_equal(found[place], rule(scores[place], rewards[place]))


@settings(deadline=None, max_examples=25)
@given(PAIRS)
def test_ranks_do_not_change_under_monotone_maps(pair: tuple[list[float], list[float]]) -> None:
    scores, rewards = map(np.array, pair)
    np.testing.assert_array_equal(rank_combination(scores**3, np.exp2(rewards)), rank_combination(scores, rewards))


@settings(deadline=None, max_examples=25)
@given(PAIRS, st.sampled_from([0.25, 1.0, 8.0]), st.integers(-8, 8))
def test_min_max_does_not_change_under_affine_maps(
    pair: tuple[list[float], list[float]], slope: float, shift: int
) -> None:
    scores, rewards = map(np.array, pair)
    np.testing.assert_array_equal(min_max_mean(slope * scores + shift, rewards), min_max_mean(scores, rewards))
    np.testing.assert_array_equal(min_max_mean(scores, slope * rewards + shift), min_max_mean(scores, rewards))


@RULES
@settings(deadline=None, max_examples=25)
@given(pair=PAIRS, data=st.data())
def test_candidates_in_another_order_keep_their_values(
    rule: Rule, pair: tuple[list[float], list[float]], data: st.DataObject
) -> None:
    scores, rewards = map(np.array, pair)
    order = data.draw(st.permutations(range(len(scores))))
    np.testing.assert_array_equal(rule(scores[order], rewards[order]), rule(scores, rewards)[order])


@RULES
@settings(deadline=None, max_examples=25)
@given(pair=PAIRS)
def test_it_has_a_value_where_both_inputs_have(rule: Rule, pair: tuple[list[float], list[float]]) -> None:
    scores, rewards = map(np.array, pair)
    np.testing.assert_array_equal(np.isnan(rule(scores, rewards)), np.isnan(scores) | np.isnan(rewards))


@pytest.mark.parametrize(
    ("answers", "weights", "expected"),
    [
        (["4", "5", "5"], [3, 1, 1], [0]),
        (["4", "5", "5"], [0.3, 0.1, 0.2], [0, 1, 2]),
        ([None, "5", "4"], [9, 1, 2], [2]),
        (["4", "5"], [NAN, -1], [0]),
        (["4", "5"], [NAN, NAN], [0, 1]),
        (["4", "5"], [-2, -1], [1]),
        (["4", "4", "4", "5"], [0.1, 0.2, -0.3, 0], [0, 1, 2, 3]),
        (["4", "5", "6"], [INF, 1, INF], [0, 2]),
        (["4", "4", "5"], [INF, -INF, 1], [2]),
        (["4", "5"], [-INF, -INF], [0, 1]),
        (["4"], [2], [0]),
        ([None, None], [1, 2], []),
        ([], [], []),
    ],
    ids=[
        "heavy", "rounding", "none-has-no-vote", "nan-is-0", "all-nan", "negative", "cancelled", "infinite", "opposite",
        "least", "one", "no-votes", "empty",
    ],
)  # fmt: skip
def test_weighted_vote(answers: list[str | None], weights: list[float], expected: list[int]) -> None:
    assert weighted_vote(answers, weights) == expected


@settings(deadline=None, max_examples=25)
@given(
    st.lists(st.tuples(st.integers(-1, 3), st.integers(-8, 8).map(float) | st.just(NAN)), min_size=1, max_size=8),
    st.data(),
)
def test_votes_of_many_subsets_are_those_of_each(rows: list[tuple[int, float]], data: st.DataObject) -> None:
    ids, weights = np.array([row[0] for row in rows]), np.array([row[1] for row in rows])
    subsets = np.array(data.draw(st.lists(st.permutations(range(len(rows))), min_size=1, max_size=4)))
    subsets = subsets[:, : data.draw(st.integers(1, len(rows)))]
    found = weighted_vote_winners(ids[subsets], weights[subsets])
    for subset, winners in zip(subsets, found, strict=True):
        sums: dict[int, float] = {}
        for index in subset:
            if ids[index] >= 0:
                sums[ids[index]] = sums.get(ids[index], 0.0) + np.nan_to_num(weights[index])
        best = {answer for answer, total in sums.items() if total == max(sums.values())}
        assert winners.tolist() == [ids[index] in best for index in subset]


def test_fit_weight_finds_the_weight_that_picks_right() -> None:
    # At weight w the candidates have w, 0.75 and 1 - w.
    scores, rewards = [[1.0, 0.75, 0.0]] * 3, [[0.0, 0.75, 1.0]] * 3
    assert fit_weight(scores, rewards, [[True, False, False]] * 3) == pytest.approx(0.8)
    assert fit_weight(scores, rewards, [[False, True, False]] * 3) == 0.5
    assert fit_weight(scores, rewards, [[False, False, True]] * 3) == pytest.approx(0.2)


def test_fit_weight_takes_the_majority_of_problems_of_any_size() -> None:
    scores, rewards = [[1.0, 0.0], [1.0, 0.0, 0.5], [0.0, 1.0]], [[0.0, 1.0], [0.0, 1.0, 0.5], [1.0, 0.0]]
    correct = [[True, False], [True, False, False], [True, False]]
    assert fit_weight(scores, rewards, correct) == pytest.approx(0.55)


@pytest.mark.parametrize(
    ("scores", "rewards", "expected"),
    [([[1.0, 1.0]], [[2.0, 2.0]], 0.5), ([[NAN, NAN]], [[0.0, 1.0]], 0.5), ([[NAN, 1.0]], [[9.0, 0.0]], 0.5)],
    ids=["nothing-differs", "no-scores", "one-is-left"],
)
def test_fit_weight_without_a_reason_is_a_half(
    scores: list[list[float]], rewards: list[list[float]], expected: float
) -> None:
    assert fit_weight(scores, rewards, [[True, False]]) == expected


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: rank_combination([1, 2], [1]), r"scores of shape \[2\] and rewards of shape \[1\]"),
        (lambda: min_max_mean(1, 2), "the candidates along the last axis"),
        (lambda: weighted_mean([1], [1], 1.5), r"weight is 1.5: expected 0\.\.1"),
        (lambda: weighted_mean([1], [1], NAN), "weight is nan"),
        (lambda: weighted_vote(["1"], [1, 2]), r"answers of shape \[1\] and weights of shape \[2\]"),
        (lambda: fit_weight([[1]], [[1, 2]], [[True]]), "the rewards do not match the grades"),
        (lambda: fit_weight([[1]], [[1]], [[True], [False]]), "the scores do not match the grades"),
        (lambda: fit_weight([], [], []), "no problems"),
        (lambda: fit_weight([[1]], [[1]], [[True]], grid=1), "grid is 1"),
    ],
    ids=["shapes", "scalars", "weight", "nan-weight", "votes", "candidates", "problems", "none", "grid"],
)
def test_what_does_not_fit_is_refused(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
