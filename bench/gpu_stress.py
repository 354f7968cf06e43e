"""Looks for a race in `score_step`: launches on two streams with two states, while L2 is overwritten again and again.

    python -m bench.gpu_stress --launches 100000

The partial sums of a program travel through L2 to the last one to finish. Were one read before it arrived, a step would
see a sum of another step. So the inputs change from launch to launch, and every launch's gates and rewards are compared
bitwise with those of the same inputs scored alone.
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

import torch

from swift_kernels import schema
from swift_kernels.state import ScoreState

INPUT_SETS = 8
THRASH_EVERY = 16


class _Load:
    """One state, its stream, and inputs of which each launch takes the next."""

    def __init__(self, widths: tuple[int, ...], rows: int, seed: int) -> None:
        generator = torch.Generator("cuda").manual_seed(seed)
        features = sum(widths)
        self.stream = torch.cuda.Stream()
        self.state = ScoreState(rows, widths, "cuda")
        self.weight = torch.randn(2, features, device="cuda", generator=generator) / features**0.5
        self.bias = torch.zeros(2, device="cuda")
        self.slots = torch.randperm(rows, device="cuda", generator=generator)
        self.inputs = [
            [torch.randn(rows, width, device="cuda", generator=generator).bfloat16() for width in widths]
            for _ in range(INPUT_SETS)
        ]
        self.gate_reward = torch.zeros(rows, 2, device="cuda")
        self.wrong_steps = torch.zeros((), dtype=torch.int64, device="cuda")
        self.expected: list[torch.Tensor] = []

    def step(self, launch: int) -> None:
        schema.score_step(
            self.inputs[launch % INPUT_SETS],
            self.weight,
            self.bias,
            self.slots,
            self.state.sums,
            self.state.token_count,
            self.state.partials,
            self.state.arrivals,
            self.gate_reward,
        )

    def compare(self, launch: int) -> None:
        self.wrong_steps += (self.gate_reward != self.expected[launch % INPUT_SETS]).any()


def stress(launches: int, rows: int = 64, widths: tuple[int, ...] = (4096,) * 33) -> dict[str, Any]:
    """Runs `launches` steps, half on each of two streams, then the same on one stream for comparison."""
    if schema.implementation("cuda") != "triton":
        raise RuntimeError("score_step does not run on Triton here: there is nothing to stress")
    loads = [_Load(widths, rows, seed) for seed in range(2)]
    for load in loads:
        for index in range(INPUT_SETS):
            load.step(index)
            torch.cuda.synchronize()
            load.expected.append(load.gate_reward.clone())
        load.state.reset_()
    thrash = torch.zeros(2 * torch.cuda.get_device_properties(0).L2_cache_size // 4, device="cuda")
    torch.cuda.synchronize()

    start = time.perf_counter()
    per_stream = launches // 2
    for launch in range(per_stream):
        for load in loads:
            with torch.cuda.stream(load.stream):
                load.step(launch)
                load.compare(launch)
        if launch % THRASH_EVERY == 0:
            thrash.add_(1)
    torch.cuda.synchronize()
    seconds = time.perf_counter() - start

    equal = True
    for load in loads:
        sums, token_count = load.state.sums.clone(), load.state.token_count.clone()
        load.state.reset_()
        for launch in range(per_stream):
            load.step(launch)
        equal &= torch.equal(load.state.sums, sums) and torch.equal(load.state.token_count, token_count)
        equal &= bool((token_count == per_stream).all())
        equal &= not load.state.arrivals.any()
    return {
        "device": torch.cuda.get_device_name(),
        "launches": 2 * per_stream,
        "rows": rows,
        "wrong_steps": sum(int(load.wrong_steps) for load in loads),
        "states_equal_to_one_stream": equal,
        "seconds": round(seconds, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Looks for a race in score_step on the GPU.")
    parser.add_argument("--launches", type=int, default=100_000)
    parser.add_argument("--rows", type=int, default=64)
    options = parser.parse_args()
    result = stress(options.launches, options.rows)
    print(json.dumps(result))
    if result["wrong_steps"] or not result["states_equal_to_one_stream"]:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
