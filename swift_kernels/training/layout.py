"""What an activation store keeps of every scored token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from swift_kernels.features import FEATURE_SOURCES, FROM_LOGITS, HIDDEN_STATES
from swift_kernels.head import HeadConfig, SwiftHead
from swift_kernels.training.sketch import METHODS

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class StoreError(ValueError):
    """An activation store that cannot be used; the message names the file, and what to do."""


@dataclass(frozen=True)
class Layout:
    """What a store keeps of every scored token.

    Attributes:
        features: the sources, as in `HeadConfig`, in the order of `FEATURE_SOURCES`.
        widths: of the entries as the model computes them: one a layer, then one for each other source.
        layers: indices of the hidden states in Hugging Face's `hidden_states`; None where none are kept.
        num_hidden_layers: of the model, where layers are given.
        span: which tokens count.
        dtype: that values are stored in. float16 would overflow on the massive activations that many models have.
        sketch: how entries are sketched ({"method": "pca", "dimensions": 64}), or None.
    """

    features: tuple[str, ...]
    widths: tuple[int, ...]
    layers: tuple[int, ...] | None = None
    num_hidden_layers: int | None = None
    span: str = "fed"
    dtype: str = "bfloat16"
    sketch: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "widths", tuple(self.widths))
        object.__setattr__(self, "layers", None if self.layers is None else tuple(self.layers))
        object.__setattr__(self, "features", tuple(self.features))
        if not self.features or self.features != tuple(name for name in FEATURE_SOURCES if name in self.features):
            raise StoreError(f"features is {self.features!r}: expected some of {', '.join(FEATURE_SOURCES)}, in order")
        if len(self.entries) != len(self.widths):
            raise StoreError(f"{len(self.widths)} widths for the entries {list(self.entries)}: expected one each")
        if self.dtype not in DTYPES:
            raise StoreError(f"the store's dtype is {self.dtype!r}: expected one of {', '.join(DTYPES)}")

    @staticmethod
    def read(raw: Any) -> Layout:
        """The layout that a file speaks of.

        Raises:
            TypeError, ValueError: it is none.
        """
        if not isinstance(raw, dict):
            raise TypeError(f"the layout is a {type(raw).__name__}: expected an object")
        layout = Layout(**raw)
        sizes = (*layout.widths, *(layout.layers or ()), layout.num_hidden_layers or 0)
        if not layout.widths or any(type(size) is not int for size in sizes):
            raise TypeError(f"widths, layers and num_hidden_layers are {list(sizes)}: expected whole numbers")
        if layout.sketch is not None:
            parse_sketch(f"{layout.sketch['method']}:{layout.sketch['dimensions']}", max(layout.widths))
        # What a head of each source may be is known there: its layers, its span, its width.
        depth = len(layout.layers or ())
        if HIDDEN_STATES in layout.features:
            count = layout.num_hidden_layers
            HeadConfig(layout.widths[:depth], HIDDEN_STATES, layout.layers, count, span=layout.span)
        for width, name in zip(layout.widths[depth:], layout.entries[depth:], strict=True):
            HeadConfig((width,), str(name), span=layout.span)
        return layout

    @property
    def entries(self) -> tuple[int | str, ...]:
        """What the entries are: layers, and the names of other sources."""
        return *(self.layers or ()), *(name for name in self.features if name != HIDDEN_STATES)

    @property
    def stored_widths(self) -> tuple[int, ...]:
        """Of the entries as they are stored: a sketch leaves alone what is no wider than itself."""
        if self.sketch is None:
            return self.widths
        return tuple(min(width, self.sketch["dimensions"]) for width in self.widths)

    def nbytes(self, tokens: int) -> int:
        return tokens * sum(self.stored_widths) * DTYPES[self.dtype].itemsize


def make_layout(
    model: Any, layers: str | Sequence[int | str], dtype: str = "bfloat16", sketch: str | None = None
) -> Layout:
    """The layout of a store for a model.

    Args:
        layers: as in `SwiftHead.for_model`, or a list of layers, or "all", and of other sources: ["all", "logits"].
        sketch: "random:64" or "pca:64", the number of dimensions an entry; None keeps entries whole.
    """
    wanted = [layers] if isinstance(layers, str) else list(layers)
    chosen = [layer for layer in wanted if layer not in FROM_LOGITS]
    selections: list[Any] = [chosen[0] if chosen in (["all"], [HIDDEN_STATES]) else chosen] if chosen else []
    selections += [source for source in FROM_LOGITS if source in wanted]
    configs = [SwiftHead.for_model(model, selection).config for selection in selections]
    if not configs:
        raise StoreError("there is nothing to store: expected layers, logits or top_logprobs")
    widths = tuple(width for config in configs for width in config.widths)
    return Layout(
        tuple(config.features for config in configs),
        widths,
        configs[0].layers,
        configs[0].num_hidden_layers if chosen else None,
        configs[0].span,
        dtype,
        None if sketch is None else parse_sketch(sketch, max(widths)),
    )


def parse_sketch(text: str, width: int) -> dict[str, Any]:
    """ "pca:64" as a layout holds it."""
    method, _, dimensions = text.partition(":")
    if method not in METHODS or not dimensions.isdecimal() or not 1 <= int(dimensions) <= width:
        raise StoreError(
            f"the sketch is {text!r}: expected {' or '.join(f'{each}:K' for each in METHODS)}, K from 1 to {width}"
        )
    return {"method": method, "dimensions": int(dimensions)}
