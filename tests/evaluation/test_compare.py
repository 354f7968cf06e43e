from __future__ import annotations

import math
from dataclasses import replace

import pytest

from swift_kernels.evaluation.compare import baseline_scores, compare, default_ns
from swift_kernels.evaluation.evaluate import evaluate
from swift_kernels.training.rollouts import Confidence, Response, Rollout

NAN = float("nan")


def make_answer(
    correct: bool,
    answer: str | None,
    logprobs: list[float] | None = None,
    certainties: list[float] | None = None,
    tokens: int = 2,
) -> Response:
    confidence = None
    if logprobs is not None and certainties is not None:
        confidence = Confidence(logprobs, [0.0] * len(logprobs), certainties)
    return Response([5] * tokens, "text", True, correct, answer, confidence)


def make_problem(identity: str, candidates: list[Response]) -> Rollout:
    return Rollout(identity, identity, "prompt", "1", [3, 4], candidates)


def make_rollout(identity: str, correct: list[bool]) -> Rollout:
    return make_problem(identity, [make_answer(right, "1" if right else str(i + 2)) for i, right in enumerate(correct)])


def test_evaluate_compares_selectors_by_problem() -> None:
    rollouts = [
        make_rollout("a", [True, False, False, False]),
        make_rollout("b", [False, True, True, False]),
        make_rollout("c", [False] * 4),
    ]
    perfect = [[float(candidate.correct) for candidate in rollout.candidates] for rollout in rollouts]
    result = evaluate(rollouts, perfect)
    assert list(result.accuracy) == [1, 2, 4]
    at_4 = {name: value.mean for name, value in result.accuracy[4].items()}
    # Four different answers tie in problem a; the two equal ones win in b.
    alike = {"random": 1 / 4, "length": 1 / 4, "longest": 1 / 4}
    assert at_4 == pytest.approx({**alike, "vote": 5 / 12, "swift": 2 / 3, "oracle": 2 / 3})
    assert result.accuracy[1]["swift"].mean == pytest.approx(3 / 12)
    assert result.differences["swift - vote"].mean == pytest.approx((3 / 4) / 3)
    assert result.auc.mean == 1.0
    assert (result.problems, result.mixed_problems, result.candidates, result.unscored) == (3, 2, 12, 0)


@pytest.mark.parametrize("ns", [[0], [8], [1, 5]], ids=["zero", "too-many", "one-too-many"])
def test_evaluate_refuses_impossible_n(ns: list[int]) -> None:
    rollouts = [make_rollout("a", [True] * 9), make_rollout("short", [False] * 4)]
    with pytest.raises(ValueError, match=r"expected 1\.\.4, problem 'short' has 4"):
        evaluate(rollouts, [[0.0] * 9, [0.0] * 4], ns)


@pytest.mark.parametrize(("most", "expected"), [(1, [1]), (4, [1, 2, 4]), (6, [1, 2, 4, 6])])
def test_default_ns(most: int, expected: list[int]) -> None:
    assert default_ns(most) == expected


def test_facts_are_json() -> None:
    result = evaluate([make_rollout("a", [True, True])], [[NAN, NAN]])
    facts = result.to_dict()
    assert facts["auc"] == {"mean": None, "low": None, "high": None}
    assert facts["unscored"] == 2
    assert facts["accuracy"][2]["swift"]["mean"] == 0.0


RIGHT_IS_SURE = make_problem(
    "sure",
    [
        make_answer(True, "1", [-0.2, -0.2], [9.0, 9.0]),
        # The greatest sums, over more tokens.
        make_answer(False, "2", [-0.3] * 5, [8.0] * 5, tokens=5),
        make_answer(False, "3", [-0.1, -0.5], [1.0, 16.0]),
    ],
)
TIED = make_problem(
    "tied",
    [
        make_answer(True, "1", [-1.0], [4.0], tokens=1),
        make_answer(False, "2", [-1.0, -1.0], [4.0, 4.0]),
        make_answer(False, "3", [-2.0, -2.0], [3.0, 3.0]),
        make_answer(False, "4", [-1.5], [3.5], tokens=1),
    ],
)
WITH_EMPTY = make_problem(
    "empty", [make_answer(False, None, [], [], tokens=0), make_answer(True, "1", [-9.0] * 3, [0.1] * 3, tokens=3)]
)


@pytest.mark.parametrize(
    ("problem", "name", "n", "expected"),
    [
        (RIGHT_IS_SURE, "logprob", 3, 1.0),
        (RIGHT_IS_SURE, "logprob", 2, 2 / 3),
        (RIGHT_IS_SURE, "self_certainty", 3, 1.0),
        (RIGHT_IS_SURE, "length", 3, 1 / 2),
        (TIED, "logprob", 4, 1 / 2),
        (TIED, "self_certainty", 4, 1 / 2),
        (TIED, "length", 4, 1 / 2),
        # Of the six pairs three hold the right answer, and one of these the other that ties with it.
        (TIED, "length", 2, (1 / 2 + 1 + 1) / 6),
        (TIED, "vote", 4, 1 / 4),
        (WITH_EMPTY, "logprob", 2, 1.0),
        (WITH_EMPTY, "self_certainty", 2, 1.0),
        (WITH_EMPTY, "length", 2, 1.0),
        (WITH_EMPTY, "length", 1, 1 / 2),
    ],
)
def test_baselines_by_hand(problem: Rollout, name: str, n: int, expected: float) -> None:
    assert compare([problem], {}, [n]).values[n][name] == [pytest.approx(expected)]


