"""What is counted: calls of the library at the shape of Llama-3.1-8B, or small where only the path to a kernel counts.

The hidden states are zeros: no instruction depends on their values, and under valgrind random ones take seconds.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch

from swift_kernels import SwiftHead, schema

WIDTH, ENTRIES = 4096, 33

Call = Callable[[], object]


@dataclass(frozen=True)
class Case:
    make: Callable[[], AbstractContextManager[Call]]
    calls: int
    """Of which the mean is taken: few where the arithmetic costs far more than what leads to it."""

    @property
    def warm_up(self) -> int:
        """Calls before: Python specialises its bytecode as it runs it."""
        return 2 if self.calls < 10 else 50


@contextlib.contextmanager
def score_step(rows: int, scored: bool = True) -> Iterator[Call]:
    yield _step(rows, scored)


@contextlib.contextmanager
def rms_norm_score(rows: int) -> Iterator[Call]:
    yield _norm(rows)


@contextlib.contextmanager
def score_sequence(backward: bool) -> Iterator[Call]:
    """Four sequences of sixteen tokens."""
    head = SwiftHead([1024] * 4)
    hidden_states = [torch.zeros(64, 1024, dtype=torch.bfloat16) for _ in range(4)]
    cu_seqlens = torch.arange(0, 65, 16, dtype=torch.int32)

    def forward_and_backward() -> None:
        with torch.enable_grad():
            head.zero_grad()
            head(hidden_states, cu_seqlens).sum().backward()

    yield forward_and_backward if backward else functools.partial(head, hidden_states, cu_seqlens)


@contextlib.contextmanager
def triton_score_step(rows: int) -> Iterator[Call]:
    with _launches():
        yield _step(rows)


@contextlib.contextmanager
def triton_rms_norm_score(rows: int) -> Iterator[Call]:
    with _launches():
        yield _norm(rows)


def _case(calls: int, make: Callable[..., AbstractContextManager[Call]], *arguments: object) -> Case:
    return Case(functools.partial(make, *arguments), calls)


STEP_64 = f"score_step, {ENTRIES} x {WIDTH} bf16, 64 rows"
CASES = {
    f"Triton: score_step, {ENTRIES} x {WIDTH} bf16, 64 rows: up to cuLaunchKernelEx": _case(100, triton_score_step, 64),
    f"Triton: rms_norm_score, {WIDTH} bf16, 64 rows: up to cuLaunchKernelEx": _case(100, triton_rms_norm_score, 64),
    STEP_64: _case(2, score_step, 64),
    f"score_step, {ENTRIES} x {WIDTH} bf16, 1 row": _case(50, score_step, 1),
    "score_step, 64 rows that are skipped: the host path": _case(100, score_step, 64, False),
    "score_step, 1 row that is skipped: the host path": _case(100, score_step, 1, False),
    f"rms_norm_score, {WIDTH} bf16, 64 rows": _case(20, rms_norm_score, 64),
    "score_sequence, 4 x 1024 bf16, 64 tokens": _case(20, score_sequence, False),
    "score_sequence, 4 x 1024 bf16, 64 tokens, and its backward": _case(20, score_sequence, True),
}
"""By name. Those of the CPU run the C++ kernels; those of Triton launch on a stand-in for libcuda,
and come first: once the C++ library is loaded, the dispatcher calls it for what lies on the CPU."""


def _step(rows: int, scored: bool = True) -> Call:
    head = SwiftHead([WIDTH] * ENTRIES)
    state = head.init_state(rows)
    hidden_states = [torch.zeros(rows, WIDTH, dtype=torch.bfloat16) for _ in range(ENTRIES)]
    slots = torch.arange(rows) if scored else torch.full((rows,), -1)
    return functools.partial(head.step, hidden_states, state, slots)


def _norm(rows: int) -> Call:
    """One norm of a step of two entries: the first, whose input is what is scored."""
    head = SwiftHead([WIDTH] * 2)
    state = head.init_state(rows)
    hidden_states = torch.zeros(rows, WIDTH, dtype=torch.bfloat16)
    norm = (hidden_states, torch.zeros(WIDTH, dtype=torch.bfloat16), 1e-5, False, True)
    entry = (head.weight.detach(), head.bias.detach(), 0, 0, False, False)
    arguments: tuple[Any, ...] = (*norm, *entry, torch.arange(rows), state.sums, state.token_count, state.partials)
    return functools.partial(schema.rms_norm_score, *arguments)


@contextlib.contextmanager
def _launches() -> Iterator[None]:
    from tests.aot.fake_driver import fake_driver

    with fake_driver() as driver:
        yield
        assert driver.launch_count, "the calls launched nothing"
