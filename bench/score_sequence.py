"""Measures scoring whole answers, and the gradients that training needs, at the shape of Llama-3.1-8B (33 x 4096,
bfloat16) against the authors' way and a better-written one.

    python bench/score_sequence.py [--sequences 16] [--mean-length 128] [--quick] [--json] [--threads 1] [--device cpu]

Contenders take turns within a round; the hidden states are larger than any cache. Before anything is timed, scores and
gradients of all must agree with a float64 reference; where they do not, no figure is printed. Peak memory beyond the
inputs is that of one call in a process of its own.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import os
import re
import resource
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import common
import torch
import torch.nn.functional as F  # noqa: N812
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from swift_kernels import reference, schema

WIDTHS = [4096] * 33
DTYPE = torch.bfloat16
SEQUENCES = {"cpu": 16, "cuda": 64}
MEAN_LENGTH = {"cpu": 128, "cuda": 256}
"""The hidden states take 554 MB on a CPU, 4.4 GB on a GPU; upstream's path some eight times as much on top."""

INPUT_BYTES = 300 << 20
"""Inputs that are rotated through where one is smaller."""

SAMPLES = 15
FEWEST_SAMPLES = 5
"""A contender with fewer undisturbed calls gets no figure."""

PATIENCE = 2
"""Rounds for each sample that is asked for, before a busy machine is given up on."""

MODES = ("forward", "forward + backward")

Scores = Callable[[Sequence[Tensor], Tensor], Tensor]


@dataclass
class Packed:
    """The hidden states of some answers, one after the other, and a gradient of their scores."""

    hidden_states: list[Tensor]
    cu_seqlens: Tensor
    grad_scores: Tensor

    @property
    def nbytes(self) -> int:
        return sum(entry.nbytes for entry in self.hidden_states)


@dataclass
class Contender:
    """One way to score packed sequences; `parameters` are the weight and the bias it has gradients for."""

    name: str
    scores: Scores
    parameters: list[Tensor]

    def forward(self, packed: Packed) -> Tensor:
        with torch.no_grad():
            return self.scores(packed.hidden_states, packed.cu_seqlens)

    def backward(self, packed: Packed) -> tuple[Tensor, ...]:
        scores = self.scores(packed.hidden_states, packed.cu_seqlens)
        return torch.autograd.grad(scores, self.parameters, packed.grad_scores)

    def call(self, mode: str) -> Callable[[Packed], object]:
        return self.forward if mode == MODES[0] else self.backward


