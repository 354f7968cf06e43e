"""Several processes on one job, as `accelerate launch` or `torchrun` start them; one process without either."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta

LONGEST_WAIT = timedelta(days=7)
"""What one process has left to do while the others wait may take hours; by default they would give up after minutes."""


def _nothing() -> None:
    pass


@dataclass(frozen=True)
class Processes:
    """This process among those that share a job.

    Attributes:
        rank: of this one.
        count: how many there are.
        wait: returns when all of them have called it.
    """

    rank: int = 0
    count: int = 1
    wait: Callable[[], None] = _nothing

    @property
    def is_first(self) -> bool:
        return self.rank == 0


def join(device: str | None = None) -> Processes:
    """Meets the other processes of the job that the environment speaks of (WORLD_SIZE, RANK)."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        return Processes()
    import torch
    from accelerate import PartialState

    # Without an accelerator it would take each process for the only one, unless it is told that they are on the CPU.
    on_cpu = device == "cpu" or (device is None and not torch.accelerator.is_available())
    state = PartialState(cpu=on_cpu, timeout=LONGEST_WAIT)
    return Processes(state.process_index, state.num_processes, state.wait_for_everyone)
