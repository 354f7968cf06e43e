"""Fitting heads to stored features: one head, or many that share every read of the data.

A head is trained on standardised features (unless its recipe says otherwise) and always holds the folded weights, those
that read features as the model leaves them. What is validated is, bit for bit, what is returned, unless the recipe says
to refit: then a head trained in the same way on all problems is, and what was validated stands beside it.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from swift_kernels.head import SwiftHead
from swift_kernels.training import resume
from swift_kernels.training.recipe import RECIPES, Recipe
from swift_kernels.training.split import Example, NothingToLearnError, check_learnable, hold_back
from swift_kernels.training.standardize import StoredFeatures
from swift_kernels.training.sweep import Epoch, Plan, Sweep

__all__ = [
    "RECIPES",
    "Epoch",
    "Example",
    "Fit",
    "NothingToLearnError",
    "Recipe",
    "check_learnable",
    "fit",
    "fit_heads",
    "hold_back",
]


@dataclass(frozen=True)
class Fit:
    """How a fit went.

    Attributes:
        history: every epoch; with a ridge start, epoch 0 is that start.
        best: the best epoch by what the recipe stops on.
        kept: the epoch whose weights are kept; refitted, the head was trained as many epochs.
        validation_keys: the problems that have an answer on the held-out side.
        stopped_early: whether patience ended it, not the number of epochs.
        penalty: of the ridge start, as in `standardize.PENALTIES`.
        validated: the head that was validated; None where it is the one that is returned.
    """

    history: list[Epoch]
    best: Epoch
    kept: Epoch
    validation_keys: set[str]
    stopped_early: bool
    penalty: float | None
    validated: SwiftHead | None = field(compare=False)


def fit(
    head: SwiftHead,
    activations: StoredFeatures,
    examples: Sequence[Example],
    recipe: Recipe,
    on_epoch: Callable[[Epoch, Epoch], None] | None = None,
    checkpoint: Path | None = None,
) -> Fit:
    """Trains one head in place; see `fit_heads`. `on_epoch` is called with each epoch and the best so far."""

    def report(index: int, epoch: Epoch, best: Epoch) -> None:
        if on_epoch is not None:
            on_epoch(epoch, best)

    return fit_heads([head], activations, examples, [recipe], on_epoch=report, checkpoint=checkpoint)[0]


def fit_heads(
    heads: Sequence[SwiftHead],
    activations: StoredFeatures,
    examples: Sequence[Example],
    recipes: Sequence[Recipe],
    *,
    layers: Sequence[int] | None = None,
    on_epoch: Callable[[int, Epoch, Epoch], None] | None = None,
    checkpoint: Path | None = None,
) -> list[Fit]:
    """Trains heads in place, each by its own recipe and as if it were alone, up to rounding.

    Heads whose recipes read the same candidates in the same order (`Recipe.reading`: split, seed, batch size, kind of
    loss) share one pass over the data an epoch; the others take turns.

    Args:
        heads: of any layers that are stored, with and without gate, on one device.
        activations: stored features of the responses that `examples` name.
        recipes: one a head.
        layers: which layers the stored entries are, in order; needed where a head reads some of them alone.
        on_epoch: called with the head's index, each epoch and the best so far.
        checkpoint: a file that holds the state after every epoch. Where it exists already, the fit goes on from there
            and ends bit for bit as if it had not been interrupted. `resume.remove` it once the heads are saved.

    Raises:
        NothingToLearnError: the answers are all right or all wrong, there are too few problems, or features are NaN.
        ResumeError: the checkpoint is of another fit.
    """
    if not heads or len(heads) != len(recipes):
        raise ValueError(f"{len(heads)} heads and {len(recipes)} recipes: expected one recipe a head")
    if len({head.weight.device for head in heads}) > 1 or len({id(head) for head in heads}) < len(heads):
        raise ValueError("heads are on several devices, or one is there twice: expected distinct heads on one device")
    entries = [_entries(head, activations, layers) for head in heads]
    check_learnable([example.correct for example in examples])
    empty = sum(not activations.lengths[example.response] for example in examples)
    if empty:
        raise NothingToLearnError(f"{empty} of {len(examples)} answers have no scored token: leave them out")

    identity = _identity(heads, activations, examples, recipes, layers) if checkpoint is not None else {}
    saved = None if checkpoint is None else resume.load(checkpoint, identity)
    plans: dict[tuple, list[int]] = {}
    for index, recipe in enumerate(recipes):
        plans.setdefault(recipe.reading, []).append(index)
    sweeps: dict[str, Sweep] = {}

    def run(name: str, members: Sequence[int], found: Sequence[Plan] | None = None) -> Sweep:
        sweep = Sweep(
            [heads[index] for index in members],
            [recipes[index] for index in members],
            [entries[index] for index in members],
            activations,
            examples,
            found,
        )
        sweeps[name] = sweep
        if saved is not None and name in saved[1]:
            prefix = f"{name}/"
            own = {key.removeprefix(prefix): tensor for key, tensor in saved[0].items() if key.startswith(prefix)}
            sweep.restore(own, saved[1][name])
        for ended in sweep.run():
            if checkpoint is not None:
                _save(checkpoint, sweeps, identity)
            if on_epoch is not None:
                for member, epoch, best in ended:
                    on_epoch(members[member], epoch, best)
        return sweep

    fits: dict[int, Fit] = {}
    for number, members in enumerate(plans.values()):
        sweep = run(str(number), members)
        refit: list[int] = []
        found: list[Plan] = []
        for index, own in zip(members, sweep.runs, strict=True):
            validated = None
            if recipes[index].refit:
                refit.append(index)
                found.append(Plan(own.start, own.kept.number))
                validated = copy.deepcopy(heads[index])
                weight, bias = sweep.kept(own)
                validated.load_state_dict({"weight": weight, "bias": bias})
                validated.requires_grad_(False)
            fits[index] = Fit(
                own.history,
                own.best,
                own.kept,
                sweep.split.validation_keys,
                own.stopped_early,
                None if own.start is None else own.start.penalty,
                validated,
            )
        if refit:
            run(f"{number} refit", refit, found)
    # All heads change at the end, or none where something was wrong; a refit comes after its first fit.
    for sweep in sweeps.values():
        sweep.finish()
    return [fits[index] for index in range(len(heads))]


def _save(path: Path, sweeps: dict[str, Sweep], identity: dict[str, object]) -> None:
    tensors: dict[str, Tensor] = {}
    facts: dict[str, Any] = {}
    for name, sweep in sweeps.items():
        own, facts[name] = sweep.state()
        tensors |= {f"{name}/{key}": tensor for key, tensor in own.items()}
    resume.save(path, tensors, facts, identity)


def _entries(head: SwiftHead, activations: StoredFeatures, layers: Sequence[int] | None) -> tuple[int, ...]:
    """Which of the stored entries the head reads."""
    own = head.config.layers
    if layers is None or own is None:
        entries = tuple(range(len(activations.widths)))
    elif set(own) <= set(layers):
        entries = tuple(list(layers).index(layer) for layer in own)
    else:
        raise ValueError(f"the head reads layers {list(own)}, stored are {list(layers)}")
    widths = tuple(activations.widths[entry] for entry in entries)
    if widths != head.config.widths:
        raise ValueError(f"the head reads widths {list(head.config.widths)}, stored are {list(widths)}")
    return entries


def _identity(
    heads: Sequence[SwiftHead],
    activations: StoredFeatures,
    examples: Sequence[Example],
    recipes: Sequence[Recipe],
    layers: Sequence[int] | None,
) -> dict[str, object]:
    """What makes a fit this one and no other, flat, for `resume`."""
    content = [[example.response, example.correct, example.key] for example in examples]
    first = activations.batch(torch.tensor([examples[0].response]))[0]
    return {
        **{f"recipe {index}: {k}": v for index, recipe in enumerate(recipes) for k, v in asdict(recipe).items()},
        **{
            f"head {index}: {name}": value
            for index, head in enumerate(heads)
            for name, value in head.config.to_dict().items()
            if name not in ("task", "metrics", "base_model")
        },
        "number of heads": len(heads),
        "layers": None if layers is None else list(layers),
        "number of answers": len(examples),
        "answers": _digest(json.dumps(content).encode()),
        "tokens": _digest(json.dumps(list(activations.lengths)).encode()),
        # float32 holds every dtype that features are stored in.
        "first features": _digest(*(entry.float().contiguous().numpy().tobytes() for entry in first)),
    }


def _digest(*parts: bytes) -> str:
    return hashlib.sha256(b"".join(parts)).hexdigest()[:16]