def main() -> None:
    arguments = parse_arguments()
    device = common.choose_device(arguments.device)
    torch.set_num_threads(arguments.threads or torch.get_num_threads())
    lengths = make_lengths(
        arguments.sequences or SEQUENCES[device.type], arguments.mean_length or MEAN_LENGTH[device.type]
    )
    if arguments.peak_of:
        name, mode = arguments.peak_of
        print(peak_bytes(contender_of(name, device), mode, make_packed(lengths, device, 0)))
        return
    if device.type == "cuda":
        seconds: Callable[..., float | None] = common.cuda_seconds
    else:
        seconds = common.seconds if torch.get_num_threads() > 1 else common.cpu_seconds
    result = {
        "environment": common.environment(device),
        "clock": seconds.__name__,
        "implementation": schema.implementation(device.type),
        "widths": WIDTHS,
        "dtype": str(DTYPE),
        "lengths": lengths,
        "peak_bytes": {
            mode: {name: peak_in_a_process(name, mode, lengths, device) for name in CONTENDERS} for mode in MODES
        },
        **measure(lengths, SAMPLES // (3 if arguments.quick else 1), seconds, device),
    }
    name = "score_sequence" if arguments.threads is None else f"score_sequence_{arguments.threads}_threads"
    path = common.write_result(device, name, result)
    if arguments.json:
        print(json.dumps(result))
    else:
        print_tables(result)
        print(f"every sample: {path}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sequences", type=int, help="16 on a CPU, 64 on a GPU")
    parser.add_argument("--mean-length", type=int, help="tokens of a sequence; 128 on a CPU, 256 on a GPU")
    parser.add_argument("--quick", action="store_true", help="a third of the samples")
    parser.add_argument("--json", action="store_true", help="print the result as JSON instead of a table")
    parser.add_argument(
        "--threads", type=int, help="threads to use; with 1, CPU time is measured, even on a busy machine"
    )
    parser.add_argument("--device", help="cpu or cuda; by default cuda where there is one")
    parser.add_argument("--peak-of", nargs=2, metavar=("CONTENDER", "MODE"), help=argparse.SUPPRESS)
    return parser.parse_args()


def measure(
    lengths: Sequence[int], wanted: int, seconds: Callable[[Callable[[], object]], float | None], device: torch.device
) -> dict[str, Any]:
    first = make_packed(lengths, device, 0)
    sets = [first, *(make_packed(lengths, device, seed) for seed in range(1, -(-INPUT_BYTES // first.nbytes)))]
    contenders = [contender_of(name, device) for name in CONTENDERS]
    print(f"{sum(lengths)} tokens: checking and warming up {len(contenders)} contenders", file=sys.stderr)
    check(contenders, first)

    bandwidth = common.ReadBandwidth(seconds, device)
    next_input = itertools.cycle(sets).__next__
    samples: dict[str, dict[str, list[float]]] = {
        mode: {contender.name: [] for contender in contenders} for mode in MODES
    }
    calls = 0
    while calls < PATIENCE * wanted and min(len(s) for of_mode in samples.values() for s in of_mode.values()) < wanted:
        bandwidth.sample()
        # Nobody always follows the same neighbour: who runs second finds another cache than who runs third.
        turn = calls % len(contenders)
        for mode in MODES:
            for contender in contenders[turn:] + contenders[:turn]:
                elapsed = seconds(functools.partial(contender.call(mode), next_input()))
                if elapsed is not None:
                    samples[mode][contender.name].append(elapsed)
        calls += 1
    weight_bytes = contenders[0].parameters[0].nbytes
    return {
        "hidden_states_bytes": first.nbytes,
        # What has to be read: the hidden states once in each direction, and the weights.
        "bytes": {mode: (index + 1) * first.nbytes + weight_bytes for index, mode in enumerate(MODES)},
        "calls": calls,
        "seconds": samples,
        "read_bandwidth": bandwidth.samples,
        "read_bandwidth_by": bandwidth.best(),
        "input_sets": len(sets),
    }


def make_lengths(sequences: int, mean: int) -> list[int]:
    """From a quarter of the mean to seven quarters of it, in an order that is not sorted."""
    lengths = [
        max(1, round(mean * (0.25 + 1.5 * index / (sequences - 1)))) if sequences > 1 else mean
        for index in range(sequences)
    ]
    return [*lengths[::2], *lengths[1::2]]


def make_packed(lengths: Sequence[int], device: torch.device, seed: int) -> Packed:
    generator = torch.Generator(device).manual_seed(seed)
    tokens = sum(lengths)
    # Each as wide as it will be: a buffer in float32 for all would stay with the process, and hide what comes later.
    hidden_states = [torch.empty(tokens, width, dtype=DTYPE, device=device) for width in WIDTHS]
    for entry in hidden_states:
        entry.normal_(generator=generator)
    return Packed(
        hidden_states,
        torch.tensor([0, *itertools.accumulate(lengths)], device=device),
        torch.randn(len(lengths), generator=generator, device=device),
    )


def make_parameters(device: torch.device) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    features = sum(WIDTHS)
    weight = torch.randn(2, features, generator=generator) / features**0.5
    return weight.to(device), torch.randn(2, generator=generator).to(device)


def ours(weight: Tensor, bias: Tensor) -> Contender:
    def scores(hidden_states: Sequence[Tensor], cu_seqlens: Tensor) -> Tensor:
        return schema.score_sequence(hidden_states, weight, bias, cu_seqlens)[0][:, 0]

    return Contender("swift_kernels", scores, [weight.requires_grad_(), bias.requires_grad_()])


def upstream(weight: Tensor, bias: Tensor) -> Contender:
    """As the authors' code does: every layer to float32, concatenated, padded, through one nn.Linear."""
    linear = nn.Linear(weight.shape[1], 2, device=weight.device)
    with torch.no_grad():
        linear.weight.copy_(weight)
        linear.bias.copy_(bias)

    def scores(hidden_states: Sequence[Tensor], cu_seqlens: Tensor) -> Tensor:
        features = torch.cat([entry.float() for entry in hidden_states], dim=1)
        lengths = cu_seqlens.diff()
        padded = nn.utils.rnn.pad_sequence(list(features.split(lengths.tolist())), batch_first=True)
        mask = torch.arange(padded.shape[1], device=padded.device) < lengths[:, None]
        output = linear(padded)
        gates = torch.sigmoid(output[..., 0]) * mask
        return (gates * output[..., 1]).sum(1) / gates.sum(1).clamp(min=1e-8)

    return Contender("upstream", scores, [linear.weight, linear.bias])


def per_layer(weight: Tensor, bias: Tensor) -> Contender:
    """Neither concatenates nor pads: one F.linear a layer, and the sums of each sequence by index_add."""

    def scores(hidden_states: Sequence[Tensor], cu_seqlens: Tensor) -> Tensor:
        output = bias
        for entry, columns in zip(hidden_states, weight.split(WIDTHS, dim=1), strict=True):
            output = output + F.linear(entry.float(), columns)
        lengths = cu_seqlens.diff()
        sequence = torch.repeat_interleave(lengths, output_size=output.shape[0])
        gates = torch.sigmoid(output[:, 0])
        terms = torch.stack([gates * output[:, 1], gates], dim=1)
        sums = terms.new_zeros(lengths.numel(), 2).index_add(0, sequence, terms)
        return sums[:, 0] / sums[:, 1].clamp(min=1e-8)

    return Contender("per layer, fp32", scores, [weight.requires_grad_(), bias.requires_grad_()])


CONTENDERS = {"swift_kernels": ours, "upstream": upstream, "per layer, fp32": per_layer}


def contender_of(name: str, device: torch.device) -> Contender:
    return CONTENDERS[name](*make_parameters(device))


def check(contenders: Sequence[Contender], packed: Packed) -> None:
    """Exits unless scores and gradients are those of the float64 reference.

    The unit of a score is eps times the gate-weighted mean of sum |W x|; that of a gradient is what an error of eps in
    the gradient of every logit, and of eps sum |W x| in the logit, may add up to. The factor 4 allows for a gate as
    wrong as the reward; an error in what is computed exceeds it a thousandfold.
    """
    eps = torch.finfo(torch.float32).eps
    weight, bias = (parameter.detach().double() for parameter in contenders[0].parameters)
    cu_seqlens, hidden_states = packed.cu_seqlens, packed.hidden_states
    with torch.no_grad():
        logits = reference.project(hidden_states, weight, bias)
        scores, gate_reward = reference.pool(logits, cu_seqlens)
        grad_scores = packed.grad_scores.double()[:, None]
        grad_logits = reference.pool_backward(grad_scores, scores, gate_reward, cu_seqlens)
        magnitude = torch.zeros_like(logits)
        for entry, columns in zip(hidden_states, weight.split(WIDTHS, dim=1), strict=True):
            magnitude += entry.double().abs() @ columns.abs().T
        magnitude = magnitude.amax(dim=1, keepdim=True)
        unit, _ = reference.pool(torch.cat([logits[:, :1], magnitude], dim=1), cu_seqlens)
        shares = reference.pool_backward(grad_scores.abs(), torch.zeros_like(scores), gate_reward, cu_seqlens)[:, 1:]
        grad_units = grad_logits.abs() + shares * magnitude
        expected = {
            "scores": (scores[:, 0], unit[:, 0]),
            "the gradient of the weight": (
                reference.project_backward(hidden_states, grad_logits),
                reference.project_backward([entry.abs() for entry in hidden_states], grad_units),
            ),
            "the gradient of the bias": (grad_logits.sum(0), grad_units.sum(0)),
        }
    for contender in contenders:
        results = (contender.forward(packed), *contender.backward(packed))
        for (what, (value, unit)), result in zip(expected.items(), results, strict=True):
            error = (result - value).abs() / (eps * unit)
            if not (error <= 4).all():
                sys.exit(f"{contender.name}: {what} is off by {float(error.max()):.1f} units of rounding; not timed")


def peak_in_a_process(name: str, mode: str, lengths: Sequence[int], device: torch.device) -> int:
    options = ["--device", device.type, "--threads", str(torch.get_num_threads()), "--peak-of", name, mode]
    shape = ["--sequences", str(len(lengths)), "--mean-length", str(round(sum(lengths) / len(lengths)))]
    command = [sys.executable, str(Path(__file__).resolve()), *options, *shape]
    # glibc would keep what the warm-up freed, and the call would seem to need less than it does.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    return int(subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout)


def peak_bytes(contender: Contender, mode: str, packed: Packed) -> int:
    """How much more memory than before a call uses at its height; libraries and kernels have been loaded before."""
    call = contender.call(mode)
    device = packed.cu_seqlens.device
    call(make_packed([1, 2], device, 0))
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call(packed)
        return torch.cuda.max_memory_allocated() - before
    with suppress(OSError):  # where the kernel does not let the mark be reset, what the inputs took counts as well
        Path("/proc/self/clear_refs").write_text("5")
    before = resident_bytes()
    call(packed)
    return peak_resident_bytes() - before


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def peak_resident_bytes() -> int:
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(found[1]) << 10 if found else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def print_tables(result: dict[str, Any]) -> None:
    console = Console(width=max(120, Console().width))
    environment = result["environment"]
    console.print(
        f"[bold]score_sequence[/] at {len(WIDTHS)} x {WIDTHS[0]} {DTYPE}, implementation "
        f"{result['implementation']!r}, on {environment['device']}, {environment['threads']} threads, "
        f"{result['clock']}, torch {environment['torch']}"
    )
    lengths = result["lengths"]
    console.print(
        f"{len(lengths)} sequences of {min(lengths)} to {max(lengths)} tokens, {sum(lengths)} in all: "
        f"{result['hidden_states_bytes'] / 1e6:.0f} MB of hidden states"
    )
    floor = result["read_bandwidth_by"]
    if len(result["read_bandwidth"][floor]) < FEWEST_SAMPLES:
        console.print("no figure, other processes kept the cores busy")
        return
    bandwidth = common.Summary.of(result["read_bandwidth"][floor])
    for mode in MODES:
        console.print(table_of(result, mode, bandwidth.median))
    rate, low, high = (f"{value / 1e9:.1f}" for value in (bandwidth.median, bandwidth.low, bandwidth.high))
    console.print(
        f"Memory is read at {rate} ({low} .. {high}) GB/s by torch's {floor} of {common.FLOOR_BYTES >> 20} MiB. "
        f"{result['calls']} calls of each contender; a call that waited for a core is left out."
    )


def table_of(result: dict[str, Any], mode: str, bandwidth: float) -> Table:
    table = Table(title=f"{mode}: reads {result['bytes'][mode] / 1e6:.0f} MB at least", title_justify="left")
    for column in ("", "median ms", "95% interval", "times ours", "of bandwidth", "peak MB", "times ours", "samples"):
        table.add_column(column, justify="right" if column else "left", no_wrap=True)
    every, peaks = result["seconds"][mode], result["peak_bytes"][mode]
    mine = common.Summary.of(every["swift_kernels"]).median if every["swift_kernels"] else float("nan")
    for name, samples in every.items():
        memory = [f"{peaks[name] / 1e6:.1f}", f"{peaks[name] / max(peaks['swift_kernels'], 1):.1f}"]
        if len(samples) < FEWEST_SAMPLES:
            table.add_row(name, "disturbed", "", "", "", *memory, str(len(samples)))
            continue
        summary = common.Summary.of(samples)
        table.add_row(
            name,
            f"{summary.median * 1e3:.1f}",
            f"{summary.low * 1e3:.1f} .. {summary.high * 1e3:.1f}",
            f"{summary.median / mine:.2f}",
            f"{result['bytes'][mode] / summary.median / bandwidth:.0%}",
            *memory,
            str(len(samples)),
        )
    return table


if __name__ == "__main__":
    main()
