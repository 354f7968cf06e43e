from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest

from swift_kernels.evaluation import study
from swift_kernels.evaluation.compare import SELECTOR_NAMES
from swift_kernels.evaluation.rewards import RewardCost, Rewards
from swift_kernels.evaluation.study import Cost, Study, TaskStudy, study_task, transfer
from swift_kernels.training.rollouts import Response, Rollout

NAN = float("nan")
COST = Cost("SWIFT", 10, 1000, 0.5, 100)


def make_rollouts(problems: int = 60, n: int = 8, seed: int = 0) -> list[Rollout]:
    """Right answers are "1"; wrong ones spread over three others."""
    generator = np.random.default_rng(seed)
    return [
        Rollout(
            str(index),
            str(index),
            "p",
            "1",
            [1],
            [
                Response([1, 2], "", True, bool(right), "1" if right else str(generator.integers(2, 5)))
                for right in generator.random(n) < generator.beta(1, 1.5)
            ],
        )
        for index in range(problems)
    ]


def noisy(rollouts: list[Rollout], noise: float, seed: int) -> list[list[float]]:
    generator = np.random.default_rng(seed)
    return [[c.correct + noise * generator.normal() for c in rollout.candidates] for rollout in rollouts]


def make_study(rewards: bool = False, rollouts: list[Rollout] | None = None, **changes: object) -> TaskStudy:
    rollouts = make_rollouts() if rollouts is None else rollouts
    options = {"task": "t", "file": "t.jsonl", "head": "h", "cost": COST, **changes}
    if rewards:
        cost = RewardCost(1_000_000, 3.0, 500, 10**9, "cpu", 400)
        options["rewards"] = Rewards("judge", noisy(rollouts, 1.0, 2), ["a note"], cost)
    scores = options.pop("scores", noisy(rollouts, 0.8, 1))
    return study_task(rollouts, scores, **options)


def test_without_a_reward_there_are_all_selectors_that_need_none() -> None:
    found = make_study()
    assert list(found.evaluation.accuracy[8]) == [
        "random",
        "vote",
        "length",
        "longest",
        "swift",
        "swift_vote",
        "oracle",
    ]
    assert found.reward is found.weight is None
    assert found.calibration is not None
    assert found.over_optimization is not None
    assert list(found.over_optimization.belief) == [1, 2, 4, 8]
    assert found.costs == [COST]


def test_an_external_reward_is_compared_and_combined() -> None:
    found = make_study(rewards=True, rollouts=make_rollouts(300))
    names = [name for name in SELECTOR_NAMES if name not in ("logprob", "self_certainty")]
    assert sorted(found.evaluation.accuracy[8], key=list(SELECTOR_NAMES).index) == names
    accuracy = {name: value.mean for name, value in found.evaluation.accuracy[8].items()}
    # Two judges whose noise is their own know more than either.
    assert min(accuracy["min_max"], accuracy["weighted"]) > max(accuracy["swift"], accuracy["reward"])
    assert 0.3 <= (found.weight or 0) <= 0.9
    assert found.reward == "judge"
    assert [cost.what for cost in found.costs] == ["SWIFT", "judge, cpu"]
    assert found.notes == ["a note"]


def test_the_weight_of_a_problem_comes_from_others() -> None:
    # One problem's grades decide about no weight of its own part, however they are.
    rollouts = make_rollouts(30)
    before = make_study(rewards=True, rollouts=rollouts)
    turned = [
        replace(rollout, candidates=[replace(c, correct=not c.correct) for c in rollout.candidates])
        if index == 0
        else rollout
        for index, rollout in enumerate(rollouts)
    ]
    scores, rewards = noisy(rollouts, 0.8, 1), noisy(rollouts, 1.0, 2)
    keys = [rollout.key for rollout in rollouts]
    everyone = np.arange(8)[None]
    picks = [
        study._weighted(scores, rewards, [[c.correct for c in rollout.candidates] for rollout in own], keys)(
            0, everyone
        )
        for own in (rollouts, turned)
    ]
    assert (picks[0] == picks[1]).all()
    assert before.weight is not None


def test_belief_of_a_head_that_looks_at_noise_outgrows_the_truth() -> None:
    rollouts = make_rollouts(200, 16)
    generator = np.random.default_rng(3)
    # Better than chance on the whole, but its greatest scores are a fluke that no answer deserves.
    scores = [
        [c.correct + (8.0 if generator.random() < 0.06 and not c.correct else 0.0) for c in rollout.candidates]
        for rollout in rollouts
    ]
    found = make_study(rollouts=rollouts, scores=scores)
    assert found.over_optimization is not None
    assert found.over_optimization.peak < 16
    assert found.over_optimization.fall.high < 0
    assert found.over_optimization.fall.p < 0.001


@pytest.mark.parametrize(
    ("scores", "correct", "expected"),
    [
        ([1.0, 0.0], [True, False], math.log1p(math.exp(-1))),
        ([0.0, 0.0, NAN], [True, False, False], math.log(2)),
        ([1.0, 2.0, 0.0], [True, True, False], (math.log1p(math.exp(-1)) + math.log1p(math.exp(-2))) / 2),
        ([1.0], [True], NAN),
    ],
    ids=["pair", "nan", "two-right", "no-pair"],
)
def test_pairwise_loss(scores: list[float], correct: list[bool], expected: float) -> None:
    assert study.pairwise_loss(scores, correct) == pytest.approx(expected, nan_ok=True)


def _with_grades(correct: bool) -> list[Rollout]:
    return [
        replace(rollout, candidates=[replace(c, correct=correct) for c in rollout.candidates])
        for rollout in make_rollouts(10)
    ]


