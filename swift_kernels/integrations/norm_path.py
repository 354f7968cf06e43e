"""Scoring inside the model's own RMSNorms, for `attach(..., fuse="norm")`.

In an eager decode step, the norm that takes or returns a selected entry is replaced by one kernel that normalises and
takes the dot products on the way; the last one closes the step. Everywhere else, in a prefill, with gradients, under
torch.compile, the stock norm runs, and what is to be scored there is gathered.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

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


class NormPath:
    """The fused norms of one attached model.

    Attributes:
        reason: why the selected entries are gathered instead, or None where their norms score.
    """

    def __init__(
        self,
        model: Any,
        head: SwiftHead,
        scoring: Callable[[Tensor], bool],
        buffers: Callable[[], Buffers],
        closed: Callable[[], None],
    ) -> None:
        """Finds the norms.

        Args:
            scoring: whether a forward with this norm input is scored here.
            buffers: what it is scored into.
            closed: called when a step has been scored.

        Raises:
            ValueError: no norm of the model can be fused, or the head reads logits.
        """
        if head.config.features == features.LOGITS:
            raise ValueError('fuse="norm" scores inside norms, the head reads logits: use fuse="gather"')
        found = find_norms(model)
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
        self._widths = head.config.widths
        selected = {id(norm.module) for norm in self._scored}
        self._plain = [norm for norm in found if isinstance(norm, FusableNorm) and id(norm.module) not in selected]
        if self.reason is None and len(selected) != len(self._scored):
            self.reason = "one norm module serves several entries"
        self._head = head
        self._scoring, self._buffers, self._closed = scoring, buffers, closed
        self._next_entry = 0
        self._expected: Tensor | None = None

    def describe(self) -> str:
        plain = f" and {len(self._plain)} normalise" if self._plain else ""
        return f"{len(self._scored)} RMSNorms score{plain}, one call each"

    def patch(self) -> ExitStack:
        """Fuses the norms, until what is returned is closed."""
        patches = ExitStack()
        if self.reason is None:
            first_features = [0, *itertools.accumulate(self._widths)]
            for k, norm in enumerate(self._scored):
                scored = functools.partial(self._score, norm, k, first_features[k])
                patches.callback(patch(norm.module, "forward", scored))
            for norm in self._plain:
                patches.callback(patch(norm.module, "forward", functools.partial(self._normalise, norm)))
        return patches

    def expect(self, k: int, entry: Tensor) -> None:
        """Told by the model's hooks of entry k of a step as it appears.

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
        """Forgets a step that was broken off."""
        self._next_entry, self._expected = 0, None

    def warmup(self, hidden_states: Sequence[Tensor], state: ScoreState, slots: Tensor, trace: Tensor | None) -> None:
        """Runs every fused norm once, on rows that are skipped: compiles what a step will need."""
        if self.reason is not None:
            return
        first = 0
        for k, (norm, entry) in enumerate(zip(self._scored, hidden_states, strict=True)):
            self._call(norm, k, first, entry, state, slots, trace)
            first += entry.shape[1]
        for norm in self._plain:
            rows = hidden_states[0].new_zeros(slots.shape[0], norm.weight.shape[0])
            schema.rms_norm(rows, norm.weight, norm.eps, norm.unit_offset, norm.round_first)

    def _call(
        self,
        norm: FusableNorm,
        k: int,
        first_feature: int,
        rows: Tensor,
        state: ScoreState,
        slots: Tensor,
        gate_reward: Tensor | None,
    ) -> Tensor:
        return schema.rms_norm_score(
            rows,
            norm.weight,
            norm.eps,
            norm.unit_offset,
            norm.round_first,
            self._head.weight.detach(),
            self._head.bias.detach(),
            k,
            first_feature,
            norm.scores_output,
            k == len(self._scored) - 1,
            slots,
            state.sums,
            state.token_count,
            state.partials,
            gate_reward,
        )

    def _score(
        self, norm: FusableNorm, k: int, first_feature: int, stock: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        if kwargs or len(args) != 1 or not self._scoring(args[0]):
            return stock(*args, **kwargs)
        hidden_states = args[0]
        if k != self._next_entry:
            self._fail(k, f"entry {self._next_entry} was to come next")
        if not norm.scores_output and hidden_states is not self._expected:
            self._fail(k, "its norm does not take what the layer was called with")
        output = self._call(norm, k, first_feature, hidden_states[:, 0], *self._buffers())[:, None]
        self._expected = output if norm.scores_output else None
        last = k == len(self._scored) - 1
        self._next_entry = 0 if last else k + 1
        if last:
            self._closed()
        return output

    def _normalise(self, norm: FusableNorm, stock: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if kwargs or len(args) != 1 or not self._scoring(args[0]):
            return stock(*args, **kwargs)
        rows = args[0][:, 0]
        return schema.rms_norm(rows, norm.weight, norm.eps, norm.unit_offset, norm.round_first)[:, None]

    def _fail(self, k: int, what: str) -> None:
        self.reset()
        raise NotScoredError(
            f"entry {k} cannot be scored inside its {type(self._scored[k].module).__name__}: {what}; attach with "
            'fuse="gather"'
        )


def in_eager_step(entry: Tensor) -> bool:
    """Whether a forward of these `[batch, tokens, width]` hidden states is one that fused norms serve."""
    return (
        entry.dim() == 3 and entry.shape[1] == 1 and not torch.compiler.is_compiling() and not torch.is_grad_enabled()
    )
