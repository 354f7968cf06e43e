"""How well each layer's states tell right answers from wrong ones: a linear probe, cross-validated by problem.

As in the paper (arXiv 2505.12225, section 3): a principal component analysis, then a linear discriminant. All answers
to a problem are on one side of every split: a probe that recognises problems, and knows how often each was answered
well, would otherwise look as if it told answers apart.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from swift_kernels.evaluation import metrics
from swift_kernels.evaluation.metrics import Estimate
from swift_kernels.training.rollouts import Rollout
from swift_kernels.training.standardize import NotFiniteError, parts, survey
from swift_kernels.training.store import Store, StoreError
from swift_kernels.training.stored import responses_of

POOLS = ("mean", "last")
RESAMPLES = 2_000
GROUP_BYTES = 1 << 28
"""Of the pooled features that are held at once: layers of more are read in groups."""


class ProbeError(ValueError):
    """Answers that no probe can be fitted to; the message says why, with counts."""


@dataclass(frozen=True)
class EntryProbe:
    """How well one entry of a store tells right from wrong, on problems the probe was not fitted to.

    Attributes:
        entry: the layer, or the name of another source.
        accuracy, balanced_accuracy: share of the answers, and mean of the shares of the right and the wrong ones.
        auc: chance that a right answer is ranked above a wrong one, of any two problems.
        within_auc: the same for answers to one problem, averaged over problems: what Best-of-N lives on.
        dimensions: principal components that the discriminant read.
    """

    entry: int | str
    accuracy: Estimate
    balanced_accuracy: Estimate
    auc: Estimate
    within_auc: Estimate
    dimensions: int


@dataclass(frozen=True)
class Probe:
    """A probe of every entry, with 95% intervals bootstrapped over problems.

    Attributes:
        majority: accuracy of calling every answer what most of them are.
        unscored: answers that are left out, as they have no scored token.
        mixed_problems: how many problems have right and wrong answers.
    """

    entries: list[EntryProbe]
    majority: float
    answers: int
    unscored: int
    problems: int
    mixed_problems: int
    folds: int
    dimensions: int
    pool: str

    @property
    def best(self) -> EntryProbe:
        """Of the highest AUC; being the highest of many, it is flattered a little."""
        return max(self.entries, key=lambda entry: entry.auc.mean)


def probe_store(
    store: Store,
    rollouts: Sequence[Rollout],
    *,
    folds: int = 5,
    dimensions: int = 32,
    pool: str = "mean",
    on_progress: Callable[[int], None] | None = None,
) -> tuple[Probe, Tensor]:
    """Probes every entry of a store of graded answers.

    Args:
        folds: of the cross-validation, by the problems' keys.
        dimensions: principal components at most.
        pool: the features of an answer, the "mean" over its scored tokens, or those of its "last" one.
        on_progress: told how many entries are done.

    Returns:
        the probe, and float32 `[stored features]`, the deviation of each over all scored tokens; 0 where constant.

    Raises:
        ProbeError: as `check_split` does.
        StoreError: a feature is NaN or infinite.
    """
    if pool not in POOLS:
        raise ValueError(f"pool is {pool!r}: expected one of {', '.join(POOLS)}")
    owners = [
        (response, candidate.correct, rollout.key)
        for rollout, responses in zip(rollouts, responses_of(store, rollouts), strict=True)
        for response, candidate in zip(responses, rollout.candidates, strict=True)
    ]
    scored = [owner for owner in owners if store.lengths[owner[0]]]
    correct = np.array([right for _, right, _ in scored], dtype=bool)
    keys = [key for _, _, key in scored]
    check_split(correct, keys, folds)
    distinct = sorted({response for response, _, _ in scored})
    place = {response: index for index, response in enumerate(distinct)}
    rows = [place[response] for response, _, _ in scored]
    deviations: list[Tensor] = []

    def features() -> Iterator[tuple[int | str, np.ndarray]]:
        for group in _groups(store.widths, len(distinct)):
            try:
                deviation, pooled = _read(store, group, torch.tensor(distinct), pool)
            except NotFiniteError as error:
                raise StoreError(f"{store.path}: {error}") from None
            deviations.append(deviation)
            widths = [store.widths[entry] for entry in group]
            for entry, values in zip(group, pooled.split(widths, dim=1), strict=True):
                yield store.layout.entries[entry], values.numpy()[rows]

    found = probe(features(), correct, keys, folds, dimensions, on_progress)
    result = Probe(
        entries=found,
        majority=float(max(correct.mean(), 1 - correct.mean())),
        answers=len(scored),
        unscored=len(owners) - len(scored),
        problems=len(set(keys)),
        mixed_problems=sum(len({right for _, right, own in scored if own == key}) == 2 for key in set(keys)),
        folds=folds,
        dimensions=dimensions,
        pool=pool,
    )
    return result, torch.cat(deviations)


def probe(
    features: Iterable[tuple[int | str, np.ndarray]],
    correct: np.ndarray,
    keys: Sequence[str],
    folds: int = 5,
    dimensions: int = 32,
    on_progress: Callable[[int], None] | None = None,
) -> list[EntryProbe]:
    """Probes named features `[answers, width]`, one after the other: standardised, PCA, then LDA.

    All three are fitted inside the fold. `correct` is bool `[answers]`, `keys` are those of their problems.
    """
    splits = check_split(correct, keys, folds)
    problems, problem = np.unique(np.asarray(keys), return_inverse=True)
    bootstrap = _Bootstrap(correct, problem, len(problems))
    found = []
    for entry, values in features:
        scores, kept = _out_of_fold(values, correct, splits, dimensions)
        found.append(EntryProbe(entry, *bootstrap.estimates(scores), kept))
        if on_progress is not None:
            on_progress(len(found))
    return found


def check_split(correct: np.ndarray, keys: Sequence[str], folds: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """The indices of train and test answers of every fold; no problem is on both sides.

    Raises:
        ProbeError: there are fewer problems than folds, or a fold would have to learn from answers of one kind.
    """
    try:
        from sklearn.model_selection import StratifiedGroupKFold
    except ImportError as error:
        raise ImportError("the probe needs scikit-learn: pip install 'swift_kernels[report]'") from error

    if folds < 2:
        raise ValueError(f"folds is {folds}: expected at least 2")
    if not len(correct):
        raise ProbeError("there is no answer with a scored token: every one ended at its first")
    if correct.all() or not correct.any():
        which = "right" if correct.all() else "wrong"
        raise ProbeError(f"all {len(correct)} answers are {which}: a probe needs right and wrong ones")
    problems = {kind: len({key for key, right in zip(keys, correct, strict=True) if right == kind}) for kind in (0, 1)}
    if len(set(keys)) < folds:
        raise ProbeError(f"there are {len(set(keys))} problems for {folds} folds: expected at least one problem a fold")
    with warnings.catch_warnings():
        # It warns where a kind of answer is rarer than folds; what matters is checked below.
        warnings.simplefilter("ignore", UserWarning)
        splits = [
            (train, test)
            for train, test in StratifiedGroupKFold(folds).split(np.zeros(len(correct)), correct, np.asarray(keys))
            if len(test)
        ]
    if any(len(set(correct[train])) < 2 for train, _ in splits):
        rare = min(problems, key=lambda kind: problems[kind])
        raise ProbeError(
            f"the {'right' if rare else 'wrong'} answers belong to {problems[rare]} of {len(set(keys))} problems: a "
            f"fold of {folds} would learn from one kind alone; expected more problems with such answers"
        )
    return splits


def _groups(widths: Sequence[int], answers: int) -> list[list[int]]:
    """Entries in order, so many together that their pooled features fit into `GROUP_BYTES`, or a single one."""
    groups: list[list[int]] = []
    taken = 0
    for entry, width in enumerate(widths):
        size = 4 * answers * width
        if not groups or taken + size > GROUP_BYTES:
            groups.append([])
            taken = 0
        groups[-1].append(entry)
        taken += size
    return groups


def _read(store: Store, entries: Sequence[int], responses: Tensor, pool: str) -> tuple[Tensor, Tensor]:
    """float32 deviations over all tokens, and the pooled features `[responses, features]`, of some entries."""
    part = store.part(entries)
    keep = torch.full((len(responses),), pool == "mean")
    statistics, pooled = survey(part, responses, keep, torch.device("cpu"))
    if pool == "last":
        last = []
        for some in parts(responses, part.lengths):
            values, cu_seqlens = part.batch(some)
            last.append(torch.cat([entry[cu_seqlens[1:] - 1].float() for entry in values], dim=1))
        pooled = torch.cat(last)
    inverse = statistics.inverse_deviation
    return torch.where(inverse > 0, 1 / inverse, 0.0).float(), pooled


def _out_of_fold(
    values: np.ndarray, correct: np.ndarray, splits: Sequence[tuple[np.ndarray, np.ndarray]], dimensions: int
) -> tuple[np.ndarray, int]:
    """For each answer the log-odds of being right, by the discriminant that has not seen its problem."""
    from sklearn.decomposition import PCA
    from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    kept = min(dimensions, values.shape[1], *(len(train) - 1 for train, _ in splits))
    scores = np.empty(len(values))
    for train, test in splits:
        # By default the SVD may be randomised: a seed makes the figures those of every run.
        # Without shrinkage a discriminant drops the directions in which answers of one kind do not vary at all.
        discriminant = LinearDiscriminantAnalysis(solver="lsqr", shrinkage="auto")
        pipeline: Any = make_pipeline(StandardScaler(), PCA(kept, random_state=0), discriminant)
        if (values[train] == values[train[0]]).all():
            # Nothing varies, and a discriminant would divide by it: the prior is all there is to know.
            scores[test] = math.log(correct[train].mean() / (1 - correct[train].mean()))
            continue
        scores[test] = pipeline.fit(values[train], correct[train]).decision_function(values[test])
    return scores, kept


class _Bootstrap:
    """Figures of answers' scores, with intervals from drawing problems, the same ones for every set of scores."""

    def __init__(self, correct: np.ndarray, problem: np.ndarray, problems: int) -> None:
        self.correct, self.problem, self.problems = correct, problem, problems
        generator = np.random.default_rng(0)
        drawn = generator.multinomial(problems, np.full(problems, 1 / problems), size=RESAMPLES)
        # How often each problem counts; in the first row once, which gives the figure itself.
        self.weights = np.vstack([np.ones(problems), drawn])
        self.right, self.wrong = self._count(correct), self._count(~correct)
        self.own = [np.flatnonzero(problem == index) for index in range(problems)]

    def estimates(self, scores: np.ndarray) -> tuple[Estimate, Estimate, Estimate, Estimate]:
        """Accuracy, balanced accuracy, AUC and within-problem AUC."""
        above = scores > 0
        right = self.weights @ self._count(above & self.correct)
        wrong = self.weights @ self._count(~above & ~self.correct)
        all_right, all_wrong = self.weights @ self.right, self.weights @ self.wrong
        # A draw of problems may hold answers of one kind alone, and is then left out where both are needed.
        with np.errstate(invalid="ignore", divide="ignore"):
            accuracy = (right + wrong) / (all_right + all_wrong)
            balanced = (right / all_right + wrong / all_wrong) / 2
            in_order = ((self.weights @ self._pairs(scores)) * self.weights).sum(axis=1)
            auc = in_order / (all_right * all_wrong)
        within = [metrics.within_problem_auc(scores[own].tolist(), self.correct[own].tolist()) for own in self.own]
        return _estimate(accuracy), _estimate(balanced), _estimate(auc), metrics.estimate(within)

    def _pairs(self, scores: np.ndarray) -> np.ndarray:
        """`[problems, problems]`: pairs of a right answer to the one and a wrong one to the other, in order; ties half.

        With it the AUC of any draw is a sum over pairs of problems, at no cost for the answers.
        """
        right, owner = scores[self.correct], self.problem[self.correct]
        pairs = np.zeros((self.problems, self.problems))
        for other in range(self.problems):
            own = self.own[other]
            wrong = np.sort(scores[own][~self.correct[own]])
            below = np.searchsorted(wrong, right, "left") + np.searchsorted(wrong, right, "right")
            pairs[:, other] = np.bincount(owner, below / 2, self.problems)
        return pairs

    def _count(self, answers: np.ndarray) -> np.ndarray:
        return np.bincount(self.problem, answers, self.problems)


def _estimate(values: np.ndarray) -> Estimate:
    tail = (1 - metrics.CONFIDENCE) / 2
    low, high = np.nanquantile(values[1:], [tail, 1 - tail])
    return Estimate(float(values[0]), float(low), float(high))
