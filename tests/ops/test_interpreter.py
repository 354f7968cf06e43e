"""Runs the tests of the Triton ops under Triton's interpreter, which has to be chosen before triton is imported."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")


@pytest.mark.slow
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="already under the interpreter")
def test_ops_under_the_interpreter():
    folder = Path(__file__).parent
    files = [str(folder / f"test_{op}.py") for op in ("score_step", "rms_norm_score", "sequence")]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-m", "not gpu", *files]
    # One thread: the arrays are small, and numpy's and PyTorch's threads only wait for each other.
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, env=environment, cwd=folder.parents[1], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-2000:]
    assert " passed" in run.stdout
