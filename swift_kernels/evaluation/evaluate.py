"""Best-of-N on stored rollouts: SWIFT's pick against random pick, majority vote and the oracle."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from swift_kernels.evaluation.metrics import Estimate, best_of_k, estimate, pass_at_k, vote_at_k, within_problem_auc
from swift_kernels.training.rollouts import Rollout

SELECTORS = ("random", "vote", "swift", "oracle")


@dataclass(frozen=True)
class Evaluation:
    """What each selector wins.

    Attributes:
        accuracy: for each n, each selector's accuracy.
        differences: at the largest n, "swift - random" and "swift - vote", paired by problem.
        auc: within-problem AUC, over the problems that have right and wrong candidates.
        problems, mixed_problems: how many there are, and how many have right and wrong candidates.
        candidates, unscored: how many there are, and how many have no score.
    """

    accuracy: dict[int, dict[str, Estimate]]
    differences: dict[str, Estimate]
    auc: Estimate
    problems: int
    mixed_problems: int
    candidates: int
    unscored: int

    @property
    def n(self) -> int:
        return max(self.accuracy)

    def to_dict(self) -> dict[str, Any]:
        """For JSON, which has no NaN: an estimate over no problem is null."""
        return _without_nan(asdict(self))


def score_rollouts(
    model: Any,
    head: Any,
    rollouts: Sequence[Rollout],
    *,
    batch_size: int = 16,
    allow_mismatch: bool = False,
    on_progress: Callable[[int], None] | None = None,
) -> list[list[float]]:
    """Scores of the stored token ids, a list a problem; `on_progress` is told how many problems are done.

    Equal answers to one problem are scored once.
    """
    from swift_kernels.integrations.shared_prompt import score_responses

    scores: list[list[float]] = []
    for rollout in rollouts:
        answers = [tuple(candidate.token_ids or ()) for candidate in rollout.candidates]
        unique = list(dict.fromkeys(answers))
        values = score_responses(
            model,
            head,
            rollout.prompt_token_ids or [],
            unique,
            batch_size=batch_size,
            allow_mismatch=allow_mismatch,
        )
        by_answer = dict(zip(unique, values.tolist(), strict=True))
        scores.append([by_answer[answer] for answer in answers])
        if on_progress is not None:
            on_progress(len(scores))
    return scores


def evaluate(
    rollouts: Sequence[Rollout], scores: Sequence[Sequence[float]], ns: Sequence[int] | None = None
) -> Evaluation:
    """Evaluates every selector at each n of `ns` (by default 1, 2, 4, ... and the number of candidates)."""
    fewest = min(rollouts, key=lambda rollout: len(rollout.candidates))
    most = len(fewest.candidates)
    ns = default_ns(most) if ns is None else sorted(set(ns))
    if ns[0] < 1 or ns[-1] > most:
        wrong = ns[0] if ns[0] < 1 else ns[-1]
        raise ValueError(f"n is {wrong}: expected 1..{most}, problem {fewest.id!r} has {most} candidates")
    correct = [[candidate.correct for candidate in rollout.candidates] for rollout in rollouts]
    answers = [[candidate.answer for candidate in rollout.candidates] for rollout in rollouts]
    values = {
        n: {
            "random": [best_of_k([0.0] * len(c), c, n) for c in correct],
            "vote": [vote_at_k(a, c, n) for a, c in zip(answers, correct, strict=True)],
            "swift": [best_of_k(s, c, n) for s, c in zip(scores, correct, strict=True)],
            "oracle": [pass_at_k(c, n) for c in correct],
        }
        for n in ns
    }
    last = values[ns[-1]]
    aucs = [within_problem_auc(s, c) for s, c in zip(scores, correct, strict=True)]
    return Evaluation(
        accuracy={n: {name: estimate(values[n][name]) for name in SELECTORS} for n in ns},
        differences={
            f"swift - {other}": estimate([a - b for a, b in zip(last["swift"], last[other], strict=True)])
            for other in ("random", "vote")
        },
        auc=estimate(aucs),
        problems=len(rollouts),
        mixed_problems=sum(not math.isnan(auc) for auc in aucs),
        candidates=sum(map(len, correct)),
        unscored=sum(math.isnan(score) for row in scores for score in row),
    )


def default_ns(most: int) -> list[int]:
    """1, 2, 4, ... up to and with `most`."""
    return sorted({2**power for power in range(most.bit_length()) if 2**power <= most} | {most})


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    return None if isinstance(value, float) and math.isnan(value) else value
