"""From scores to the chance of being right: Platt scaling over problems, and how far to trust it.

A chance that is reported for an answer comes from a fit on other problems, so that calibration error and the accuracy
of those who abstain are those on problems never seen.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from swift_kernels.evaluation import metrics, selectors
from swift_kernels.evaluation.metrics import Estimate
from swift_kernels.evaluation.selectors import Table

BINS = 15
FOLDS = 5
COVERAGES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)


@dataclass(frozen=True)
class Scaling:
    """P(correct) = sigmoid(score / temperature + offset): temperature scaling (arXiv 1706.04599) and an offset.

    The offset is there because losses over pairs leave scores without a zero point.
    """

    temperature: float
    offset: float

    def probabilities(self, scores: Table) -> list[list[float]]:
        """NaN stays NaN."""
        return [
            [float(p) for p in _sigmoid(np.asarray(row, dtype=float) / self.temperature + self.offset)]
            for row in scores
        ]


@dataclass(frozen=True)
class Bin:
    """The answers whose P(correct) falls into one interval: their mean P, the share that is right, their number."""

    confidence: float
    accuracy: float
    count: int


@dataclass(frozen=True)
class Reliability:
    """How well chances fit what came.

    Attributes:
        ece: expected calibration error over `BINS` bins of equal width (arXiv 1706.04599).
        brier: mean squared error, over problems.
        bins: those that hold an answer, ascending.
    """

    ece: float
    brier: Estimate
    bins: list[Bin]


@dataclass(frozen=True)
class Abstention:
    """What is right among the problems that are answered, if those with the least sure pick are left unanswered.

    Attributes:
        coverage: share of problems answered.
        accuracy: of those answered, at each coverage.
        area: mean accuracy over all coverages, one a number of problems answered; higher is better.
    """

    coverage: list[float]
    accuracy: list[Estimate]
    area: float


@dataclass(frozen=True)
class Calibration:
    """Of one head's scores on one task.

    Attributes:
        scaling: fitted to all problems, for use on others.
        folds: how many parts of the problems were each left out of a fit; what follows is on those left out.
        before: sigmoid(score) as it is. after: P(correct).
        picks: P(correct) of the answer that is picked among all; above its accuracy where the head is led astray.
        abstention: sure is who has a great score. vote_abstention: who has a great share of the vote; None without
            answers.
    """

    scaling: Scaling
    folds: int
    before: Reliability
    after: Reliability
    picks: Reliability
    abstention: Abstention
    vote_abstention: Abstention | None


def fit_scaling(scores: Table, correct: Sequence[Sequence[bool]]) -> Scaling:
    """The scaling of greatest likelihood, each problem weighing the same; answers without a finite score are left out.

    Targets are Platt's (right: (n+ + 1) / (n+ + 2), wrong: 1 / (n- + 2)), so that scores which tell all right answers
    from all wrong ones have a finite temperature. Scores that tell nothing have one a thousand times their spread.

    Raises:
        ValueError: no answer has a finite score, or all that have one are right, or wrong.
    """
    from scipy.optimize import minimize
    from scipy.special import log_expit

    rows: list[float] = []
    labels: list[bool] = []
    weights: list[float] = []
    for row, grades in zip(scores, correct, strict=True):
        kept = [(score, grade) for score, grade in zip(row, grades, strict=True) if math.isfinite(score)]
        rows += [score for score, _ in kept]
        labels += [grade for _, grade in kept]
        weights += [1 / max(1, len(kept))] * len(kept)
    values, right, weight = np.array(rows), np.array(labels, dtype=bool), np.array(weights)
    if not len(right):
        raise ValueError("no answer has a finite score: expected right and wrong ones to calibrate on")
    check_mixed(labels)
    weight /= weight.sum()
    largest = np.abs(values).max() or 1.0
    # Scaled first: the square of a huge score is none.
    center, spread = largest * (values / largest).mean(), largest * (values / largest).std() or 1.0
    standard = (values - center) / spread
    target = np.where(right, (right.sum() + 1) / (right.sum() + 2), 1 / ((~right).sum() + 2))

    def loss(parameters: np.ndarray) -> tuple[float, np.ndarray]:
        logits = parameters[0] * standard + parameters[1]
        value = -(weight * (target * log_expit(logits) + (1 - target) * log_expit(-logits))).sum()
        gradient = weight * (_sigmoid(logits) - target)
        return float(value), np.array([(gradient * standard).sum(), gradient.sum()])

    # A slope below zero would turn the order around, which a scaling must not.
    found = minimize(loss, np.array([1.0, 0.0]), jac=True, method="L-BFGS-B", bounds=[(1e-3, None), (None, None)])
    slope, level = found.x
    scaling = Scaling(float(spread / slope), float(level - slope * (center / spread)))
    if not math.isfinite(scaling.temperature) or not math.isfinite(scaling.offset):
        raise ValueError(f"scores of up to {largest:.3g} have no temperature that float64 holds")
    return scaling


def check_mixed(grades: Sequence[bool]) -> None:
    """Raises where all answers are right, or all wrong: there is no chance to learn from them."""
    if len(set(grades)) == 1:
        raise ValueError(
            f"all answers are {'right' if grades[0] else 'wrong'}: expected right and wrong ones to calibrate on"
        )


def fold_of_problems(keys: Sequence[str], folds: int = FOLDS, seed: int = 0) -> list[int]:
    """The part each problem belongs to: parts of about equal size, problems of one key in one."""
    distinct = list(dict.fromkeys(keys))
    random.Random(seed).shuffle(distinct)
    place = {key: index % folds for index, key in enumerate(distinct)}
    return [place[key] for key in keys]


def cross_fitted(scores: Table, correct: Sequence[Sequence[bool]], parts: Sequence[int]) -> list[list[float]]:
    """P(correct) of each answer, by the scaling fitted to the problems of the other parts."""
    probabilities: list[list[float]] = [[] for _ in scores]
    for part in set(parts):
        others = [index for index, own in enumerate(parts) if own != part]
        try:
            scaling = fit_scaling([scores[index] for index in others], [correct[index] for index in others])
        except ValueError as error:
            raise ValueError(f"without one part in {len(set(parts))} of the problems, {error}") from None
        for index, own in enumerate(parts):
            if own == part:
                (probabilities[index],) = scaling.probabilities([scores[index]])
    return probabilities


def calibrate(
    scores: Table,
    correct: Sequence[Sequence[bool]],
    keys: Sequence[str],
    answers: Sequence[Sequence[str | None]] | None = None,
) -> tuple[Calibration, list[list[float]]]:
    """The calibration of a table of scores, and the cross-fitted P(correct) of every answer."""
    folds = min(FOLDS, len(set(keys)))
    if folds < 2:
        raise ValueError(f"there is {folds} problem: expected at least 2, one to fit on and one to judge")
    parts = fold_of_problems(keys, folds)
    probabilities = cross_fitted(scores, correct, parts)
    raw = Scaling(1.0, 0.0).probabilities(scores)
    picks = [picked(row, row, grades) for row, grades in zip(probabilities, correct, strict=True)]
    # By the score itself: each part's scaling has another offset, lower where its own problems are right more often.
    sure = [max((score for score in row if not math.isnan(score)), default=math.nan) for row in scores]
    has_answers = answers is not None and any(answer is not None for row in answers for answer in row)
    votes = _vote_abstention(answers, correct) if answers is not None and has_answers else None
    calibration = Calibration(
        scaling=fit_scaling(scores, correct),
        folds=folds,
        before=reliability(raw, correct),
        after=reliability(probabilities, correct),
        picks=reliability([[p] for p, _ in picks], [[right] for _, right in picks]),
        abstention=abstention(sure, [right for _, right in picks]),
        vote_abstention=votes,
    )
    return calibration, probabilities


def picked(scores: Sequence[float], values: Sequence[float], correct: Sequence[bool]) -> tuple[float, float]:
    """Mean value and chance of being right of the best-scored answer; NaN and 0 where none has a score."""
    known = [score for score in scores if not math.isnan(score)]
    if not known:
        return math.nan, 0.0
    best = [index for index, score in enumerate(scores) if score == max(known)]
    return (
        float(np.mean([values[index] for index in best])),
        float(np.mean([correct[index] for index in best])),
    )


def reliability(probabilities: Table, correct: Sequence[Sequence[float]], bins: int = BINS) -> Reliability:
    """Over all answers that have a P; ECE weighs answers alike, the Brier score problems."""
    pairs = [
        (p, float(right))
        for row, grades in zip(probabilities, correct, strict=True)
        for p, right in zip(row, grades, strict=True)
        if not math.isnan(p)
    ]
    brier = metrics.estimate(
        [
            float(np.mean(errors)) if (errors := _squared_errors(row, grades)) else math.nan
            for row, grades in zip(probabilities, correct, strict=True)
        ],
        shares=True,
    )
    if not pairs:
        return Reliability(math.nan, brier, [])
    p, right = np.array(pairs).T
    place = np.minimum((p * bins).astype(int), bins - 1)
    found = [
        Bin(float(p[place == index].mean()), float(right[place == index].mean()), int((place == index).sum()))
        for index in range(bins)
        if (place == index).any()
    ]
    ece = sum(each.count * abs(each.accuracy - each.confidence) for each in found) / len(p)
    return Reliability(ece, brier, found)


def abstention(sureness: Sequence[float], right: Sequence[float]) -> Abstention:
    """Of one pick a problem: how sure it is, NaN for not at all, and its chance of being right.

    Picks that are equally sure are left unanswered in an order that counts in expectation.
    """
    sure = np.nan_to_num(np.asarray(sureness, dtype=float), nan=-np.inf)
    counts = [max(1, round(share * len(sure))) for share in COVERAGES]
    outcome = metrics.by_rank(sureness, right)
    running = np.cumsum(outcome) / np.arange(1, len(outcome) + 1)
    return Abstention(
        [count / len(sure) for count in counts],
        [metrics.estimate(right, weights=_answered(sure, count), shares=True) for count in counts],
        float(running.mean()),
    )


def _answered(sure: np.ndarray, count: int) -> list[float]:
    """The chance that each is among the `count` surest."""
    least = np.sort(sure)[-count]
    surer, tied = sure > least, sure == least
    return np.where(surer, 1.0, np.where(tied, (count - surer.sum()) / tied.sum(), 0.0)).tolist()


def _vote_abstention(answers: Sequence[Sequence[str | None]], correct: Sequence[Sequence[bool]]) -> Abstention:
    shares = [max((row.count(answer) for answer in row if answer is not None), default=0) / len(row) for row in answers]
    rule = selectors.vote(answers)
    right = [metrics.picked_at_k(partial(rule, p), grades, len(grades)) for p, grades in enumerate(correct)]
    return abstention(shares, right)


def _squared_errors(row: Sequence[float], grades: Sequence[float]) -> list[float]:
    return [(p - float(right)) ** 2 for p, right in zip(row, grades, strict=True) if not math.isnan(p)]


def _sigmoid(values: np.ndarray) -> np.ndarray:
    from scipy.special import expit

    return np.asarray(expit(values))
