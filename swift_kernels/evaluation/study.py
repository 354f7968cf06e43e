"""Everything that `swift-kernels eval` finds: heads on the stored answers to one task or several.

Nothing is fitted on the problem that it is judged by: temperatures and weights come from the other parts of the
problems (`calibration.cross_fitted`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from swift_kernels.evaluation import metrics, selectors
from swift_kernels.evaluation.calibration import FOLDS, Calibration, calibrate, fold_of_problems
from swift_kernels.evaluation.compare import compare
from swift_kernels.evaluation.evaluate import Evaluation, evaluate
from swift_kernels.evaluation.metrics import Difference, Estimate
from swift_kernels.evaluation.selectors import Selector, Table
from swift_kernels.selection import combine
from swift_kernels.training.rollouts import Rollout

if TYPE_CHECKING:
    from swift_kernels.evaluation.rewards import Rewards

FORMAT = "swift_kernels.evaluation"
FORMAT_VERSION = 1


@dataclass(frozen=True)
class Cost:
    """What scoring took, all answers together; None where it was not measured.

    Attributes:
        seconds: as measured, where `what` says.
        flops: of the arithmetic, the language model's own apart.
        answers: all candidates, equal ones too: the figures of an answer are shares of these.
    """

    what: str
    parameters: int
    flops: int | None
    seconds: float | None
    answers: int


@dataclass(frozen=True)
class OverOptimization:
    """Whether more answers to pick from ever make the pick worse, and whether the head knows (arXiv 2210.10760).

    Attributes:
        belief: at each n, mean P(correct) of the pick; where it outgrows the accuracy, the head is led astray.
        peak: the n with the greatest accuracy.
        fall: accuracy at the largest n less that at the peak, paired by problem. Its p is that of one comparison,
            though the peak was chosen among several.
    """

    belief: dict[int, Estimate]
    peak: int
    fall: Difference


@dataclass(frozen=True)
class TaskStudy:
    """One head on one task.

    Attributes:
        task: its name, or that of the file.
        head: the name of the head.
        evaluation: what each selector wins.
        pairwise_loss: mean of -log sigmoid(right - wrong) over the pairs of a problem (DPO's loss, arXiv 2505.12225).
        calibration, over_optimization: None where the grades do not allow it, with a note.
        reward: name of the external reward, if there is one.
        weight: of SWIFT in the weighted mean with it: fitted to all problems; the table's, to other problems than its
            own.
        costs: SWIFT's, and the external reward's beside it.
    """

    task: str
    rollouts: str
    head: str
    evaluation: Evaluation
    pairwise_loss: Estimate
    calibration: Calibration | None
    over_optimization: OverOptimization | None
    reward: str | None
    weight: float | None
    costs: list[Cost]
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Transfer:
    """Each head on each task: rows are heads, columns tasks.

    Attributes:
        accuracy: of its picks among all answers.
        difference: from the head of the task, paired by problem, p adjusted for the size of the table (Holm); None for
            that head itself.
        auc: within-problem.
    """

    heads: list[str]
    tasks: list[str]
    n: list[int]
    accuracy: list[list[Estimate]]
    difference: list[list[Difference | None]]
    auc: list[list[Estimate]]


@dataclass(frozen=True)
class Study:
    """What `swift-kernels eval` found."""

    model: str | None
    tasks: list[TaskStudy]
    transfer: Transfer | None
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """For JSON, which has no NaN."""
        return {"format": FORMAT, "version": FORMAT_VERSION, **metrics.without_nan(asdict(self))}

    @classmethod
    def from_dict(cls, facts: dict[str, Any]) -> Study:
        """What `to_dict` gave.

        Raises:
            ValueError: something is missing, or not what it should be; the message says where.
        """
        from pydantic import TypeAdapter, ValidationError

        if facts.get("format") != FORMAT:
            raise ValueError(f"no evaluation: expected the format {FORMAT}, as `swift-kernels eval --output` writes it")
        if facts.get("version") != FORMAT_VERSION:
            raise ValueError(f"format version {facts.get('version')}: this version reads {FORMAT_VERSION}")
        try:
            return TypeAdapter(cls).validate_python(metrics.with_nan(facts))
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(map(str, first["loc"]))
            raise ValueError(f"a damaged evaluation, {place}: {first['msg']}") from None


def study_task(
    rollouts: Sequence[Rollout],
    scores: Table,
    *,
    task: str,
    file: str,
    head: str,
    cost: Cost,
    rewards: Rewards | None = None,
    ns: Sequence[int] | None = None,
    notes: Sequence[str] = (),
) -> TaskStudy:
    """Judges a head's scores on one task, alone, in a vote, and combined with an external reward where there is one.

    `notes` are what is known of the data and worth saying.
    """
    correct = [[candidate.correct for candidate in rollout.candidates] for rollout in rollouts]
    answers = [[candidate.answer for candidate in rollout.candidates] for rollout in rollouts]
    keys = [rollout.key for rollout in rollouts]
    notes = [*notes, *([] if rewards is None else rewards.notes)]
    sizes = sorted({len(row) for row in correct})
    if len(sizes) > 1:
        notes.append(f"Problems have {sizes[0]} to {sizes[-1]} answers: N goes to {sizes[0]}")
    if sizes[0] == 1:
        notes.append("Some problem has a single answer: there is nothing to pick from")
    rules: dict[str, Selector] = {}
    judged = None if rewards is None else [not all(map(math.isnan, row)) for row in rewards.values]
    if judged is not None and not any(judged):
        notes.append(f"{rewards.name if rewards else ''} has no reward for any answer: it is not compared")
        rewards = judged = None
    elif judged is not None and not all(judged):
        notes.append(
            f"The external reward and what it is combined in are judged on the {sum(judged)} of {len(judged)} problems "
            "that have rewards"
        )
    has_answers = any(answer is not None for row in answers for answer in row)
    tables: dict[str, Table] = {} if rewards is None else {"reward": rewards.values}
    probabilities: dict[str, Table] = {}
    calibrations: dict[str, Calibration] = {}
    for name, table in {"swift": scores, **tables}.items():
        try:
            calibrations[name], probabilities[name] = calibrate(table, correct, keys, answers)
        except ValueError as error:
            notes.append(f"{name} is not calibrated, and no vote is weighted by it: {error}")
        else:
            if has_answers:
                rules[f"{name}_vote"] = selectors.vote(answers, probabilities[name])
    weight = None
    if rewards is not None:
        rules["rank"] = selectors.combined(combine.rank_combination, scores, rewards.values)
        rules["min_max"] = selectors.combined(combine.min_max_mean, scores, rewards.values)
        weight = combine.fit_weight(scores, rewards.values, correct)
        if len(set(keys)) > 1:
            rules["weighted"] = _weighted(scores, rewards.values, correct, keys)
        else:
            notes.append("One problem: no weighted mean, whose weight would be fitted to it")
    with_reward = {name: judged or [] for name in ("reward", "reward_vote", "rank", "min_max", "weighted")}
    evaluation = evaluate(
        rollouts, scores, ns, tables=tables, rules=rules, judged=with_reward if judged is not None else None
    )
    belief = None
    if "swift" in probabilities:
        belief = _over_optimization(evaluation, scores, probabilities["swift"], correct)
    return TaskStudy(
        task=task,
        rollouts=file,
        head=head,
        evaluation=evaluation,
        pairwise_loss=metrics.estimate([pairwise_loss(s, c) for s, c in zip(scores, correct, strict=True)]),
        calibration=calibrations.get("swift"),
        over_optimization=belief,
        reward=None if rewards is None else rewards.name,
        weight=weight,
        costs=[cost, *([] if rewards is None or rewards.cost is None else [_reward_cost(rewards)])],
        notes=notes,
    )


def transfer(
    heads: Sequence[str],
    tasks: Sequence[str],
    own: Sequence[int],
    data: Sequence[Sequence[Rollout]],
    scores: Sequence[Sequence[Table]],
    ns: Sequence[int] | None = None,
) -> Transfer:
    """Compares heads across tasks.

    Args:
        own: of each task, the head that was made for it.
        data: the rollouts of each task.
        scores: a list a head, a table a task.
        ns: the largest of them is how many answers the heads pick from; by default all.
    """
    compared = [
        compare(items, {str(head): tables[task] for head, tables in enumerate(scores)}, ns)
        for task, items in enumerate(data)
    ]
    differences = [
        [
            None if head == own[task] else found.difference(str(head), str(own[task]))
            for task, found in enumerate(compared)
        ]
        for head in range(len(heads))
    ]
    gaps = [gap for row in differences for gap in row if gap is not None]
    adjusted = iter(metrics.holm([gap.p for gap in gaps]))
    return Transfer(
        list(heads),
        list(tasks),
        [found.n for found in compared],
        [[found.accuracy(str(head)) for found in compared] for head in range(len(heads))],
        [[None if gap is None else replace(gap, p=next(adjusted)) for gap in row] for row in differences],
        [[found.auc(str(head)) for found in compared] for head in range(len(heads))],
    )


def pairwise_loss(scores: Sequence[float], correct: Sequence[bool]) -> float:
    """Mean of -log sigmoid(right - wrong) over the pairs of a right and a wrong answer; NaN where there is none."""
    known = [(score, grade) for score, grade in zip(scores, correct, strict=True) if math.isfinite(score)]
    right, wrong = (np.array([score for score, grade in known if grade == side]) for side in (True, False))
    if not len(right) or not len(wrong):
        return math.nan
    return float(np.logaddexp(0, wrong[None] - right[:, None]).mean())


def _weighted(scores: Table, rewards: Table, correct: Sequence[Sequence[bool]], keys: Sequence[str]) -> Selector:
    """The weighted mean, each problem with the weight that is best on the other parts of the problems."""
    parts = fold_of_problems(keys, min(FOLDS, len(set(keys))))
    weights = {}
    for part in set(parts):
        others = [index for index, own in enumerate(parts) if own != part]
        weights[part] = combine.fit_weight(
            [scores[index] for index in others],
            [rewards[index] for index in others],
            [correct[index] for index in others],
        )
    rules = {
        part: selectors.combined(partial(combine.weighted_mean, weight=weight), scores, rewards)
        for part, weight in weights.items()
    }
    return lambda problem, subsets: rules[parts[problem]](problem, subsets)


def _over_optimization(
    evaluation: Evaluation, scores: Table, probabilities: Table, correct: Sequence[Sequence[bool]]
) -> OverOptimization:
    def wins(n: int) -> list[float]:
        return [metrics.best_of_k(s, c, n) for s, c in zip(scores, correct, strict=True)]

    belief = {
        n: metrics.estimate(
            [metrics.best_of_k(s, np.nan_to_num(p).tolist(), n) for s, p in zip(scores, probabilities, strict=True)],
            shares=True,
        )
        for n in evaluation.accuracy
    }
    best = max(row["swift"].mean for row in evaluation.accuracy.values())
    # The largest of those that are equal but for rounding.
    peak = max(n for n, row in evaluation.accuracy.items() if row["swift"].mean > best - 1e-9)
    return OverOptimization(belief, peak, metrics.difference(wins(evaluation.n), wins(peak)))


def _reward_cost(rewards: Rewards) -> Cost:
    cost = rewards.cost
    assert cost is not None
    answers = sum(map(len, rewards.values))
    return Cost(f"{rewards.name}, {cost.device}", cost.parameters, cost.flops, cost.seconds, answers)
