"""What stages measure on a GPU, gone through as if there were one: code that no quick run on a CPU reaches."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench.stages import STAGES, Benchmark, benchmark

STEPS = [*STAGES[1], *STAGES[2], benchmark("decode", "--models", "8b/2", "--rows", "2", "--how", "compiled", limit=1)]
# What a launch costs is asked of Triton's own launcher.
BENCHMARKS = {step.name: step for step in STEPS if isinstance(step, Benchmark) and step.module != "launch_cost"}
QUICKER = {"best_of_n": ("--new-tokens", "4"), "memory": ("--lengths", "32,2048")}
MODES = {
    "score_step": ("clock", {"called", "replayed"}),
    "decode": ("mode", {"eager", "compiled", "eager, CUDA graph", "compiled, CUDA graph"}),
}


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tests.pretend_cuda", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


@pytest.mark.slow
@pytest.mark.parametrize("step", BENCHMARKS.values(), ids=BENCHMARKS)
def test_a_benchmark_of_the_stages(tmp_path: Path, step: Benchmark) -> None:
    arguments = [*step.arguments[1:], *QUICKER.get(step.module, ())]
    done = run(*arguments, "--samples", "2", "--device", "cuda", "--results", str(tmp_path))
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "pretended" / f"{step.module}.json").read_text())
    for case in result["cases"]:
        assert "without" not in case["note"]
        assert "not timed" not in case["note"]
        assert all(any(samples) for samples in case["samples"].values()), "every contender"
    if step.module in MODES:
        label, every = MODES[step.module]
        found = {case["labels"][label] for case in result["cases"]}
        assert len(found) == 2
        assert "\n0 graphs were replayed" not in done.stderr
        assert found <= every


@pytest.mark.slow
def test_launches_on_two_streams() -> None:
    done = run("bench.gpu_stress", "--launches", "200")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["wrong_steps"] == 0
