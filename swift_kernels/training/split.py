"""Which candidates train a head and which are held back, and the order in which they are read."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from swift_kernels.training.losses import GROUPED, taking_part
from swift_kernels.training.recipe import Recipe


class NothingToLearnError(ValueError):
    """The rollouts cannot train a head; the message says why, with counts."""


@dataclass(frozen=True)
class Example:
    """A graded response: its index in the activations, its grade, and the key of its problem."""

    response: int
    correct: bool
    key: str


@dataclass(frozen=True)
class Split:
    """int64 indices of the examples on each side, and the keys of all problems that have one on the held-out side."""

    train: Tensor
    validation: Tensor
    validation_keys: set[str]


def check_learnable(labels: Sequence[bool]) -> None:
    """Raises when there is no right or no wrong answer."""
    right = sum(labels)
    if not labels:
        raise NothingToLearnError("there is no answer with a scored token: every one ended at its first")
    if right in (0, len(labels)):
        which = "wrong" if right == 0 else "right"
        raise NothingToLearnError(
            f"all {len(labels)} answers are {which}: a head learns from right and wrong ones; choose easier or harder "
            "problems, or a higher temperature"
        )


def hold_back(keys: Sequence[str], fraction: float, seed: int) -> set[str]:
    """The keys that go to the validation side: `fraction` of them, at least one, never all."""
    distinct = sorted(set(keys))
    if len(distinct) < 2:
        raise NothingToLearnError(f"there is {len(distinct)} problem: expected at least 2, one of them to validate on")
    random.Random(seed).shuffle(distinct)
    return set(distinct[: min(max(1, round(fraction * len(distinct))), len(distinct) - 1)])


def split_examples(examples: Sequence[Example], recipe: Recipe) -> Split:
    """Holds back a share of the problems, or, split by candidate, of the examples as the authors' code does.

    Raises:
        NothingToLearnError: the answers are all alike, on the training side or on both; there are fewer than two
            problems; or no problem has right and wrong answers on a side where the recipe compares them.
    """
    check_learnable([example.correct for example in examples])
    keys = hold_back([example.key for example in examples], recipe.validation, recipe.seed)
    if recipe.split == "candidate":
        order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(recipe.seed))
        train = order[: min(max(1, int(len(examples) * (1 - recipe.validation))), len(examples) - 1)]
        held_out = set(range(len(examples))) - set(train.tolist())
        keys = {examples[index].key for index in held_out}
    else:
        held_out = {index for index, example in enumerate(examples) if example.key in keys}
    train_indices = [index for index in range(len(examples)) if index not in held_out]
    right = sum(examples[index].correct for index in train_indices)
    if right in (0, len(train_indices)):
        raise NothingToLearnError(
            f"all {len(train_indices)} answers on the training side of the split are alike: more problems are needed"
        )
    problems, mixed = _mixed(examples, train_indices)
    if recipe.loss in GROUPED and not mixed:
        raise NothingToLearnError(
            f"none of the {problems} problems on the training side of the split has right and wrong answers, which the "
            f"loss {recipe.loss!r} compares: more answers a problem, or the loss 'bce'"
        )
    problems, mixed = _mixed(examples, held_out)
    if (recipe.stop == "auc" or recipe.start == "ridge") and not mixed:
        raise NothingToLearnError(
            f"none of the {problems} held-out problems has right and wrong answers, so there is no AUC within "
            "problems to watch: more answers a problem, or start 'random' and stop by 'loss'"
        )
    return Split(torch.tensor(train_indices), torch.tensor(sorted(held_out)), keys)


def _mixed(examples: Sequence[Example], indices: Iterable[int]) -> tuple[int, int]:
    """How many problems the examples have, and how many of these have right and wrong ones."""
    kinds: dict[str, set[bool]] = {}
    for index in indices:
        kinds.setdefault(examples[index].key, set()).add(examples[index].correct)
    return len(kinds), sum(len(kind) == 2 for kind in kinds.values())


def epoch_batches(train: Tensor, labels: Tensor, group: Tensor, recipe: Recipe, epoch: int) -> list[Tensor]:
    """The example indices of each step of an epoch, shuffled by (seed, epoch) alone.

    Args:
        train: the training side of the split.
        labels, group: of all examples.
    """
    train = train[taking_part(recipe.loss, labels[train], group[train])]
    generator = torch.Generator().manual_seed(random.Random(f"{recipe.seed}/{epoch}").getrandbits(63))
    if recipe.loss not in GROUPED:
        return list(train[torch.randperm(len(train), generator=generator)].split(recipe.batch_size))
    order = group[train].argsort(stable=True)
    problems = train[order].split(group[train].unique(return_counts=True)[1].tolist())
    batches: list[list[Tensor]] = []
    room = 0
    for index in torch.randperm(len(problems), generator=generator).tolist():
        if not batches or len(problems[index]) > room:
            batches.append([])
            room = recipe.batch_size
        batches[-1].append(problems[index])
        room -= len(problems[index])
    return [torch.cat(batch) for batch in batches]
