"""The process that runs under ThreadSanitizer: `python process.py LIBRARY --steps N` or `--seconds S`."""

from __future__ import annotations

import argparse
import ctypes
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch

from swift_kernels import SwiftHead, cpp, schema

WIDTHS = (64, 67)
ROWS = 64


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("library", type=Path)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--seconds", type=float)
    options = parser.parse_args()
    # PyTorch's own threads are not instrumented: how they wait for each other would be taken for races.
    torch.set_num_threads(1)
    torch.ops.load_library(str(options.library))
    cpp._loaded = options.library
    head = SwiftHead(WIDTHS)
    state = head.init_state(ROWS)
    slots = torch.arange(ROWS)
    library = ctypes.CDLL(str(options.library))
    library.start_writing(ctypes.c_void_p(slots.data_ptr()), ctypes.c_int64(ROWS), ctypes.c_int64(ROWS))
    calls = [gather(head, state, slots), norms(head, state, slots)]
    counts = {"steps": 0, "refused": 0}
    end = None if options.seconds is None else time.monotonic() + options.seconds
    while time.monotonic() < end if end is not None else sum(counts.values()) < options.steps:
        for call in calls:
            try:
                call()
                counts["steps"] += 1
            except ValueError:  # a slot that does not exist, or two rows of one
                counts["refused"] += 1
    library.stop_writing()
    print(json.dumps({**counts, "kernels": schema.implementation("cpu"), "finite": bool(state.sums.isfinite().all())}))


def gather(head: SwiftHead, state: object, slots: torch.Tensor) -> Callable[[], None]:
    hidden_states = [torch.randn(ROWS, width) for width in WIDTHS]
    return lambda: head.step(hidden_states, state, slots)


def norms(head: SwiftHead, state: object, slots: torch.Tensor) -> Callable[[], None]:
    hidden_states, weight = torch.randn(ROWS, WIDTHS[0]), torch.ones(WIDTHS[0])
    mode = (1e-6, False, False, head.weight.detach(), head.bias.detach())

    def call() -> None:
        with torch.no_grad():
            schema.rms_norm_score(
                hidden_states, weight, *mode, 0, 0, True, True, slots, state.sums, state.token_count, state.partials
            )

    return call


if __name__ == "__main__":
    main()
