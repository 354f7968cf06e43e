"""Fitting a head with the authors' recipe, and without its defects: the split is by problem, the best epoch is kept."""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional

from swift_kernels.head import SwiftHead
from swift_kernels.training.activations import Activations


class NothingToLearnError(ValueError):
    """The rollouts cannot train a head; the message says why, with counts."""


@dataclass(frozen=True)
class Recipe:
    """Hyperparameters, by default those of arXiv 2505.12225.

    Attributes:
        batch_size: candidates a step.
        patience: epochs without a better validation loss before it stops.
        validation: share of the problems that is held back for early stopping.
    """

    learning_rate: float = 1e-4
    weight_decay: float = 1e-5
    batch_size: int = 16
    epochs: int = 40
    patience: int = 3
    validation: float = 0.2
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("batch_size", "epochs", "patience"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: expected at least 1")
        for name in ("learning_rate", "weight_decay"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}: expected a number, not negative")
        if not 0 < self.validation < 1:
            raise ValueError(f"validation is {self.validation}: expected a share between 0 and 1")


@dataclass(frozen=True)
class Example:
    """A graded response: its index in the activations, its grade, and the key of its problem."""

    response: int
    correct: bool
    key: str


@dataclass(frozen=True)
class Epoch:
    number: int
    train_loss: float
    validation_loss: float


@dataclass(frozen=True)
class Fit:
    """How a fit went: every epoch, the best one, and the keys of the problems that were held back."""

    history: list[Epoch]
    best: Epoch
    validation_keys: set[str]


def fit(
    head: SwiftHead,
    activations: Activations,
    examples: Sequence[Example],
    recipe: Recipe,
    on_epoch: Callable[[Epoch, Epoch], None] | None = None,
) -> Fit:
    """Trains `head` in place: binary cross-entropy on the pooled score, AdamW, and the weights of the best epoch.

    Examples of one key stay on one side of the split. `on_epoch` is called with each epoch and the best so far.

    Raises:
        NothingToLearnError: there is no right or no wrong response, or fewer than two problems.
    """
    check_learnable([example.correct for example in examples])
    validation_keys = hold_back([example.key for example in examples], recipe.validation, recipe.seed)
    train = [index for index, example in enumerate(examples) if example.key not in validation_keys]
    validation = [index for index, example in enumerate(examples) if example.key in validation_keys]
    if len({examples[index].correct for index in train}) < 2:
        raise NothingToLearnError(
            f"all {len(train)} answers on the training side of the split are alike: more problems are needed"
        )
    device = head.weight.device
    generator = torch.Generator().manual_seed(recipe.seed)
    with torch.random.fork_rng():
        torch.manual_seed(recipe.seed)
        head.reset_parameters()
    head.requires_grad_(True)
    optimizer = torch.optim.AdamW(head.parameters(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay)
    responses = torch.tensor([example.response for example in examples])
    targets = torch.tensor([float(example.correct) for example in examples])
    train_indices, validation_indices = torch.tensor(train), torch.tensor(validation)

    def loss(indices: torch.Tensor) -> torch.Tensor:
        scores = head(*activations.batch(responses[indices], device))
        return functional.binary_cross_entropy_with_logits(scores, targets[indices].to(device))

    history: list[Epoch] = []
    best: Epoch | None = None
    best_weights = head.state_dict()
    for number in range(1, recipe.epochs + 1):
        total = 0.0
        shuffled = train_indices[torch.randperm(len(train), generator=generator)]
        for indices in shuffled.split(recipe.batch_size):
            optimizer.zero_grad()
            value = loss(indices)
            value.backward()
            optimizer.step()
            total += value.item() * len(indices)
        with torch.no_grad():
            held_out = sum(loss(part).item() * len(part) for part in validation_indices.split(recipe.batch_size))
        epoch = Epoch(number, total / len(train), held_out / len(validation))
        history.append(epoch)
        if not math.isfinite(epoch.train_loss + epoch.validation_loss):
            raise NothingToLearnError(
                f"the loss is {epoch.train_loss} in epoch {number}: lower the learning rate, or look for NaN in the "
                "model's hidden states"
            )
        if best is None or epoch.validation_loss < best.validation_loss:
            best, best_weights = epoch, copy.deepcopy(head.state_dict())
        if on_epoch is not None:
            on_epoch(epoch, best)
        if number - best.number >= recipe.patience:
            break
    assert best is not None
    head.load_state_dict(best_weights)
    head.requires_grad_(False)
    return Fit(history, best, validation_keys)


def hold_back(keys: Sequence[str], fraction: float, seed: int) -> set[str]:
    """The keys that go to the validation side: `fraction` of them, at least one, never all."""
    distinct = sorted(set(keys))
    if len(distinct) < 2:
        raise NothingToLearnError(f"there is {len(distinct)} problem: expected at least 2, one of them to validate on")
    random.Random(seed).shuffle(distinct)
    return set(distinct[: min(max(1, round(fraction * len(distinct))), len(distinct) - 1)])


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
