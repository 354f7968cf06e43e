"""Best-of-N on stored rollouts: SWIFT's pick against what needs no head, and the oracle."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from swift_kernels.evaluation import metrics
from swift_kernels.evaluation.compare import Scores, compare
from swift_kernels.evaluation.metrics import Difference, Estimate, estimate
from swift_kernels.evaluation.selectors import Selector
from swift_kernels.training.rollouts import Rollout


@dataclass(frozen=True)
class Evaluation:
    """What each selector wins.

    Attributes:
        accuracy: for each n, the accuracy of each selector that the rollouts allow.
        differences: at the largest n, "swift - random", "swift - vote", ..., paired by problem; the oracle has none.
        adjusted_p: their p-values, adjusted for being several (Holm).
        auc: within-problem AUC, over the problems that have right and wrong candidates.
        problems, mixed_problems: how many there are, and how many have right and wrong candidates.
        candidates, unscored: how many there are, and how many have no score.
        notes: which selectors are left out, and why.
    """

    accuracy: dict[int, dict[str, Estimate]]
    differences: dict[str, Difference]
    adjusted_p: dict[str, float]
    auc: Estimate
    problems: int
    mixed_problems: int
    candidates: int
    unscored: int
    notes: list[str]

    @property
    def n(self) -> int:
        return max(self.accuracy)

    def to_dict(self) -> dict[str, Any]:
        """For JSON, which has no NaN: an estimate over no problem is null."""
        return metrics.without_nan(asdict(self))


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
    rollouts: Sequence[Rollout],
    scores: Scores,
    ns: Sequence[int] | None = None,
    *,
    tables: Mapping[str, Scores] | None = None,
    rules: Mapping[str, Selector] | None = None,
    judged: Mapping[str, Sequence[bool]] | None = None,
) -> Evaluation:
    """Evaluates every selector at each n of `ns` (by default 1, 2, 4, ... and the number of candidates).

    `tables` and `rules` are what is compared besides, `judged` by which problems, as in `compare`.
    """
    compared = compare(rollouts, {"swift": scores, **(tables or {})}, ns, rules, judged)
    aucs = compared.aucs("swift")
    differences = {
        f"swift - {other}": compared.difference("swift", other)
        for other in compared.selectors
        if other not in ("swift", "oracle")
    }
    return Evaluation(
        accuracy={n: {name: compared.accuracy(name, n) for name in compared.selectors} for n in compared.values},
        differences=differences,
        adjusted_p=dict(zip(differences, metrics.holm([each.p for each in differences.values()]), strict=True)),
        auc=estimate(aucs, shares=True),
        problems=len(rollouts),
        mixed_problems=sum(not math.isnan(auc) for auc in aucs),
        candidates=sum(map(len, compared.correct)),
        unscored=sum(math.isnan(score) for row in scores for score in row),
        notes=compared.notes,
    )
