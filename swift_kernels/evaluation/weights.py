"""Where a head's weight lies: its share on each entry, as it is and scaled by how far the features spread."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from swift_kernels.head import SwiftHead


@dataclass(frozen=True)
class EntryWeight:
    """The shares of one entry: of the squared norm of all gate weights, and of all reward weights.

    `entry` is the layer, or the name of another source; `gate` is None for a head without one.
    """

    entry: int | str
    gate: float | None
    reward: float


def weight_mass(head: SwiftHead, deviation: Tensor | None = None) -> list[EntryWeight]:
    """The share of each entry of a head; shares of gate and of reward add up to 1 each, or are all 0 for weights of 0.

    Features differ a thousandfold in size, and a large weight on one that hardly moves does little: with `deviation`,
    float `[features]`, the standard deviation of each, |weight| * deviation counts in place of |weight|.
    """
    weight = head.weight.detach().double().cpu()
    if deviation is not None:
        if tuple(deviation.shape) != (weight.shape[1],):
            raise ValueError(f"deviation has shape {list(deviation.shape)}: expected [{weight.shape[1]}]")
        weight = weight * deviation.double()
    mass = torch.stack([part.square().sum(dim=1) for part in weight.split(head.config.widths, dim=1)], dim=1)
    total = mass.sum(dim=1, keepdim=True)
    shares = torch.where(total > 0, mass / total, 0.0).tolist()
    gates: Sequence[float | None] = shares[0] if head.config.gate else [None] * len(shares[-1])
    return [
        EntryWeight(entry, gate, reward)
        for entry, gate, reward in zip(entry_names(head), gates, shares[-1], strict=True)
    ]


def entry_names(head: SwiftHead) -> Sequence[int | str]:
    """The layers that a head reads, or its other source; numbers where it was made for no model."""
    config = head.config
    if config.layers is not None:
        return config.layers
    return [config.features] if len(config.widths) == 1 else range(len(config.widths))
