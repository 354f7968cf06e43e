"""A fit from the command line that is killed again and again ends as one that was left alone."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from swift_kernels.training import resume
from swift_kernels.training.rollouts import RolloutWriter
from tests.training.test_collection import make_job
from tests.training.test_stored import collected, graded

EPOCHS = 100


def make_store(model: Any, tokenizer: Any, folder: Path) -> list[str]:
    """Graded rollouts with their store; returns the arguments that train on them, but for the output."""
    job = make_job(model, tokenizer, folder, 12)
    _, rollouts = collected(job)
    job.output.unlink()
    with RolloutWriter(job.output, job.header) as writer:
        for item in graded(rollouts).rollouts:
            writer.write(item)
    return ["train", str(job.output), "--store", str(job.store)]


def epochs_done(checkpoint: Path) -> dict[str, int]:
    """How many epochs each phase of the fit has behind it."""
    if not checkpoint.exists():
        return {}
    with safe_open(checkpoint, framework="pt") as file:
        facts = json.loads(file.metadata()["facts"])
    return {phase: sweep["heads"][0]["epoch"] for phase, sweep in facts.items()}


def test_killed_while_it_writes_a_fit_leaves_only_what_the_next_one_removes(tmp_path: Path) -> None:
    """The system kills a process in the middle of a file that grows beyond what it may have."""
    path = tmp_path / "unfinished-fit.safetensors"
    code = f"""
import resource, signal, torch
from pathlib import Path
from swift_kernels.training import resume
signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
resume.save(Path({str(path)!r}), {{"weight": torch.zeros(2, 1000)}}, {{}}, {{}})
"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == -signal.SIGXFSZ
    left = list(tmp_path.iterdir())
    assert [file.suffix for file in left] == [".tmp"]
    resume.remove(path)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_killed_ten_times_it_ends_as_if_it_had_not_been(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    # The last epoch is kept, so that the refit takes as many.
    options = ["--epochs", str(EPOCHS), "--patience", str(EPOCHS), "--keep", "last"]
    command = [sys.executable, "-m", "swift_kernels", *make_store(model, tokenizer, tmp_path), *options]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([*command, "--output", str(whole)], check=True, capture_output=True, env=environment)
    checkpoint = killed / "unfinished-fit.safetensors"
    chance = random.Random(0)
    phases = []
    # In the fit and in the first half of the refit: a machine that is slow to kill finds it unfinished still.
    for least in sorted(chance.sample(range(1, EPOCHS * 3 // 2), 10)):
        process = subprocess.Popen(
            [*command, "--output", str(killed)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=environment,
        )
        deadline = time.monotonic() + 120
        while sum(epochs_done(checkpoint).values()) < least:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.001)
        # Anywhere in an epoch, or while the checkpoint is written.
        time.sleep(chance.uniform(0, 0.02))
        process.kill()
        assert process.wait() < 0, "it had ended by itself"
        phases.append(max(epochs_done(checkpoint)))
    assert set(phases) == {"0", "0 refit"}
    subprocess.run([*command, "--output", str(killed)], check=True, capture_output=True, env=environment)
    for name in ("model.safetensors", "config.json", "README.md"):
        assert (killed / name).read_bytes() == (whole / name).read_bytes()
    # Nor is anything left of what a killed run was writing.
    assert {path.name for path in killed.iterdir()} == {path.name for path in whole.iterdir()}
