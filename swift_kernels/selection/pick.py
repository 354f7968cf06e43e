"""Picking one of N candidates, from scores or from the answers alone."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Sequence


def best_index(scores: Sequence[float]) -> int:
    """Index of the greatest score, the first of equals; NaN is never chosen."""
    scored = [index for index, score in enumerate(scores) if not math.isnan(score)]
    if not scored:
        raise ValueError(
            f"none of {len(scores)} candidates has a score: every answer ended before its first token counted"
        )
    return max(scored, key=lambda index: scores[index])


def majority_indices(answers: Sequence[str | None]) -> list[int]:
    """Indices of the candidates that hold the most frequent answer, or answers when several are equally frequent.

    A candidate without an answer (None) has no vote and is never chosen; without any vote the list is empty.
    """
    votes = Counter(answer for answer in answers if answer is not None)
    most = max(votes.values(), default=0)
    return [index for index, answer in enumerate(answers) if answer is not None and votes[answer] == most]


def majority_vote(answers: Sequence[str | None]) -> int:
    """Index of the first candidate that holds a most frequent answer."""
    winners = majority_indices(answers)
    if not winners:
        raise ValueError(f"none of {len(answers)} candidates has an answer")
    return winners[0]


def random_index(count: int, seed: int | None = None) -> int:
    """Index of one candidate, each as likely."""
    if count < 1:
        raise ValueError(f"there are {count} candidates: expected at least 1")
    return random.Random(seed).randrange(count)
