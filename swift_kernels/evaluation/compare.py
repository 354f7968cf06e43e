"""Any number of score tables against each other and against what needs no head, problem by problem."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from swift_kernels.evaluation import metrics, selectors
from swift_kernels.evaluation.metrics import Difference, Estimate
from swift_kernels.evaluation.selectors import Selector
from swift_kernels.training.rollouts import Response, Rollout

Scores = Sequence[Sequence[float]]
"""A list a problem, a score a candidate; NaN is never chosen."""

SELECTOR_NAMES = {
    "random": "random pick",
    "vote": "majority vote",
    "length": "shortest answer",
    "longest": "longest answer",
    "logprob": "log-probability",
    "self_certainty": "self-certainty",
    "swift": "SWIFT",
    "swift_vote": "vote weighted by SWIFT",
    "reward": "external reward",
    "reward_vote": "vote weighted by reward",
    "rank": "SWIFT and reward, by rank",
    "min_max": "SWIFT and reward, min-max",
    "weighted": "SWIFT and reward, weighted",
    "oracle": "oracle (pass@N)",
}
"""What people read, in the order of their tables."""


@dataclass(frozen=True)
class Comparison:
    """What each selector wins on each problem.

    Attributes:
        values: for each n and selector, the chance that its pick among n candidates is right, a number a problem.
        scores: of each selector that goes by scores.
        correct: the grades, a list a problem.
        notes: which selectors are left out, and why.
    """

    values: dict[int, dict[str, list[float]]]
    scores: dict[str, Scores]
    correct: list[list[bool]]
    notes: list[str]

    @property
    def n(self) -> int:
        return max(self.values)

    @property
    def selectors(self) -> list[str]:
        return list(self.values[self.n])

    def accuracy(self, name: str, n: int | None = None) -> Estimate:
        """At n, by default the largest."""
        return metrics.estimate(self.values[self.n if n is None else n][name], shares=True)

    def difference(self, name: str, baseline: str, n: int | None = None) -> Difference:
        """How much oftener `name` picks a right answer than `baseline`, paired by problem, at n or the largest."""
        row = self.values[self.n if n is None else n]
        return metrics.difference(row[name], row[baseline])

    def aucs(self, name: str) -> list[float]:
        """Within-problem AUC of a selector that goes by scores, a number a problem; NaN where nothing differs."""
        return [metrics.within_problem_auc(s, c) for s, c in zip(self.scores[name], self.correct, strict=True)]

    def auc(self, name: str) -> Estimate:
        return metrics.estimate(self.aucs(name), shares=True)


def compare(
    rollouts: Sequence[Rollout],
    tables: Mapping[str, Scores],
    ns: Sequence[int] | None = None,
    rules: Mapping[str, Selector] | None = None,
    judged: Mapping[str, Sequence[bool]] | None = None,
) -> Comparison:
    """Compares named score tables and rules, the baselines that the rollouts allow, and the oracle.

    At each n of `ns`, by default 1, 2, 4, ... and the number of candidates. The selectors are "random", "vote", those
    of `baseline_scores`, the tables, the rules and "oracle"; without an answer anywhere there is no vote.

    `judged` says of a selector which problems it can be judged by: it has NaN on the others, and so have differences
    from it.
    """
    ns = check_ns(rollouts, ns)
    correct = [[candidate.correct for candidate in rollout.candidates] for rollout in rollouts]
    answers = [[candidate.answer for candidate in rollout.candidates] for rollout in rollouts]
    baselines, notes = baseline_scores(rollouts)
    rules = dict(rules or {})
    if any(answer is not None for row in answers for answer in row):
        rules = {"vote": selectors.vote(answers), **rules}
    else:
        notes.append("No answer was found in any response: not compared with majority vote")
    for name, table in tables.items():
        if name in {"random", "vote", "oracle", *_BASELINES}:
            raise ValueError(f"{name!r} names a selector that needs no scores: name them otherwise")
        if list(map(len, table)) != list(map(len, correct)):
            raise ValueError(f"{name!r}: expected a score for each candidate of each of {len(rollouts)} problems")
    scores = {**baselines, **tables}
    values = {
        n: {
            "random": [metrics.best_of_k([0.0] * len(c), c, n) for c in correct],
            **{name: _won(rule, correct, n) for name, rule in rules.items() if name == "vote"},
            **{
                name: [metrics.best_of_k(s, c, n) for s, c in zip(table, correct, strict=True)]
                for name, table in scores.items()
            },
            **{name: _won(rule, correct, n) for name, rule in rules.items() if name != "vote"},
            "oracle": [metrics.pass_at_k(c, n) for c in correct],
        }
        for n in ns
    }
    for name, known in (judged or {}).items():
        for row in values.values():
            if name in row:
                row[name] = [value if own else math.nan for value, own in zip(row[name], known, strict=True)]
    return Comparison(values, scores, correct, notes)


def _won(rule: Selector, correct: Sequence[Sequence[bool]], n: int) -> list[float]:
    return [metrics.picked_at_k(partial(rule, problem), grades, n) for problem, grades in enumerate(correct)]


def check_ns(rollouts: Sequence[Rollout], ns: Sequence[int] | None) -> list[int]:
    """The numbers of answers to pick from, ascending, by default 1, 2, 4, ...; raises where a problem has fewer."""
    fewest = min(rollouts, key=lambda rollout: len(rollout.candidates))
    most = len(fewest.candidates)
    chosen = default_ns(most) if ns is None else sorted(set(ns))
    if chosen[0] < 1 or chosen[-1] > most:
        wrong = chosen[0] if chosen[0] < 1 else chosen[-1]
        raise ValueError(f"n is {wrong}: expected 1..{most}, problem {fewest.id!r} has {most} candidates")
    return chosen


def baseline_scores(rollouts: Sequence[Rollout]) -> tuple[dict[str, Scores], list[str]]:
    """Scores that need no head, and notes on those that are left out because some answer lacks what they read.

    "length" prefers the shortest answer in tokens, "longest" the longest, "logprob" the greatest mean log-probability
    of the tokens, and "self_certainty" their greatest mean divergence from uniform (arXiv 2502.18581).
    An answer without a token has NaN.
    """
    scores: dict[str, Scores] = {}
    left_out: dict[str, list[str]] = {}
    total = sum(len(rollout.candidates) for rollout in rollouts)
    for name, (source, function) in _BASELINES.items():
        rows = [[function(candidate) for candidate in rollout.candidates] for rollout in rollouts]
        known = [[value for value in row if value is not None] for row in rows]
        missing = total - sum(map(len, known))
        if missing:
            where = "in these rollouts" if missing == total else f"for {missing} of {total} answers"
            left_out.setdefault(f"No {source} {where}", []).append(SELECTOR_NAMES[name])
        else:
            scores[name] = known
    return scores, [f"{reason}: not compared with {' and '.join(names)}" for reason, names in left_out.items()]


def default_ns(most: int) -> list[int]:
    """1, 2, 4, ... up to and with `most`."""
    return sorted({2**power for power in range(most.bit_length()) if 2**power <= most} | {most})


def _length(answer: Response) -> float | None:
    if answer.token_ids is None:
        return None
    return -float(len(answer.token_ids)) if answer.token_ids else math.nan


def _longest(answer: Response) -> float | None:
    shortness = _length(answer)
    return None if shortness is None else -shortness


def _logprob(answer: Response) -> float | None:
    return None if answer.confidence is None else _mean(answer.confidence.logprobs)


def _self_certainty(answer: Response) -> float | None:
    return None if answer.confidence is None else _mean(answer.confidence.self_certainties)


def _mean(values: Sequence[float]) -> float:
    return statistics.fmean(values) if values else math.nan


_BASELINES: dict[str, tuple[str, Callable[[Response], float | None]]] = {
    "length": ("token ids", _length),
    "longest": ("token ids", _longest),
    "logprob": ("per-token confidence", _logprob),
    "self_certainty": ("per-token confidence", _self_certainty),
}
"""What each reads, and its score of an answer: None where that was not recorded."""
