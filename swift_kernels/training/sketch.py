"""Sketches: each entry projected to a few dimensions, for stores that would not fit whole.

A head is linear, so one that was fitted to sketches folds back into a head of the full width: with z = P^T (x - m),
w z + b is (w P^T) x + (b - w P^T m).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from swift_kernels import files

METHODS = ("random", "pca")

PILOT_PROBLEMS = 32
"""Whose activations a PCA sketch is made from."""


@dataclass(frozen=True)
class Sketch:
    """One projection an entry; an entry that is no wider than the sketch is kept as it is.

    Attributes:
        projections: float32 `[width, dimensions]` of each entry.
        means: float32 `[width]` of each entry, subtracted first.
    """

    projections: list[Tensor]
    means: list[Tensor]

    @property
    def widths(self) -> tuple[int, ...]:
        """Of the sketched entries."""
        return tuple(projection.shape[1] for projection in self.projections)

    def apply(self, k: int, entry: Tensor) -> Tensor:
        """float32 `[rows, dimensions]` of the k-th entry `[rows, width]`."""
        return (entry.float() - self.means[k].to(entry.device)) @ self.projections[k].to(entry.device)

    def fold(self, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """A linear layer over sketches as one over the entries themselves, in float64.

        Args:
            weight: `[outputs, sum of the sketched widths]`.
            bias: `[outputs]`.
        """
        columns, shift = [], bias.double().clone()
        parts = weight.double().split(self.widths, dim=1)
        for part, projection, mean in zip(parts, self.projections, self.means, strict=True):
            full = part @ projection.double().to(weight.device).T
            columns.append(full)
            shift -= full @ mean.double().to(weight.device)
        return torch.cat(columns, dim=1), shift

    def equals(self, other: Sketch) -> bool:
        mine, theirs = self.projections + self.means, other.projections + other.means
        return len(mine) == len(theirs) and all(map(torch.equal, mine, theirs))

    def save(self, path: Path) -> None:
        tensors = {f"projection.{k}": tensor for k, tensor in enumerate(self.projections)}
        tensors |= {f"mean.{k}": tensor for k, tensor in enumerate(self.means)}
        files.write_tensors(path, tensors)

    @staticmethod
    def load(path: Path) -> Sketch:
        from safetensors.torch import load_file

        tensors = load_file(path)
        entries = range(len(tensors) // 2)
        return Sketch([tensors[f"projection.{k}"] for k in entries], [tensors[f"mean.{k}"] for k in entries])


def random_sketch(widths: Sequence[int], dimensions: int, seed: int = 0) -> Sketch:
    """Gaussian projections (Johnson-Lindenstrauss), the same for the same widths and seed on every machine."""
    _check_dimensions(widths, dimensions)
    generator = torch.Generator().manual_seed(seed)
    projections = [
        torch.randn(width, dimensions, generator=generator) / dimensions**0.5
        if width > dimensions
        else torch.eye(width)
        for width in widths
    ]
    return Sketch(projections, [torch.zeros(width) for width in widths])


def pca_sketch(pilot: Sequence[Tensor], dimensions: int) -> Sketch:
    """The directions in which a pilot's hidden states vary most, scaled to unit variance.

    Args:
        pilot: `[tokens, width]` of each entry.
        dimensions: to keep; at most the number of tokens less one.
    """
    _check_dimensions([entry.shape[1] for entry in pilot], dimensions)
    tokens = pilot[0].shape[0]
    if tokens <= dimensions:
        raise ValueError(
            f"the pilot has {tokens} tokens for a sketch of {dimensions} dimensions: expected more tokens than "
            "dimensions; take a larger pilot or a smaller sketch"
        )
    projections, means = [], []
    for entry in pilot:
        if entry.shape[1] <= dimensions:
            projections.append(torch.eye(entry.shape[1]))
            means.append(torch.zeros(entry.shape[1]))
            continue
        values = entry.double()
        mean = values.mean(0)
        _, singular, directions = torch.linalg.svd(values - mean, full_matrices=False)
        deviation = (singular / (tokens - 1) ** 0.5)[:dimensions].clamp_min(torch.finfo(torch.float32).tiny)
        # An entry that varies in fewer directions keeps zeros for the others instead of amplified rounding.
        scale = torch.where(deviation > 1e-6 * deviation[0], 1 / deviation, torch.zeros_like(deviation))
        projections.append((directions[:dimensions].T * scale).float().contiguous())
        means.append(mean.float())
    return Sketch(projections, means)


def _check_dimensions(widths: Sequence[int], dimensions: int) -> None:
    if not 1 <= dimensions <= max(widths):
        raise ValueError(f"the sketch has {dimensions} dimensions: expected 1..{max(widths)}, the greatest width")
