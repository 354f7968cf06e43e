"""Rules that pick among candidates by looking at all of them: votes, and SWIFT's scores with an external reward."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from swift_kernels.selection import combine

Selector = Callable[[int, np.ndarray], np.ndarray]
"""From the index of a problem and subsets of its candidates, `[subsets, k]`, the chance that each member is picked."""

Table = Sequence[Sequence[float]]
"""A list a problem, a number a candidate."""


def vote(answers: Sequence[Sequence[str | None]], weights: Table | None = None) -> Selector:
    """The answer with the most votes, each as heavy as its weight; tied answers are as likely.

    Who has no answer, or NaN for a weight, has no vote.
    """
    heavy = [np.ones(len(row)) for row in answers] if weights is None else [np.asarray(row, float) for row in weights]
    identities = [np.where(np.isnan(own), -1, _numbered(row)) for row, own in zip(answers, heavy, strict=True)]

    def chances(problem: int, subsets: np.ndarray) -> np.ndarray:
        members = identities[problem][subsets]
        winners = combine.weighted_vote_winners(members, heavy[problem][subsets])
        # Who holds an answer shares its chance with those who hold it too.
        holders = (members[:, :, None] == members[:, None, :]).sum(axis=2)
        return _normalised(winners / holders)

    return chances


def combined(rule: Callable[[np.ndarray, np.ndarray], np.ndarray], scores: Table, rewards: Table) -> Selector:
    """The greatest value of a rule of `selection.combine`; equal ones are as likely, NaN is never picked."""
    first, second = ([np.asarray(row, dtype=float) for row in table] for table in (scores, rewards))

    def chances(problem: int, subsets: np.ndarray) -> np.ndarray:
        values = rule(first[problem][subsets], second[problem][subsets])
        known = np.where(np.isnan(values), -np.inf, values)
        return _normalised((known == known.max(axis=1, keepdims=True)) & ~np.isnan(values))

    return chances


def _numbered(row: Sequence[str | None]) -> np.ndarray:
    numbers: dict[str, int] = {}
    return np.array([-1 if answer is None else numbers.setdefault(answer, len(numbers)) for answer in row])


def _normalised(weights: np.ndarray) -> np.ndarray:
    """Rows that sum to 1, or hold zeros alone."""
    total = weights.sum(axis=1, keepdims=True)
    return np.divide(weights, total, out=np.zeros(weights.shape), where=total > 0)
