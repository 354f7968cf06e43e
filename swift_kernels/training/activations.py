"""The hidden states that training reads.

Computed once and kept in a temporary memory-mapped file, or, where they fit on no disk, computed anew for every batch.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from swift_kernels import features
from swift_kernels.head import HeadConfig
from swift_kernels.integrations.compatibility import eos_token_ids
from swift_kernels.integrations.shared_prompt import forward_responses

Group = tuple[Sequence[int], Sequence[Sequence[int]]]
"""Token ids of a prompt, and of the responses to it."""


class Activations:
    """Features of the scored tokens of many responses, `[tokens, features]` in a file mapped into memory.

    Values are kept in the dtype in which the model computes them, so that a head is trained on what it will read;
    float16 would overflow on the massive activations that many models have. The file lies in the folder for
    temporary files (`TMPDIR`) and has no name once it is open: nothing is left behind, however the process ends.

    `llm_tokens` says how many tokens the model was fed for them.
    """

    def __init__(self, widths: Sequence[int], lengths: Sequence[int], dtype: torch.dtype) -> None:
        self.widths = tuple(widths)
        self.lengths = tuple(lengths)
        self.llm_tokens = 0
        self.cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
        tokens = int(self.cu_seqlens[-1])
        elements = tokens * sum(self.widths)
        size = elements * dtype.itemsize
        with tempfile.NamedTemporaryFile(prefix="swift_kernels-") as file:
            folder = os.path.dirname(file.name)
            free = shutil.disk_usage(folder).free
            if size > free:
                raise ValueError(
                    f"the hidden states of {tokens:,} tokens take {size / 1e9:.1f} GB, {folder} has "
                    f"{free / 1e9:.1f} GB free: set TMPDIR to a larger folder, use fewer layers or problems, or "
                    "compute them anew in every epoch (--on-the-fly)"
                )
            # Space is taken now: a page of a sparse file that the disk has no room for would end the process.
            if size and hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, size)
            # An empty file cannot be mapped.
            mapped = torch.from_file(file.name, shared=True, size=elements, dtype=dtype) if size else torch.empty(0)
        self.values = mapped.view(tokens, sum(self.widths))

    @property
    def nbytes(self) -> int:
        return self.values.nbytes

    def batch(self, indices: Tensor, device: torch.device | str = "cpu") -> tuple[list[Tensor], Tensor]:
        """The packed hidden states, one `[tokens, width]` an entry, and `cu_seqlens` of the given responses."""
        starts, ends = self.cu_seqlens[indices], self.cu_seqlens[indices + 1]
        rows = torch.cat([torch.arange(start, end) for start, end in zip(starts.tolist(), ends.tolist(), strict=True)])
        packed = self.values[rows].to(device)
        return list(packed.split(self.widths, dim=1)), torch.cat([ends.new_zeros(1), (ends - starts).cumsum(0)])


class OnTheFly:
    """Features that the model computes whenever they are asked for, as the authors' training does; nothing is kept.

    `llm_tokens` says how many tokens the model has been fed by now.
    """

    def __init__(self, model: Any, config: HeadConfig, groups: Sequence[Group], *, batch_size: int = 16) -> None:
        self.widths = config.widths
        self.lengths = scored_lengths(model, config, groups)
        self.llm_tokens = 0
        self._model, self._config, self._batch_size = model, config, batch_size
        self._prompts = [prompt for prompt, _ in groups]
        self._responses = [(group, ids) for group, (_, responses) in enumerate(groups) for ids in responses]

    def batch(self, indices: Tensor, device: torch.device | str = "cpu") -> tuple[list[Tensor], Tensor]:
        """As `Activations.batch`; each prompt runs once, and a response as often as it is asked for."""
        sizes = [self.lengths[index] for index in indices.tolist()]
        cu_seqlens = torch.tensor([0, *sizes]).cumsum(0)
        packed = torch.empty(
            int(cu_seqlens[-1]), sum(self.widths), dtype=_dtype(self._model, self._config), device=device
        )
        columns = torch.tensor([0, *self.widths]).cumsum(0).tolist()
        together: dict[int, list[tuple[Sequence[int], Tensor]]] = {}
        for index, rows in zip(indices.tolist(), torch.arange(len(packed)).split(sizes), strict=True):
            group, ids = self._responses[index]
            together.setdefault(group, []).append((ids, rows))
        for group, members in together.items():
            own = torch.cat([rows for _, rows in members])

            def put(places: Tensor, k: int, entry: Tensor, own: Tensor = own) -> None:
                packed[own[places].to(device), columns[k] : columns[k + 1]] = entry.to(packed)

            responses = [ids for ids, _ in members]
            forward_responses(
                self._model,
                self._config,
                self._prompts[group],
                responses,
                put,
                batch_size=self._batch_size,
                on_fed=self._count,
            )
        return list(packed.split(self.widths, dim=1)), cu_seqlens

    def _count(self, tokens: int) -> None:
        self.llm_tokens += tokens


def scored_lengths(model: Any, config: HeadConfig, groups: Sequence[Group]) -> tuple[int, ...]:
    """Scored tokens of each response, known before the model runs."""
    eos = eos_token_ids(model)
    return tuple(
        len(features.scored_tokens(response, eos, config.span)) for _, responses in groups for response in responses
    )


def _dtype(model: Any, config: HeadConfig) -> torch.dtype:
    """In which the model computes what a head of this config reads."""
    return next(model.parameters()).dtype if config.top_logprobs is None else torch.float32


def collect(
    model: Any,
    config: HeadConfig,
    groups: Sequence[Group],
    *,
    batch_size: int = 16,
    on_progress: Callable[[int], None] | None = None,
) -> Activations:
    """Runs the model once over each prompt and its responses; `on_progress` is told how many prompts are done."""
    activations = Activations(config.widths, scored_lengths(model, config, groups), _dtype(model, config))
    columns = torch.tensor([0, *config.widths]).cumsum(0).tolist()
    start = 0

    def count(tokens: int) -> None:
        activations.llm_tokens += tokens

    for done, (prompt, responses) in enumerate(groups, start=1):

        def keep(places: Tensor, k: int, entry: Tensor, start: int = start) -> None:
            activations.values[start + places, columns[k] : columns[k + 1]] = entry.to(activations.values)

        ran = forward_responses(model, config, prompt, responses, keep, batch_size=batch_size, on_fed=count)
        start += int(ran[-1])
        if on_progress is not None:
            on_progress(done)
    return activations