def test_baseline_scores_are_means_over_tokens() -> None:
    scores, notes = baseline_scores([RIGHT_IS_SURE, WITH_EMPTY])
    assert notes == []
    assert scores["logprob"][0] == pytest.approx([-0.2, -0.3, -0.3])
    assert scores["self_certainty"][0] == pytest.approx([9.0, 8.0, 8.5])
    assert scores["length"][0] == [-2.0, -5.0, -2.0]
    for name in ("length", "longest", "logprob", "self_certainty"):
        assert [math.isnan(value) for value in scores[name][1]] == [True, False]


def test_what_is_not_recorded_is_not_compared() -> None:
    bare = make_rollout("bare", [True, False])
    text_alone = make_problem("text", [replace(candidate, token_ids=None) for candidate in bare.candidates])
    reason = "not compared with log-probability and self-certainty"
    assert compare([bare], {}).notes == [f"No per-token confidence in these rollouts: {reason}"]
    partly = compare([RIGHT_IS_SURE, bare], {}, [1, 2])
    assert partly.notes == [f"No per-token confidence for 2 of 5 answers: {reason}"]
    assert partly.selectors == ["random", "vote", "length", "longest", "oracle"]
    without_ids = compare([text_alone], {})
    lengths = "not compared with shortest answer and longest answer"
    assert without_ids.notes[0] == f"No token ids in these rollouts: {lengths}"
    assert without_ids.selectors == ["random", "vote", "oracle"]


def test_tables_against_each_other() -> None:
    problems = [RIGHT_IS_SURE, TIED, make_rollout("wrong", [False] * 4)]
    right = [[float(candidate.correct) for candidate in problem.candidates] for problem in problems]
    flat = [[0.0] * len(row) for row in right]
    result = compare(problems[:2], {"right": right[:2], "flat": flat[:2]}, [1, 3])
    assert result.selectors == [
        "random", "vote", "length", "longest", "logprob", "self_certainty", "right", "flat", "oracle"
    ]  # fmt: skip
    assert result.values[3]["right"] == pytest.approx([1.0, 3 / 4])
    assert result.values[3]["flat"] == pytest.approx([1 / 3, 1 / 4])
    assert result.accuracy("right").mean == pytest.approx(7 / 8)
    assert result.accuracy("right", 1).mean == pytest.approx((1 / 3 + 1 / 4) / 2)
    ahead = result.difference("right", "flat")
    assert ahead.mean == pytest.approx((2 / 3 + 1 / 2) / 2)
    assert result.difference("flat", "right").mean == -ahead.mean
    assert (result.difference("right", "flat", 1).mean, result.difference("right", "flat", 1).p) == (0.0, 1.0)
    assert (result.auc("right").mean, result.auc("flat").mean) == (1.0, 0.5)
    # Of a baseline too: two pairs of three are in order in the first problem, and one half of the third is.
    assert result.aucs("length") == pytest.approx([(1 / 2 + 1) / 2, (1 + 1 + 1 / 2) / 3])
    assert math.isnan(compare(problems, {"right": right}).aucs("right")[2])


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        ({"logprob": [[0.0] * 3]}, "'logprob' names a selector that needs no scores"),
        ({"mine": [[0.0] * 2]}, "'mine': expected a score for each candidate of each of 1 problems"),
        ({"mine": []}, "'mine': expected a score for each candidate"),
    ],
    ids=["taken", "candidate-missing", "problem-missing"],
)
def test_tables_that_do_not_fit_are_refused(tables: dict[str, list[list[float]]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compare([RIGHT_IS_SURE], tables)


def test_swift_is_compared_with_all_but_the_oracle() -> None:
    problems = [RIGHT_IS_SURE] * 40
    result = evaluate(problems, [[1.0, 0.0, 0.0]] * 40)
    others = ["random", "vote", "length", "longest", "logprob", "self_certainty"]
    assert list(result.accuracy[3]) == [*others, "swift", "oracle"]
    assert list(result.differences) == list(result.adjusted_p) == [f"swift - {name}" for name in others]
    assert all(result.adjusted_p[name] >= found.p for name, found in result.differences.items())
    assert result.differences["swift - length"].mean == pytest.approx(1 / 2)
    assert result.differences["swift - length"].p < 0.001
    assert result.differences["swift - logprob"].p == 1.0
    facts = result.to_dict()
    assert set(facts["differences"]["swift - vote"]) == {"mean", "low", "high", "p"}
    assert facts["notes"] == []
