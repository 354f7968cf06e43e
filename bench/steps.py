"""Commands that end in time, whatever they do with the signals that ask them to."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from bench.harness import LEFT_OUT, NOT_HERE

ROOT = Path(__file__).resolve().parents[1]
TIMED_OUT = 124
FINE = (0, LEFT_OUT, NOT_HERE)
"""Exit statuses that are no failure."""
GRACE = 5.0
"""Seconds between the interrupt, after which pytest writes what it has, and the kill."""
LOOK_EVERY = 10.0
"""Seconds after which what a command has written so far is saved."""


@dataclass(frozen=True)
class Outcome:
    """How a command ended: its exit status, or TIMED_OUT, or NOT_HERE where it was not run, with the reason."""

    status: int
    seconds: float
    why: str = ""

    def text(self) -> str:
        return self.why or f"exit status {self.status} after {self.seconds:.0f} s"


def run(
    command: Sequence[str],
    limit: float,
    log: Path,
    environment: Mapping[str, str],
    meanwhile: Callable[[], None] = lambda: None,
) -> Outcome:
    """Runs a command for at most `limit` seconds, with what it prints appended to `log`.

    It is interrupted GRACE seconds before, as by Ctrl-C, and killed in the end, with all that it has started. It writes
    into the file, not into a pipe that somebody it has left behind could hold open.
    """
    if shutil.which(command[0]) is None:
        return Outcome(NOT_HERE, 0.0, f"not run: {command[0]} is not on the PATH")
    start = time.monotonic()
    with log.open("ab") as output:
        process = subprocess.Popen(
            command, cwd=ROOT, env={**os.environ, **environment}, stdout=output, stderr=output, start_new_session=True
        )
    try:
        interrupted = not _wait(process, start + max(limit - GRACE, 0.0), meanwhile)
        if interrupted:
            os.killpg(process.pid, signal.SIGINT)
            _wait(process, start + limit, meanwhile)
    finally:
        _kill(process)  # and whom it has left behind
    seconds = round(time.monotonic() - start, 1)
    if interrupted:
        return Outcome(TIMED_OUT, seconds, f"ended after {seconds:.0f} s, its limit")
    return Outcome(process.returncode, seconds)


def _wait(process: subprocess.Popen[bytes], until: float, meanwhile: Callable[[], None]) -> bool:
    """Whether it ended in time."""
    while (left := until - time.monotonic()) > 0:
        try:
            process.wait(min(left, LOOK_EVERY))
            return True
        except subprocess.TimeoutExpired:
            meanwhile()
    return process.poll() is not None


def _kill(process: subprocess.Popen[bytes]) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
