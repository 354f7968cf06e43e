from __future__ import annotations

import pytest

from swift_kernels.selection.pick import best_index, majority_indices, majority_vote, random_index

NAN = float("nan")


@pytest.mark.parametrize(
    ("scores", "expected"),
    [([0.1, 0.3, 0.2], 1), ([NAN, -5.0, NAN], 1), ([2.0, 2.0], 0), ([NAN, float("-inf")], 1)],
    ids=["greatest", "nan-never", "first-of-equals", "nan-below-infinity"],
)
def test_best_index(scores: list[float], expected: int) -> None:
    assert best_index(scores) == expected


@pytest.mark.parametrize(
    ("answers", "expected"),
    [
        (["1", "2", "2"], [1, 2]),
        (["1", "2"], [0, 1]),
        ([None, None, "7"], [2]),
        ([None], []),
        ([], []),
    ],
    ids=["majority", "tie", "none-has-no-vote", "no-votes", "empty"],
)
def test_majority_indices(answers: list[str | None], expected: list[int]) -> None:
    assert majority_indices(answers) == expected


def test_majority_vote_takes_the_first() -> None:
    assert majority_vote([None, "4", "5", "5", "4"]) == 1


def test_random_index_is_seeded_and_covers_all() -> None:
    assert random_index(8, seed=3) == random_index(8, seed=3)
    assert {random_index(4, seed=seed) for seed in range(64)} == {0, 1, 2, 3}


def test_nothing_to_pick_from() -> None:
    with pytest.raises(ValueError, match="none of 2 candidates has a score"):
        best_index([NAN, NAN])
    with pytest.raises(ValueError, match="none of 1 candidates has an answer"):
        majority_vote([None])
    with pytest.raises(ValueError, match="0 candidates"):
        random_index(0)
