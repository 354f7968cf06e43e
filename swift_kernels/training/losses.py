"""The losses of arXiv 2505.12225 on pooled scores, each for one head or for many at once."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

TEMPERATURE = 0.01
"""Of the targets softmax(label / temperature) of InfoNCA and NCA: next to all of it goes to the right candidates."""

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def bce(scores: Tensor, labels: Tensor, group: Tensor) -> Tensor:
    """Binary cross-entropy of a score taken as a logit; mean over candidates.

    Args, of every loss here:
        scores: `[n, heads]`, or `[n]` for one head.
        labels: `[n]`, 1 right and 0 wrong.
        group: int `[n]`, the problem of each candidate, in any order.

    Returns:
        `[heads]`; 0 where no candidate has a part in the loss (see `taking_part`).
    """
    scores, labels = _columns(scores, labels)
    return functional.binary_cross_entropy_with_logits(scores, labels, reduction="none").mean(dim=0)


def hinge(scores: Tensor, labels: Tensor, group: Tensor) -> Tensor:
    """max(0, 1 - y score) with y = -1 or +1; mean over candidates."""
    scores, labels = _columns(scores, labels)
    return (1 - (2 * labels - 1) * scores).clamp_min(0).mean(dim=0)


def dpo(scores: Tensor, labels: Tensor, group: Tensor) -> Tensor:
    """-log sigmoid(right - wrong); mean over all pairs of a right and a wrong candidate of one problem."""
    scores, _ = _columns(scores, labels)
    right, wrong = right_wrong_pairs(labels, group)
    return -functional.logsigmoid(scores[right] - scores[wrong]).sum(dim=0) / max(1, len(right))


def infonca(scores: Tensor, labels: Tensor, group: Tensor) -> Tensor:
    """Cross-entropy of a problem's softmax(score) from softmax(label / temperature) (arXiv 2402.05369).

    Mean over the problems that have two candidates or more. Where all are right, or all wrong, the target is uniform:
    there is no order to learn, and scores that differ are drawn together, as the formula says.
    """
    scores, labels, group = _problems(scores, labels, group)
    problems = _count(group)
    target = _log_softmax(labels / TEMPERATURE, group, problems).exp()
    return -(target * _log_softmax(scores, group, problems)).sum(dim=0) / max(1, problems)


def nca(scores: Tensor, labels: Tensor, group: Tensor) -> Tensor:
    """-sum(target log sigmoid(score) + log sigmoid(-score) / K) over a problem's K candidates (arXiv 2402.05369).

    Target and mean as in `infonca`. A uniform target draws the scores to 0.
    """
    scores, labels, group = _problems(scores, labels, group)
    problems = _count(group)
    target = _log_softmax(labels / TEMPERATURE, group, problems).exp()
    share = 1 / group.bincount(minlength=problems)[group, None].to(scores)
    terms = target * functional.logsigmoid(scores) + share * functional.logsigmoid(-scores)
    return -terms.sum(dim=0) / max(1, problems)


LOSSES: dict[str, Loss] = {"bce": bce, "hinge": hinge, "dpo": dpo, "infonca": infonca, "nca": nca}

PAIRED = frozenset({"dpo"})
GROUPED = frozenset({"dpo", "infonca", "nca"})
"""Losses that compare the candidates of a problem, so that a batch needs all of them."""


def get_loss(name: str) -> Loss:
    if name not in LOSSES:
        raise ValueError(f"loss is {name!r}: expected one of {', '.join(LOSSES)}")
    return LOSSES[name]


def taking_part(name: str, labels: Tensor, group: Tensor) -> Tensor:
    """bool `[n]`: the candidates that have a term in the loss; the others change nothing and need not be read."""
    _, group, size = group.unique(return_inverse=True, return_counts=True)
    if name in PAIRED:
        right = labels.new_zeros(len(size)).index_add(0, group, labels)
        return ((right > 0) & (right < size))[group]
    return size[group] >= (2 if name in GROUPED else 1)


def right_wrong_pairs(labels: Tensor, group: Tensor) -> tuple[Tensor, Tensor]:
    """Indices `[pairs]` of the right and of the wrong candidate of every such pair within a problem."""
    _, group = group.unique(return_inverse=True)
    right, wrong = (labels > 0.5).nonzero()[:, 0], (labels <= 0.5).nonzero()[:, 0]
    wrong = wrong[group[wrong].argsort(stable=True)]
    size = group[wrong].bincount(minlength=_count(group))
    partners = size[group[right]]
    # The wrong candidates of a problem lie together; each right one runs through them.
    first = (size.cumsum(0) - size)[group[right]]
    run = torch.arange(int(partners.sum()), device=labels.device)
    run = run - (partners.cumsum(0) - partners).repeat_interleave(partners)
    return right.repeat_interleave(partners), wrong[first.repeat_interleave(partners) + run]


def within_problem_auc(scores: Tensor, labels: Tensor, group: Tensor) -> Tensor:
    """Probability that a right candidate outscores a wrong one of its problem, ties half: `[heads]`.

    Mean over the problems that have both, as in `evaluation.metrics`; NaN where none has.
    """
    scores, _ = _columns(scores, labels)
    right, wrong = right_wrong_pairs(labels, group)
    # float64, for the mean of a million pairs.
    wins = (scores[right] > scores[wrong]).double() + 0.5 * (scores[right] == scores[wrong]).double()
    _, problem, pairs = group[right].unique(return_inverse=True, return_counts=True)
    by_problem = wins.new_zeros(len(pairs), scores.shape[1]).index_add(0, problem, wins) / pairs[:, None]
    return by_problem.mean(dim=0)


def _columns(scores: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Scores `[n, heads]`, and labels of the same shape and dtype."""
    scores = scores.unsqueeze(1) if scores.dim() == 1 else scores
    return scores, labels.to(scores)[:, None].expand_as(scores)


def _problems(scores: Tensor, labels: Tensor, group: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Scores and labels `[k, 1 or heads]` of the candidates that are not alone, and their problems from 0."""
    scores, _ = _columns(scores, labels)
    kept = taking_part("infonca", labels, group)
    _, group = group[kept].unique(return_inverse=True)
    return scores[kept], labels[kept, None].to(scores), group


def _count(group: Tensor) -> int:
    return int(group.max()) + 1 if len(group) else 0


def _log_softmax(values: Tensor, group: Tensor, problems: int) -> Tensor:
    """`values` `[n, heads]` less the log-sum-exp of their problem."""
    index = group[:, None].expand_as(values)
    # The shift cancels, in the gradient too.
    largest = values.detach().new_full((problems, values.shape[1]), -torch.inf)
    shifted = values - largest.scatter_reduce(0, index, values.detach(), "amax")[group]
    sums = values.new_zeros(problems, values.shape[1]).index_add(0, group, shifted.exp())
    return shifted - sums.log()[group]