ODD = {
    "all-right": (_with_grades(True), "all answers are right"),
    "all-wrong": (_with_grades(False), "all answers are wrong"),
    "one-problem": (make_rollouts(1), "expected at least 2"),
    "one-answer": ([replace(r, candidates=r.candidates[:1]) for r in make_rollouts(20)], "a single answer"),
    "unequal": (
        [replace(r, candidates=r.candidates[: 3 + i % 4]) for i, r in enumerate(make_rollouts(20))],
        "Problems have 3 to 6 answers: N goes to 3",
    ),
}


@pytest.mark.parametrize("name", ODD)
@pytest.mark.parametrize("rewards", [False, True], ids=["alone", "reward"])
def test_odd_rollouts_are_judged_as_far_as_they_go(name: str, rewards: bool) -> None:
    rollouts, note = ODD[name]
    found = make_study(rewards=rewards, rollouts=rollouts)
    assert any(note in line for line in found.notes), found.notes
    assert found.evaluation.problems == len(rollouts)
    assert Study.from_dict(json.loads(json.dumps(Study("m", [found], None, 1.0).to_dict()))).tasks[0].task == "t"


def test_answers_without_a_score_are_never_picked() -> None:
    rollouts = make_rollouts(20)
    scores = noisy(rollouts, 0.5, 1)
    scores[0] = [NAN] * 8
    scores[1][3] = NAN
    found = make_study(rollouts=rollouts, scores=scores)
    assert found.evaluation.unscored == 9
    assert found.calibration is not None
    assert sum(each.count for each in found.calibration.after.bins) == 20 * 8 - 9


def test_without_answers_there_is_no_vote() -> None:
    rollouts = [replace(r, candidates=[replace(c, answer=None) for c in r.candidates]) for r in make_rollouts(20)]
    found = make_study(rewards=True, rollouts=rollouts)
    assert not {"vote", "swift_vote", "reward_vote"} & set(found.evaluation.accuracy[8])
    assert "swift - vote" not in found.evaluation.differences
    assert found.calibration is not None
    assert found.calibration.vote_abstention is None
    assert any("not compared with majority vote" in note for note in found.evaluation.notes)


def test_a_reward_is_judged_where_there_is_one() -> None:
    rollouts = make_rollouts(40)
    truth = [[float(c.correct) for c in rollout.candidates] for rollout in rollouts]
    values = [row if index < 30 else [NAN] * 8 for index, row in enumerate(truth)]
    rewards = Rewards("judge", values, [], None)
    found = study_task(rollouts, noisy(rollouts, 0.8, 1), task="t", file="f", head="h", cost=COST, rewards=rewards)
    last = found.evaluation.accuracy[8]
    whole = study_task(rollouts[:30], truth[:30], task="t", file="f", head="h", cost=COST).evaluation.accuracy[8]
    assert last["reward"].mean == pytest.approx(whole["oracle"].mean)
    assert last["swift"].mean != pytest.approx(0)
    assert any("judged on the 30 of 40 problems" in note for note in found.notes)


def test_rewards_of_nothing_are_left_out() -> None:
    rollouts = make_rollouts(10)
    rewards = Rewards("judge", [[NAN] * 8] * 10, [], RewardCost(10, 0.1, 0, 0, "cpu", 0))
    found = study_task(rollouts, noisy(rollouts, 0.8, 1), task="t", file="f", head="h", cost=COST, rewards=rewards)
    assert "reward" not in found.evaluation.accuracy[8]
    assert found.reward is None
    assert any("judge has no reward for any answer" in note for note in found.notes)


def test_transfer_picks_among_as_many_as_the_tables_do() -> None:
    rollouts = make_rollouts(10)
    found = transfer(["a", "b"], ["x"], [0], [rollouts], [[noisy(rollouts, 1.0, s)] for s in (1, 2)], [1, 4])
    assert found.n == [4]


def test_transfer_compares_with_the_tasks_own_head() -> None:
    data = [make_rollouts(40, seed=1), make_rollouts(30, seed=2)]
    good, bad = [noisy(own, 0.3, 1) for own in data], [noisy(own, 30.0, 2) for own in data]
    found = transfer(["a", "b"], ["x", "y"], [0, 1], data, [good, bad])
    assert found.n == [8, 8]
    assert found.difference[0][0] is None
    assert found.difference[1][1] is None
    worse, better = found.difference[1][0], found.difference[0][1]
    assert worse is not None
    assert better is not None
    assert worse.high < 0 < better.low
    assert found.auc[0][0].mean > 0.9


@pytest.mark.parametrize("rewards", [False, True], ids=["alone", "reward"])
def test_json_gives_the_same_study_again(rewards: bool) -> None:
    own = make_study(rewards=rewards)
    crossed = transfer(["a", "b"], ["x"], [0], [make_rollouts(5)], [[noisy(make_rollouts(5), 1.0, s)] for s in (1, 2)])
    made = Study("m", [own], crossed, 1.5)
    assert Study.from_dict(json.loads(json.dumps(made.to_dict(), allow_nan=False))) == made


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "other"}, "no evaluation"),
        ({"version": 99}, "format version 99"),
        ({"tasks": [{"task": "t"}]}, r"tasks\.0\.\w+: Field required"),
        ({"seconds": "soon"}, "seconds: Input should be a valid number"),
    ],
    ids=["format", "version", "missing", "type"],
)
def test_a_damaged_study_is_refused(change: dict[str, object], message: str) -> None:
    facts = Study("m", [make_study()], None, 1.0).to_dict()
    with pytest.raises(ValueError, match=message):
        Study.from_dict({**facts, **change})
