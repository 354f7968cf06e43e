"""Scoring inside the model's own RMSNorms, for `attach(..., fuse="norm")`.

In an eager decode step, the norm that takes or returns a selected entry is replaced by one kernel that normalises and
takes the dot products on the way; the last one closes the step. Other RMSNorms of the model become one kernel each as
well. Everywhere else, in a prefill, with gradients, under torch.compile, the stock norm runs, and what is to be scored
there is gathered. Whether a forward is scored here is decided once, as its first layer begins.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor

from swift_kernels import features, schema
from swift_kernels.head import SwiftHead
from swift_kernels.integrations.generation import NotScoredError
from swift_kernels.norms import FusableNorm, find_norms
from swift_kernels.patching import patch
from swift_kernels.state import ScoreState

Buffers = tuple[ScoreState, Tensor, Tensor | None]
"""The state, the slots and the buffer for gates and rewards of the present run."""


class Place(NamedTuple):
    """The place of a norm in a step, as `schema.rms_norm_score` takes it."""

    entry: int
    first_feature: int
    score_output: bool
    last: bool


class Step(NamedTuple):
    """What the norms of a step share, as `schema.rms_norm_score` takes it."""

    weight: Tensor
    bias: Tensor
    slots: Tensor
    sums: Tensor
    token_count: Tensor
    partials: Tensor
    gate_reward: Tensor | None


_STEP: ContextVar[Step | None] = ContextVar("step", default=None)
"""Of the forward that this thread or task runs."""


class NormPath:
    """The fused norms of one attached model.

    Attributes:
        reason: why the selected entries are gathered instead, or None where their norms score.
    """

    def __init__(
        self,
        model: Any,
        head: SwiftHead,
        buffers: Callable[[], Buffers | None],
        closed: Callable[[], None],
        is_read: Callable[[], bool],
    ) -> None:
        """Finds the norms.

        Args:
            buffers: what a forward is scored into; None for one that is not scored inside norms.
            closed: called when a step has been scored.
            is_read: whether the forwards of the present thread or task are the scorer's.

        Raises:
            ValueError: no norm of the model can be fused, or the head reads no hidden states.
        """
        source = head.config.features
        if source in features.FROM_LOGITS:
            raise ValueError(f'fuse="norm" scores inside norms, the head reads {source}: use fuse="gather"')
        norms = find_norms(model)
        found = norms.entries
        if not any(isinstance(norm, FusableNorm) for norm in found):
            raise ValueError(
                f'{type(model).__name__} has no RMSNorm that can score, so fuse="norm" is not possible: {found[0]}; '
                'use fuse="gather"'
            )
        layers = head.config.layers or ()
        self._scored = [norm for norm in (found[index] for index in layers) if isinstance(norm, FusableNorm)]
        missing = [f"hidden_states[{index}]: {found[index]}" for index in layers if isinstance(found[index], str)]
        self.reason = None
        if missing:
            self.reason = f"{len(missing)} of {len(layers)} entries cannot be scored in a norm ({missing[0]})"
        first_features = [0, *itertools.accumulate(head.config.widths)]
        self._places = [
            Place(k, first_features[k], norm.scores_output, k == len(layers) - 1) for k, norm in enumerate(self._scored)
        ]
        self._dtype = self._scored[0].weight.dtype if self._scored else None
        selected = {id(norm.module) for norm in self._scored}
        self._plain = [
            norm
            for norm in (*found, *norms.others)
            if isinstance(norm, FusableNorm) and id(norm.module) not in selected and norm.weight.dtype == self._dtype
        ]
        if self.reason is None and len(selected) != len(self._scored):
            self.reason = "one norm module serves several entries"
        self._head = head
        self._buffers, self._closed, self._is_read = buffers, closed, is_read
        self._layout = features.model_layout(model)
        self._eager_modules = [*self._layout.layers, *(norm.module for norm in self._scored)]
        self._inside = self._left_layers = False
        self._step: Step | None = None
        self._expected: Tensor | None = None
        self._next_entry = 0

    def describe(self) -> str:
        plain = f" and {len(self._plain)} normalise" if self._plain else ""
        return f"{len(self._scored)} RMSNorms score{plain}, one call each"

    def patch(self) -> ExitStack:
        """Fuses the norms, until what is returned is closed."""
        patches = ExitStack()
        if self.reason is None:
            for norm, place in zip(self._scored, self._places, strict=True):
                patches.callback(patch(norm.module, "forward", functools.partial(self._score, norm, place)))
            for norm in self._plain:
                patches.callback(patch(norm.module, "forward", functools.partial(self._normalise, norm)))
            patches.callback(patch(self._layout.layers[0], "forward", self._run_first_layer))
            patches.callback(patch(self._layout.layers[-1], "forward", self._run_last_layer))
            patches.callback(patch(self._layout.decoder, "forward", self._run_decoder))
        return patches

    def scores(self) -> bool:
        """Whether the forward that is running is scored inside the norms."""
        step = self._step
        return step is not None and not torch.compiler.is_compiling() and step is _STEP.get()

    def expect(self, k: int, entry: Tensor) -> None:
        """Told of entry k of a step as the model comes to it.

        Raises:
            NotScoredError: the norm that scores it saw another tensor.
        """
        if not self._scored[k].scores_output:
            self._expected = entry
        else:
            produced, self._expected = self._expected, None
            if entry is not produced:
                self._fail(k, "what its norm returned is not what the model returned")

    def reset(self) -> None:
        """Forgets the forward of the decoder that ended or was broken off."""
        self._inside = self._left_layers = False
        self._step = self._expected = None
        self._next_entry = 0
        _STEP.set(None)

    def warmup(self, hidden_states: Sequence[Tensor], state: ScoreState, slots: Tensor, trace: Tensor | None) -> None:
        """Runs every fused norm once, on rows that are skipped: compiles what a step will need."""
        if self.reason is not None:
            return
        step = self._make_step(state, slots, trace)
        for norm, place, entry in zip(self._scored, self._places, hidden_states, strict=True):
            _normalise_and_score(entry, norm, place, step)
        for norm in self._plain:
            rows = hidden_states[0].new_zeros(slots.shape[0], norm.weight.shape[0])
            schema.rms_norm(rows, norm.weight, norm.eps, norm.unit_offset, norm.round_first)

    def _make_step(self, state: ScoreState, slots: Tensor, gate_reward: Tensor | None) -> Step:
        weight, bias = self._head.weight.detach(), self._head.bias.detach()
        return Step(weight, bias, slots, state.sums, state.token_count, state.partials, gate_reward)

    def _run_decoder(self, stock: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling() or not self._is_read():
            return stock(*args, **kwargs)
        self.reset()
        self._inside = True
        try:
            return stock(*args, **kwargs)
        finally:
            self.reset()

    def _run_first_layer(self, stock: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Decides for the whole forward: never under torch.compile, with gradients, or in another dtype than the norms
        were probed in."""
        if self._inside and not torch.compiler.is_compiling() and self._is_read():
            entry = features.layer_input(args, kwargs)
            if (
                entry.dim() == 3
                and entry.shape[1] == 1
                and entry.dtype == self._dtype
                and not torch.is_grad_enabled()
                and not any(module._compiled_call_impl is not None for module in self._eager_modules)
            ):
                buffers = self._buffers()
                self._step = None if buffers is None else self._make_step(*buffers)
                _STEP.set(self._step)
        return stock(*args, **kwargs)

    def _run_last_layer(self, stock: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        output = stock(*args, **kwargs)
        if not torch.compiler.is_compiling() and self._is_read():
            self._left_layers = True
        return output

    def _score(self, norm: FusableNorm, place: Place, stock: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        # In every norm of every step: between two matrix multiplications little of Python is in the cache, and a call
        # or an attribute more costs several times what it does in a loop.
        k = place.entry
        if kwargs or len(args) != 1 or not self.scores() or k < self._next_entry:
            return stock(*args, **kwargs)
        if place.score_output and not self._left_layers:  # as of an early exit, which looks at a layer's output
            return stock(*args, **kwargs)
        hidden_states = args[0]
        if k != self._next_entry:
            self._fail(k, f"entry {self._next_entry} was to come next")
        if not place.score_output and hidden_states is not self._expected:
            self._fail(k, "its norm does not take what the layer was called with")
        assert self._step is not None
        output = _normalise_and_score(hidden_states[:, 0], norm, place, self._step)[:, None]
        self._expected = output if place.score_output else None
        self._next_entry = k + 1
        if place.last:
            self._closed()
        return output

    def _normalise(self, norm: FusableNorm, stock: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if kwargs or len(args) != 1:
            return stock(*args, **kwargs)
        hidden_states = args[0]
        if (
            hidden_states.dim() != 3  # a norm that reads no entry may be called with anything
            or hidden_states.shape[1] != 1
            or hidden_states.stride(2) != 1
            or hidden_states.dtype != self._dtype
            or not self.scores()
        ):
            return stock(hidden_states)
        rows = hidden_states[:, 0]
        return schema.rms_norm(rows, norm.weight, norm.eps, norm.unit_offset, norm.round_first)[:, None]

    def _fail(self, k: int, what: str) -> None:
        self.reset()
        raise NotScoredError(
            f"entry {k} cannot be scored inside its {type(self._scored[k].module).__name__}: {what}. Is a part "
            'of the model compiled by itself, or left out? Attach with fuse="gather"'
        )


def _normalise_and_score(rows: Tensor, norm: FusableNorm, place: Place, step: Step) -> Tensor:
    return schema.rms_norm_score(
        rows,
        norm.weight,
        norm.eps,
        norm.unit_offset,
        norm.round_first,
        step.weight,
        step.bias,
        *place,
        step.slots,
        step.sums,
        step.token_count,
        step.partials,
        step.gate_reward,
    )
