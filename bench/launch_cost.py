"""Measures what an eager step costs the host before its kernel runs, part by part, at the shape of Llama-3.1-8B.

    python bench/launch_cost.py [--rows 64] [--quick] [--json]

Without a GPU a stand-in for libcuda takes the launches: Triton compiles for sm_90 and its launcher runs up to
`cuLaunchKernelEx`, so what is missing of the cost is CUDA's own. Clock: CPU time of this thread. A part includes those
below it that it calls.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib.util
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import common
import torch
import triton
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor

from swift_kernels import SwiftHead, schema
from swift_kernels.ops import launch, score_step

WIDTH, ENTRIES = 4096, 33
CALLS = 100
"""Of one sample: fewer than the launches that CUDA queues."""
SAMPLES = 300


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--quick", action="store_true", help="a tenth of the samples")
    parser.add_argument("--json", action="store_true", help="print the result as JSON instead of a table")
    arguments = parser.parse_args()
    device = common.choose_device(None)
    torch.set_num_threads(1)
    with torch.no_grad(), driver(device) as name:
        ops = {"score_step": score_step_parts(arguments.rows, device)}
        if importlib.util.find_spec("swift_kernels.ops.rms_norm_score"):
            ops["rms_norm_score"] = rms_norm_score_parts(arguments.rows, device)
        result = {
            "environment": common.environment(device) | {"triton": triton.__version__},
            "driver": name,
            "rows": arguments.rows,
            "widths": [WIDTH] * ENTRIES,
            "seconds": {op: measure(parts, SAMPLES // (10 if arguments.quick else 1)) for op, parts in ops.items()},
        }
    path = common.write_result(device, "launch_cost", result)
    if arguments.json:
        print(json.dumps(result))
    else:
        print_tables(result)
        print(f"every sample: {path}")


@contextlib.contextmanager
def driver(device: torch.device) -> Iterator[str]:
    if device.type == "cuda":
        yield torch.cuda.get_device_name(device)
        return
    sys.path.append(str(Path(__file__).parents[1]))
    from tests.aot.fake_driver import fake_driver

    with fake_driver():
        yield "a stand-in for libcuda: up to cuLaunchKernelEx"


def score_step_parts(rows: int, device: torch.device) -> dict[str, Callable[[], object]]:
    head = SwiftHead([WIDTH] * ENTRIES, device=device)
    state = head.init_state(rows)
    slots = torch.arange(rows, device=device)
    hidden_states = [torch.zeros(rows, WIDTH, dtype=torch.bfloat16, device=device) for _ in range(ENTRIES)]
    weight, bias = head.weight.detach(), head.bias.detach()
    scratch = (state.partials, state.arrivals)
    arguments = (hidden_states, weight, bias, slots, state.sums, state.token_count, *scratch, None)
    for _ in range(2):
        head.step(hidden_states, state, slots)
    tensors = score_step._tensors(*arguments)
    plan = score_step._PLANS.find(tensors)
    assert plan is not None
    entries, others = tuple(hidden_states), tensors[ENTRIES:]
    through_triton = functools.partial(
        score_step._score_step_kernel[plan.grid],
        entries,
        plan.row_strides,
        *others,
        None,
        rows,
        **plan.constants,
        **score_step._KERNEL.options,
    )
    by_address = tuple(map(Tensor.data_ptr, entries)), plan.row_strides, *map(Tensor.data_ptr, others), *plan.tail
    return {
        "SwiftHead.step": functools.partial(head.step, hidden_states, state, slots),
        "schema.score_step": functools.partial(schema.score_step, *arguments),
        "score_step_eager": functools.partial(score_step.score_step_eager, *arguments),
        "finding the plan": functools.partial(score_step._PLANS.find, tensors),
        "addresses": lambda: tuple(map(Tensor.data_ptr, tensors)),
        "launch.run_build": functools.partial(launch.run_build, plan.build, plan.device, plan.grid, by_address),
        "instead: the op, through the dispatcher": functools.partial(torch.ops.swift_kernels.score_step, *arguments),
        "instead: build[grid](tensors)": lambda: plan.build[plan.grid](entries, plan.row_strides, *others, *plan.tail),
        "instead: kernel[grid](tensors)": through_triton,
    }


def rms_norm_score_parts(rows: int, device: torch.device) -> dict[str, Callable[[], object]]:
    """One norm of the 33: a middle entry, whose input is what is scored."""
    from swift_kernels.ops import rms_norm_score

    head = SwiftHead([WIDTH] * ENTRIES, device=device)
    state = head.init_state(rows)
    hidden_states = torch.zeros(rows, WIDTH, dtype=torch.bfloat16, device=device)
    norm_weight = torch.zeros(WIDTH, dtype=torch.bfloat16, device=device)
    norm = (hidden_states, norm_weight, 1e-5, False, True)
    entry = (head.weight.detach(), head.bias.detach(), 1, WIDTH, False, False)
    slots = torch.arange(rows, device=device)
    arguments = (*norm, *entry, slots, state.sums, state.token_count, state.partials)
    return {
        "schema.rms_norm": functools.partial(schema.rms_norm, *norm),
        "schema.rms_norm_score": functools.partial(schema.rms_norm_score, *arguments),
        "rms_norm_score_triton": functools.partial(rms_norm_score.rms_norm_score_triton, *arguments),
        "instead: rms_norm, through the dispatcher": functools.partial(torch.ops.swift_kernels.rms_norm, *norm),
        "instead: rms_norm_score, through the dispatcher": functools.partial(
            torch.ops.swift_kernels.rms_norm_score, *arguments
        ),
    }


def measure(parts: dict[str, Callable[[], object]], samples: int) -> dict[str, list[float]]:
    seconds: dict[str, list[float]] = {name: [] for name in parts}
    for call in parts.values():
        call()
    for sample in range(samples):
        turn = sample % len(parts)
        for name, call in [*parts.items()][turn:] + [*parts.items()][:turn]:
            start = time.thread_time()
            for _ in range(CALLS):
                call()
            seconds[name].append((time.thread_time() - start) / CALLS)
            if torch.cuda.is_available():
                torch.cuda.synchronize()
    return seconds


def print_tables(result: dict[str, Any]) -> None:
    environment, console = result["environment"], Console()
    for op, parts in result["seconds"].items():
        title = (
            f"{op}, {result['rows']} rows: host time of one call\n{environment['device']}, torch {environment['torch']}"
        )
        table = Table(
            "part", "us", "95% interval", title=f"{title}, triton {environment['triton']}, {result['driver']}"
        )
        for name, samples in parts.items():
            summary = common.Summary.of(samples)
            interval = f"{summary.low * 1e6:.2f} .. {summary.high * 1e6:.2f}"
            table.add_row(escape(name), f"{summary.median * 1e6:.2f}", interval)
        console.print(table)


if __name__ == "__main__":
    main()
