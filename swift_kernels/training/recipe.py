"""How a head is trained: every choice, and the two recipes that have names."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from swift_kernels.training.losses import GROUPED, PAIRED, get_loss

CHOICES = {
    "start": ("ridge", "random"),
    "split": ("problem", "candidate"),
    "stop": ("auc", "loss"),
    "keep": ("best", "last"),
}


@dataclass(frozen=True)
class Recipe:
    """Every choice of a fit.

    Attributes:
        loss: one of `losses.LOSSES`.
        learning_rate: of AdamW, which moves every weight by about that much a step; so a score moves with the number of
            features times as much.
        batch_size: candidates a step. Losses that compare candidates take whole problems, as many as fit, at least one.
        patience: epochs without a better value of `stop` before it ends.
        validation: share that is held back to stop early.
        seed: of the split, the shuffles and a random start.
        standardize: train on features of mean 0 and deviation 1, and fold both into the weights.
        start: "ridge", a ridge regression of the labels on the candidates' mean features, or "random".
        split: "problem", all candidates of a problem on one side, or "candidate".
        stop: what is watched on the held-out side, "auc" (within problems) or "loss".
        keep: the weights of the "best" epoch by `stop`, or of the "last".
        refit: train once more on all problems, those held back too, from the same start for as many epochs.
        gate_pace: learning rate of the gate, relative to the reward's.
    """

    loss: str = "dpo"
    learning_rate: float = 1e-5
    weight_decay: float = 1e-5
    batch_size: int = 16
    epochs: int = 40
    patience: int = 5
    validation: float = 0.2
    seed: int = 0
    standardize: bool = True
    start: str = "ridge"
    split: str = "problem"
    stop: str = "auc"
    keep: str = "best"
    refit: bool = True
    gate_pace: float = 0.1

    def __post_init__(self) -> None:
        get_loss(self.loss)
        for name in ("batch_size", "epochs", "patience"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: expected at least 1")
        for name in ("learning_rate", "weight_decay"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}: expected a number, not negative")
        if not 0 < self.gate_pace < math.inf:
            raise ValueError(f"gate_pace is {self.gate_pace}: expected a number above 0; 1 is the reward's own pace")
        if not 0 < self.validation < 1:
            raise ValueError(f"validation is {self.validation}: expected a share between 0 and 1")
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} is {getattr(self, name)!r}: expected {' or '.join(map(repr, choices))}")
        if self.start == "ridge" and not self.standardize:
            raise ValueError("start is 'ridge' but standardize is off: a ridge penalty needs features of one scale")

    @property
    def reading(self) -> tuple[Any, ...]:
        """What decides which candidates are read in which order: heads that share it share every read."""
        unit = "pair" if self.loss in PAIRED else "problem" if self.loss in GROUPED else "candidate"
        return unit, self.split, self.validation, self.seed, self.batch_size


RECIPES = {
    "swift": Recipe(),
    # The authors' code to the letter (train/extract_train.py): raw features, and the last epoch, because their "best
    # model" is an alias of the model that goes on training. Their DPO splits pairs; here as everywhere, candidates.
    "upstream": Recipe(
        loss="bce",
        learning_rate=1e-4,
        weight_decay=1e-5,
        batch_size=16,
        epochs=40,
        patience=3,
        validation=0.2,
        standardize=False,
        start="random",
        split="candidate",
        stop="loss",
        keep="last",
        refit=False,
        gate_pace=1.0,
    ),
}
"""By name: this package's default, and the one of arXiv 2505.12225."""


def get_recipe(name: str, **changes: Any) -> Recipe:
    """A recipe by name, with the fields changed that are given and not None."""
    if name not in RECIPES:
        raise ValueError(f"recipe is {name!r}: expected one of {', '.join(RECIPES)}")
    return replace(RECIPES[name], **{field: value for field, value in changes.items() if value is not None})
