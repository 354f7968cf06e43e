"""The hidden states that training reads: computed once, kept in a temporary memory-mapped file."""

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
    """

    def __init__(self, widths: Sequence[int], lengths: Sequence[int], dtype: torch.dtype) -> None:
        self.widths = tuple(widths)
        self.lengths = tuple(lengths)
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
                    f"{free / 1e9:.1f} GB free: set TMPDIR to a larger folder, or use fewer layers or problems"
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


def collect(
    model: Any,
    config: HeadConfig,
    groups: Sequence[Group],
    *,
    batch_size: int = 16,
    on_progress: Callable[[int], None] | None = None,
) -> Activations:
    """Runs the model once over each prompt and its responses; `on_progress` is told how many prompts are done."""
    eos = eos_token_ids(model)
    lengths = [
        len(features.scored_tokens(response, eos, config.span)) for _, responses in groups for response in responses
    ]
    dtype = next(model.parameters()).dtype if config.top_logprobs is None else torch.float32
    activations = Activations(config.widths, lengths, dtype)
    columns = torch.tensor([0, *config.widths]).cumsum(0).tolist()
    start = 0
    for done, (prompt, responses) in enumerate(groups, start=1):

        def keep(places: Tensor, k: int, entry: Tensor, start: int = start) -> None:
            activations.values[start + places, columns[k] : columns[k + 1]] = entry.to(activations.values)

        start += int(forward_responses(model, config, prompt, responses, keep, batch_size=batch_size)[-1])
        if on_progress is not None:
            on_progress(done)
    return activations
