"""The ops under pytest-benchmark, for comparing two trees on one machine.

    pytest bench/test_ops.py --benchmark-save=before      # and, on the other tree:
    pytest bench/test_ops.py --benchmark-compare          # --benchmark-compare-fail=median:10% to fail on it

At the shape of Llama-3.1-8B in bfloat16. Floors and rivals are in the scripts beside this file.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

from bench.shapes import LLAMA_8B
from swift_kernels import SwiftHead, schema

NO_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, NO_CUDA])]
WIDTHS = LLAMA_8B.widths("all")


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def run(benchmark: Any, device: str) -> Callable[[Callable[[], object]], None]:
    """Measures a call until its result is there."""

    def measured(call: Callable[[], object]) -> None:
        def finished() -> None:
            call()
            if device == "cuda":
                torch.cuda.synchronize()

        with torch.no_grad():
            call()
            benchmark(finished)

    return measured


def _states(rows: int, device: str, entries: int = len(WIDTHS)) -> list[torch.Tensor]:
    return [torch.randn(rows, width, device=device, dtype=torch.bfloat16) for width in WIDTHS[:entries]]


@pytest.mark.parametrize("rows", [1, 8, 64, 256])
def test_score_step(run: Any, device: str, rows: int) -> None:
    head = SwiftHead(WIDTHS, device=device)
    state, slots = head.init_state(rows, device), torch.arange(rows, device=device)
    run(partial(head.step, _states(rows, device), state, slots))
    assert head.scores(state).isfinite().all()


@pytest.mark.parametrize("rows", [1, 64])
def test_rms_norm_score(run: Any, device: str, rows: int) -> None:
    head = SwiftHead(WIDTHS[:2], device=device)
    state, slots = head.init_state(rows, device), torch.arange(rows, device=device)
    norm = (*_states(rows, device, 1), torch.ones(WIDTHS[0], device=device, dtype=torch.bfloat16), 1e-5, False, True)
    entry = (head.weight.detach(), head.bias.detach(), 0, 0, False, False)
    arguments: tuple[Any, ...] = (*norm, *entry, slots, state.sums, state.token_count, state.partials)
    run(partial(schema.rms_norm_score, *arguments))


@pytest.mark.parametrize("mode", ["forward", "backward"])
def test_score_sequence(run: Any, device: str, mode: str) -> None:
    head = SwiftHead(WIDTHS, device=device)
    states, cu_seqlens = _states(512, device), torch.arange(0, 513, 64, device=device)

    def forward_and_backward() -> None:
        with torch.enable_grad():
            head.zero_grad()
            head(states, cu_seqlens).sum().backward()

    run(partial(head, states, cu_seqlens) if mode == "forward" else forward_and_backward)
