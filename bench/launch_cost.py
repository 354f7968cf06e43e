"""Measures what an eager step costs the host before its kernel runs, part by part, at the shape of Llama-3.1-8B.

    python -m bench.launch_cost [--rows 64]

Without a GPU a stand-in for libcuda takes the launches: Triton compiles for sm_90 and its launcher runs up to
`cuLaunchKernelEx`, so what is missing of the cost is CUDA's own. Clock: CPU time of this thread. A part includes those
below it that it calls. The floor is dispatching an op that does nothing.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from bench import harness
from bench.clocks import Call, cpu_seconds
from bench.floors import Floors
from bench.harness import Bench
from bench.results import Case, Labels
from bench.shapes import LLAMA_8B
from bench.summary import Sample
from swift_kernels import SwiftHead, schema
from swift_kernels.ops import launch, rms_norm_score, score_step

WIDTHS = LLAMA_8B.widths("all")
CALLS = 100
"""Of one sample: fewer than the launches that CUDA queues."""
SAMPLES = 200


def main() -> None:
    parser = harness.parser(__doc__)
    parser.add_argument("--rows", type=harness.count, default=64)
    options = parser.parse_args()
    with torch.no_grad(), Bench("launch_cost", options, threads=1) as bench, driver(bench.device) as name:
        for op, parts_of in (("score_step", score_step_parts), ("rms_norm_score", rms_norm_score_parts)):
            labels: Labels = {"op": op, "rows": options.rows, "driver": name}
            if bench.wants(labels):
                measure(bench, labels, parts_of(options.rows, bench.device))


@contextlib.contextmanager
def driver(device: torch.device) -> Iterator[str]:
    if device.type == "cuda":
        yield torch.cuda.get_device_name(device)
        return
    from tests.aot.fake_driver import fake_driver

    with fake_driver():
        yield "a stand-in for libcuda"


def measure(bench: Bench, labels: Labels, parts: dict[str, Call]) -> None:
    def turn(call: Call) -> Callable[[int], Sample]:
        call()

        def sample(_turn: int) -> Sample:
            elapsed = cpu_seconds(lambda: [call() for _ in range(CALLS)]) / CALLS
            if bench.device.type == "cuda":
                torch.cuda.synchronize()
            return elapsed

        return sample

    floors = Floors(cpu_seconds, torch.device("cpu"), 0, quick=True)
    samples = harness.take_turns({name: turn(call) for name, call in parts.items()}, bench.samples(SAMPLES), floors)
    bench.add(Case(labels, next(iter(parts)), samples, floors=floors.seconds))


def score_step_parts(rows: int, device: torch.device) -> dict[str, Call]:
    head = SwiftHead(WIDTHS, device=device)
    state = head.init_state(rows)
    slots = torch.arange(rows, device=device)
    hidden_states = [torch.zeros(rows, width, dtype=torch.bfloat16, device=device) for width in WIDTHS]
    weight, bias = head.weight.detach(), head.bias.detach()
    scratch = (state.partials, state.arrivals)
    arguments = (hidden_states, weight, bias, slots, state.sums, state.token_count, *scratch, None)
    for _ in range(2):
        head.step(hidden_states, state, slots)
    tensors = score_step._tensors(*arguments)
    plan = score_step._PLANS.find(tensors)
    assert plan is not None
    entries, others = tuple(hidden_states), tensors[len(WIDTHS) :]
    through_triton = functools.partial(
        score_step._score_step_kernel[plan.grid],
        entries,
        plan.row_strides,
        *others,
        None,
        rows,
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


def rms_norm_score_parts(rows: int, device: torch.device) -> dict[str, Call]:
    """One norm of the 33: a middle entry, whose input is what is scored."""
    head = SwiftHead(WIDTHS, device=device)
    state = head.init_state(rows)
    hidden_states = torch.zeros(rows, WIDTHS[0], dtype=torch.bfloat16, device=device)
    norm_weight = torch.zeros(WIDTHS[0], dtype=torch.bfloat16, device=device)
    norm = (hidden_states, norm_weight, 1e-5, False, True)
    entry = (head.weight.detach(), head.bias.detach(), 1, WIDTHS[0], False, False)
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


if __name__ == "__main__":
    main()
