"""What a CUDA graph does of a decode step, where there is no GPU: its operators on the same memory, and no Python."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

WAIT = ("_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select", "unique", "repeat_interleave")
"""Operators that bring a value from the device to the host, or make a shape of one: no graph can hold them."""


class Recording(TorchDispatchMode):
    """Records the operators that run inside of it, and fails on those that wait for the device.

    Attributes:
        ops: their names.
    """

    def __init__(self) -> None:
        super().__init__()
        self.ops: set[str] = set()
        self._calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        assert not name.startswith(WAIT), f"{name} waits for the device"
        self.ops.add(name)
        output = func(*args, **(kwargs or {}))
        self._calls.append((func, args, kwargs or {}, output))
        return output

    def replay(self) -> None:
        """Runs them again, on the memory of the first time."""
        for func, args, kwargs, output in self._calls:
            again = func(*args, **kwargs)
            for alias, first, second in zip(func._schema.returns, *map(_as_list, (output, again)), strict=True):
                # What is no view of an input is written to the memory that the first run gave it.
                if isinstance(first, torch.Tensor) and alias.alias_info is None:
                    first.copy_(second)


def _as_list(output: Any) -> list[Any]:
    return list(output) if isinstance(output, tuple) else [] if output is None else [output]


def recorded(step: Callable[[], object]) -> Callable[[], None]:
    """Runs a step once, and returns what repeats all that it did to tensors, on the same memory."""
    with Recording() as recording:
        step()
    return recording.replay


def decode_both_ways(
    scorer: Any, record: Callable[[Callable[[], object]], Callable[[], Any]], model: Any, device: str
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Scores and counts of the same tokens and routes, by what `record` makes of a decode step, and by the step.

    As a user's loop does it: what was recorded goes on scoring after `begin`, in the buffers that it knows.
    """
    token = torch.full((3, 1), 9, device=device)
    slots = torch.arange(3, device=device)
    mask = torch.ones(3, 1, 1, 1, dtype=torch.bool, device=device)
    inputs = [torch.randint(6, 96, (3, 1), device=device) for _ in range(5)]
    routes = [[0, 1, 2], [2, 1, 0], [0, -1, 1], [1, 2, -1], [-1, -1, 0]]

    def step() -> torch.Tensor:
        return model(input_ids=token, attention_mask=mask, use_cache=False).logits

    scorer.warmup(3)
    scorer.begin(slots)
    results = []
    for run in (record(step), step):
        scorer.begin(slots)
        for values, route in zip(inputs, routes, strict=True):
            token.copy_(values)
            slots.copy_(torch.tensor(route))
            run()
        results.append((scorer.scores(), scorer.token_counts()))
    return results
