"""Measures one scored decode step at the shape of Llama-3.1-8B (33 x 4096, bfloat16) against what users would write.

    python bench/score_step.py [--rows 1,8,64,256] [--quick] [--json] [--threads 1] [--device cpu]

Contenders take turns within a round, each on hidden states that have left the caches since they were last read. Before
anything is timed, all must agree with a float64 reference; where one does not, no figure is printed.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import sys
from collections.abc import Callable, Sequence
from typing import Any

import common
import torch
from rich.console import Console
from rich.table import Table
from rivals import Contender, ours, rivals
from torch import Tensor

from swift_kernels import reference, schema

WIDTHS = [4096] * 33
DTYPE = torch.bfloat16
INPUT_BYTES = 300 << 20
"""Inputs that are rotated through; the last-level caches of today's machines hold a fraction of it."""

SAMPLES = {1: 400, 8: 300, 64: 100}
"""Of each contender, by the number of rows; 50 at more."""

FEWEST_SAMPLES = 10
"""A contender with fewer undisturbed calls gets no figure."""

CLOCKS = {"seconds": "call included", "replay_seconds": "CUDA graph replay"}

PATIENCE = 4
"""Rounds for each sample that is asked for, before a busy machine is given up on."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default="1,8,64,256", help="comma-separated row counts")
    parser.add_argument("--quick", action="store_true", help="a fifth of the samples")
    parser.add_argument("--json", action="store_true", help="print the result as JSON instead of a table")
    parser.add_argument(
        "--threads", type=int, help="threads to use; with 1, CPU time is measured, even on a busy machine"
    )
    parser.add_argument("--device", help="cpu or cuda; by default cuda where there is one")
    arguments = parser.parse_args()
    device = common.choose_device(arguments.device)
    torch.set_num_threads(arguments.threads or torch.get_num_threads())
    if device.type == "cuda":
        seconds: Callable[..., float | None] = common.cuda_seconds
    else:
        seconds = common.seconds if torch.get_num_threads() > 1 else common.cpu_seconds
    with torch.no_grad():
        result = {
            "environment": common.environment(device),
            "clock": seconds.__name__,
            "implementation": schema.implementation(device.type),
            "widths": WIDTHS,
            "dtype": str(DTYPE),
            "rows": {
                rows: measure(rows, SAMPLES.get(rows, 50) // (5 if arguments.quick else 1), seconds, device)
                for rows in map(int, arguments.rows.split(","))
            },
        }
    name = "score_step" if arguments.threads is None else f"score_step_{arguments.threads}_threads"
    path = common.write_result(device, name, result)
    if arguments.json:
        print(json.dumps(result))
    else:
        print_tables(result)
        print(f"every sample: {path}")


def measure(
    rows: int, wanted: int, seconds: Callable[[Callable[[], object]], float | None], device: torch.device
) -> dict[str, Any]:
    weight, bias = (tensor.to(device) for tensor in make_head())
    sets = [[entry.to(device) for entry in entries] for entries in make_inputs(rows)]
    contenders = [ours(weight, bias, rows, WIDTHS), *rivals(weight, bias, rows, WIDTHS)]
    print(f"{rows} rows: checking and warming up {len(contenders)} contenders", file=sys.stderr)
    # Static shapes: every row count compiles anew, and is not to count against another's limit.
    torch.compiler.reset()
    for contender in contenders:
        check(contender, sets[:3], weight, bias)
    for hidden_states in sets[:3]:
        for contender in contenders:
            contender.step(hidden_states)

    bandwidth = common.ReadBandwidth(seconds, device)
    next_input = itertools.cycle(sets).__next__
    samples: dict[str, list[float]] = {contender.name: [] for contender in contenders}
    calls = 0
    while calls < PATIENCE * wanted and min(map(len, samples.values())) < wanted:
        if calls % max(1, wanted // 40) == 0:
            bandwidth.sample()
        # Nobody always follows the same neighbour: who runs second finds another cache than who runs third.
        turn = calls % len(contenders)
        for contender in contenders[turn:] + contenders[:turn]:
            elapsed = seconds(functools.partial(contender.step, next_input()))
            if elapsed is not None:
                samples[contender.name].append(elapsed)
        calls += 1
    # Bandwidth is a rate over many calls, so here ours follows itself through all the inputs, as the floor does through
    # its buffer. In turn with the rivals, each call also finds its weights and page tables gone from the caches.
    stream = functools.partial(run_all, contenders[0], sets)
    streamed = []
    for _ in range(max(FEWEST_SAMPLES, wanted // 4)):
        bandwidth.sample()
        elapsed = seconds(stream)
        if elapsed is not None:
            streamed.append(elapsed / len(sets))
    replayed = {}
    if device.type == "cuda":
        # Enough inputs in one graph that each has left the L2 before it is read again.
        for contender in contenders:
            steps = [functools.partial(contender.step, hidden_states) for hidden_states in sets[:64]]
            replayed[contender.name] = common.replay_seconds(steps, wanted)
    hidden_states_bytes = rows * sum(WIDTHS) * DTYPE.itemsize
    return {
        "hidden_states_bytes": hidden_states_bytes,
        "streamed_seconds": streamed,
        "replay_seconds": replayed,
        "bytes": hidden_states_bytes + weight.nbytes,
        "calls": calls,
        "seconds": samples,
        "read_bandwidth": bandwidth.samples,
        "read_bandwidth_by": bandwidth.best(),
        "input_sets": len(sets),
    }


def run_all(contender: Contender, sets: Sequence[Sequence[Tensor]]) -> None:
    for hidden_states in sets:
        contender.step(hidden_states)


def make_head() -> tuple[Tensor, Tensor]:
    """Weights that bfloat16 holds exactly, so that contenders in either dtype compute the same scores."""
    generator = torch.Generator().manual_seed(0)
    features = sum(WIDTHS)
    weight = (torch.randn(2, features, generator=generator) / features**0.5).bfloat16().float()
    return weight, torch.randn(2, generator=generator).bfloat16().float()


def make_inputs(rows: int) -> list[list[Tensor]]:
    generator = torch.Generator().manual_seed(rows)
    bytes_per_set = rows * sum(WIDTHS) * DTYPE.itemsize
    return [
        [torch.randn(rows, width, generator=generator).to(DTYPE) for width in WIDTHS]
        for _ in range(max(3, -(-INPUT_BYTES // bytes_per_set)))
    ]


def check(contender: Contender, tokens: Sequence[Sequence[Tensor]], weight: Tensor, bias: Tensor) -> None:
    """Exits unless the contender scores these tokens as the float64 reference does.

    The unit is what `logits_dtype` rounds: eps times sum |W x|, averaged over the tokens. The factor 4 allows for a
    gate as wrong as the reward; an error in what is computed exceeds it a thousandfold.
    """
    rows = tokens[0][0].shape[0]
    device = weight.device
    sums = torch.zeros(rows, 2, dtype=torch.float64, device=device)
    token_count = torch.zeros(rows, dtype=torch.int32, device=device)
    contender.reset()
    scale = torch.zeros(rows, dtype=torch.float64, device=device)
    for hidden_states in tokens:
        contender.step(hidden_states)
        reference.score_step(hidden_states, weight, bias, torch.arange(rows, device=device), sums, token_count)
        features = torch.cat(list(hidden_states), dim=1).double()
        scale += (features.abs() @ weight.double().abs().T).amax(dim=1) / len(tokens)
    error = (contender.scores() - reference.finalize(sums, token_count)).abs() / scale
    allowed = 4 * torch.finfo(contender.logits_dtype).eps
    if not (error <= allowed).all() or not torch.equal(contender.token_count, token_count):
        sys.exit(f"{contender.name} scores otherwise than the reference: {error.max():.1e} of sum |W x|; not timed")
    contender.reset()


def print_tables(result: dict[str, Any]) -> None:
    console = Console(width=max(120, Console().width))
    environment = result["environment"]
    console.print(
        f"[bold]score_step[/] at {len(WIDTHS)} x {WIDTHS[0]} {DTYPE}, implementation {result['implementation']!r}, on "
        f"{environment['device']}, {environment['threads']} threads, {result['clock']}, torch {environment['torch']}"
    )
    for rows, measured in result["rows"].items():
        print_rows(console, rows, measured, "seconds")
        if measured["replay_seconds"]:
            print_rows(console, rows, measured, "replay_seconds")


def print_rows(console: Console, rows: int, measured: dict[str, Any], clock: str) -> None:
    summaries = {
        name: common.Summary.of(samples) for name, samples in measured[clock].items() if len(samples) >= FEWEST_SAMPLES
    }
    floor = measured["read_bandwidth_by"]
    if "swift_kernels" not in summaries or len(measured["read_bandwidth"][floor]) < FEWEST_SAMPLES:
        console.print(f"{rows} rows: no figure, other processes kept the cores busy\n")
        return
    mine = summaries["swift_kernels"].median
    bandwidth = common.Summary.of(measured["read_bandwidth"][floor])
    table = Table(
        title=f"{rows} rows, {CLOCKS[clock]}: a step reads {measured['bytes'] / 1e6:.2f} MB, hidden states and weights",
        title_justify="left",
    )
    for column in ("", "median us", "95% interval", "times ours", "of bandwidth", "samples"):
        table.add_column(column, justify="right" if column else "left", no_wrap=True)
    for name, samples in measured[clock].items():
        if name not in summaries:
            table.add_row(name, "disturbed", "", "", "", str(len(samples)))
            continue
        summary = summaries[name]
        table.add_row(
            name,
            f"{summary.median * 1e6:.1f}",
            f"{summary.low * 1e6:.1f} .. {summary.high * 1e6:.1f}",
            f"{summary.median / mine:.2f}",
            f"{measured['bytes'] / summary.median / bandwidth.median:.0%}",
            str(len(samples)),
        )
    console.print(table)
    rate, low, high = (f"{value / 1e9:.1f}" for value in (bandwidth.median, bandwidth.low, bandwidth.high))
    console.print(
        f"Memory is read at {rate} ({low} .. {high}) GB/s by torch's {floor} of {common.FLOOR_BYTES >> 20} MiB. "
        f"{measured['calls']} calls of each contender; a call that waited for a core is left out."
    )
    if clock == "seconds" and measured["streamed_seconds"]:
        streamed = common.Summary.of(measured["streamed_seconds"])
        console.print(
            f"Ours call after call through {measured['input_sets']} sets of inputs: {streamed.median * 1e6:.1f} us "
            f"({streamed.low * 1e6:.1f} .. {streamed.high * 1e6:.1f}), "
            f"{measured['hidden_states_bytes'] / streamed.median / bandwidth.median:.0%} of bandwidth for the hidden "
            "states alone, as the weights stay in the cache.\n"
        )


if __name__ == "__main__":
    main()
