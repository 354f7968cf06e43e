"""Runs the tests of the Triton ops under Triton's interpreter, which has to be chosen before triton is imported."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("triton")

from tests.ops import approximations

WITHOUT_APPROXIMATIONS = [
    *("bitwise", "bits", "chunks", "project", "gradient_over", "gradient_does", "gradient_of_a"),
    *("metadata", "checked", "debug", "every_run", "many_entries"),
]
"""Words in the names of tests that no exponential, quotient or root decides, and that take three quarters of the time.
Under a pattern of errors they are left out here; `approximations.py` has the command that runs them all."""


@pytest.mark.slow
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="already under the interpreter")
@pytest.mark.parametrize("pattern", [None, *approximations.PATTERNS], ids=lambda pattern: pattern or "exact")
def test_ops_under_the_interpreter(pattern):
    folder = Path(__file__).parent
    files = [str(folder / f"test_{op}.py") for op in ("score_step", "rms_norm_score", "sequence")]
    command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", "-m", "not gpu", *files]
    # One thread: the arrays are small, and numpy's and PyTorch's threads only wait for each other.
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    if pattern:
        environment["APPROXIMATION"] = pattern
        command += ["-p", "tests.ops.approximations"]
        command += ["-k", " and ".join(f"not {word}" for word in WITHOUT_APPROXIMATIONS)]
    run = subprocess.run(command, env=environment, cwd=folder.parents[1], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-2000:]
    assert " passed" in run.stdout
    assert ("approximations as on a GPU" in run.stdout) == bool(pattern)


@pytest.mark.parametrize("pattern", approximations.PATTERNS)
def test_the_errors_are_as_large_as_a_gpu_may_make_them_and_no_larger(pattern):
    x = np.random.default_rng(0).uniform(-8, 8, 20_000).astype(np.float32)
    positive = np.abs(x) + np.float32(0.1)
    power = np.exp2((x * approximations.LOG2_E).astype(np.float64))
    quotient, root = x.astype(np.float64) / positive, positive.astype(np.float64) ** -0.5
    for compute, operands, exact, bound in (
        (approximations.exp, (x,), power, approximations.EXP2_ERROR * power),
        (approximations.divide, (x, positive), quotient, 2 * np.spacing(np.abs(quotient).astype(np.float32))),
        (approximations.rsqrt, (positive,), root, approximations.RSQRT_ERROR * root),
    ):
        found = compute(*operands, pattern)
        assert 0.9 < (np.abs(found.astype(np.float64) - exact) / bound).max() <= 1
        assert np.array_equal(compute(*(each[::-1] for each in operands), pattern), found[::-1]), "of the operand alone"
