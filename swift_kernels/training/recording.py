"""Keeping what heads read while `generate` runs, so that a store costs no second pass over the LLM."""

from __future__ import annotations

import functools
from collections.abc import Collection, Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from swift_kernels import features
from swift_kernels.training.sketch import Sketch
from swift_kernels.training.store import DTYPES, Layout, ShardProblem, digest


class Recorder:
    """Keeps, for every forward that this thread runs within it, the entries of each row's last position.

    The first forward of a decoding `generate` feeds the last prompt token, each later one a token of the answer: what
    belongs to token t of an answer comes with forward t + 1. Values are kept on the CPU, sketched as the store's are.
    """

    def __init__(self, model: Any, layout: Layout, sketch: Sketch | None = None) -> None:
        self._model, self._layout, self._sketch = model, layout, sketch
        self._columns = torch.tensor([0, *layout.stored_widths]).cumsum(0).tolist()
        self._forwards: list[Tensor] = []

    def __enter__(self) -> Recorder:
        self._taps = ExitStack()
        for source in self._layout.features:
            if source != features.TOP_LOGPROBS:  # these come with the tokens, by `sampled`
                first = 0 if source == features.HIDDEN_STATES else self._layout.entries.index(source)
                keep = functools.partial(self._keep, first)
                self._taps.push(features.tap(self._model, source, self._layout.layers, keep, self))
        self._taps.enter_context(features.reading(self))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._taps.close()

    def _keep(self, first: int, k: int, entry: Tensor) -> None:
        self._put(first + k, entry[:, -1])

    def _put(self, entry: int, values: Tensor) -> None:
        """Keeps the values `[rows, width]` of an entry; the first one of a forward comes before the others."""
        if entry == 0:
            dtype = DTYPES[self._layout.dtype]
            self._forwards.append(torch.empty(values.shape[0], self._columns[-1], dtype=dtype))
        kept = values if self._sketch is None else self._sketch.apply(entry, values)
        self._forwards[-1][:, self._columns[entry] : self._columns[entry + 1]] = kept

    def sampled(self, logits: Tensor, tokens: Tensor) -> None:
        """Told by the sampler of the logits `[rows, vocabulary]` after a forward and the tokens `[rows, 1]` it took."""
        if features.TOP_LOGPROBS in self._layout.features:
            values = features.top_logprobs(logits, self._layout.widths[-1] - 3, tokens[:, 0])
            self._put(len(self._layout.widths) - 1, values)

    def response(self, row: int, tokens: Sequence[int]) -> Tensor:
        """`[tokens, stored features]` of these tokens of a row's answer."""
        if not tokens:
            return torch.empty(0, self._columns[-1], dtype=DTYPES[self._layout.dtype])
        return torch.stack([self._forwards[token + 1][row] for token in tokens])

    def problem(
        self, problem_id: str, first_row: int, answers: Sequence[Sequence[int]], eos: Collection[int]
    ) -> tuple[ShardProblem, list[Tensor]]:
        """What a shard records of a problem whose answers lie in rows from `first_row` on; its distinct responses."""
        places = distinct_places(answers)
        responses: list[Tensor] = []
        for row, (answer, place) in enumerate(zip(answers, places, strict=True), start=first_row):
            if place == len(responses):
                responses.append(self.response(row, features.scored_tokens(answer, eos, self._layout.span)))
        return ShardProblem(problem_id, places, digest(answers)), responses


def distinct_places(answers: Sequence[Sequence[int]]) -> list[int]:
    """For each answer its place among the distinct ones."""
    distinct: dict[tuple[int, ...], int] = {}
    return [distinct.setdefault(tuple(answer), len(distinct)) for answer in answers]
