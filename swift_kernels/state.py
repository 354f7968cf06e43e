"""`ScoreState`: what scoring keeps of a sequence, twelve bytes whatever its length."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from swift_kernels import reference
from swift_kernels.checks import check_slots, debug_checks, partials_per_row


class ScoreState:
    """Running gate-weighted means of `slots` sequences, updated in place by `SwiftHead.step`.

    Attributes:
        sums: float32 `[slots, 2]`: sum of gate * reward, sum of gate.
        token_count: int32 `[slots]`: tokens scored.
        partials, arrivals: scratch of the kernels. It belongs to this state alone, so that two states may be
            stepped on two streams at once.
    """

    def __init__(
        self,
        slots: int,
        widths: Sequence[int],
        device: torch.device | str | None = None,
        max_rows: int | None = None,
    ) -> None:
        """Allocates a state of `slots` sequences for entries of the given `widths`.

        `max_rows` is the most rows one step may have; rows may outnumber slots when some of them are skipped.
        """
        if slots < 1:
            raise ValueError(f"slots is {slots}: expected at least 1")
        max_rows = slots if max_rows is None else max_rows
        if max_rows < 1:
            raise ValueError(f"max_rows is {max_rows}: expected at least 1")
        self.widths = tuple(widths)
        # Tensors made under inference_mode could not be updated outside of it later.
        with torch.inference_mode(False):
            self.sums = torch.zeros(slots, 2, dtype=torch.float32, device=device)
            self.token_count = torch.zeros(slots, dtype=torch.int32, device=device)
            self.partials = torch.zeros(max_rows, partials_per_row(widths), 2, dtype=torch.float32, device=device)
            self.arrivals = torch.zeros(max_rows, dtype=torch.int32, device=device)

    @property
    def slots(self) -> int:
        return self.sums.shape[0]

    @property
    def max_rows(self) -> int:
        return self.partials.shape[0]

    @property
    def device(self) -> torch.device:
        return self.sums.device

    @property
    def nbytes(self) -> int:
        """Bytes kept per sequence (12) times slots."""
        return self.sums.nbytes + self.token_count.nbytes

    @property
    def scratch_nbytes(self) -> int:
        """Bytes of the kernels' scratch: constant, whatever the length of the sequences."""
        return self.partials.nbytes + self.arrivals.nbytes

    def scores(self) -> Tensor:
        """float32 `[slots]` gate-weighted mean rewards so far; NaN where no token was scored."""
        return reference.finalize(self.sums, self.token_count)

    def reset_(self, slots: Tensor | None = None) -> ScoreState:
        """Empties the given slots (int64 `[n]`; negative ones are ignored), or all of them.

        A slot that does not exist is an error on the CPU, and elsewhere ignored as `SwiftHead.step` does.
        """
        if slots is None:
            self.sums.zero_()
            self.token_count.zero_()
            return self
        slots = self._index(slots, "slots")
        # A mask with one spare place for those that are none: dropping them by indexing would wait for the device.
        hit = torch.zeros(self.slots + 1, dtype=torch.bool, device=self.device)
        hit.index_fill_(0, torch.where((slots < 0) | (slots >= self.slots), self.slots, slots), True)
        self.sums.masked_fill_(hit[:-1, None], 0.0)
        self.token_count.masked_fill_(hit[:-1], 0)
        return self

    def reorder_(self, parents: Tensor) -> ScoreState:
        """Slot i becomes a copy of slot `parents[i]` (int64 `[slots]`; parents may repeat, as in beam search)."""
        parents = self._index(parents, "parents", length=self.slots)
        self.sums.copy_(self.sums.index_select(0, parents))
        self.token_count.copy_(self.token_count.index_select(0, parents))
        return self

    def select(self, rows: Tensor) -> ScoreState:
        """A new state that holds copies of the given slots (int64 `[n]`), in that order."""
        rows = self._index(rows, "rows")
        selected = ScoreState(rows.shape[0], self.widths, self.device)
        selected.sums.copy_(self.sums.index_select(0, rows))
        selected.token_count.copy_(self.token_count.index_select(0, rows))
        return selected

    def _index(self, index: Tensor, name: str, length: int | None = None) -> Tensor:
        if index.dtype != torch.int64 or index.dim() != 1 or (length is not None and index.shape[0] != length):
            expected = "[n]" if length is None else f"[{length}]"
            raise ValueError(f"{name} is {index.dtype} of shape {list(index.shape)}: expected int64 {expected}")
        if index.device != self.device:
            raise ValueError(f"{name} is on {index.device}, the state is on {self.device}: expected one device")
        if index.numel() and (index.device.type == "cpu" or debug_checks()):
            low, high = int(index.min()), int(index.max())
            if high >= self.slots or (low < 0 and name != "slots"):
                raise ValueError(f"{name} contains {high if high >= self.slots else low}: expected 0..{self.slots - 1}")
            if name == "slots":
                check_slots(index, self.slots)
        return index

    def __repr__(self) -> str:
        return f"ScoreState(slots={self.slots}, device={self.device}, bytes={self.nbytes}+{self.scratch_nbytes})"
