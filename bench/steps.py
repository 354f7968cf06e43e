"""Commands that end in time, whatever they do with the signals that ask them to."""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
LOOK_EVERY = 10.0
"""Seconds after which what a command has written so far is kept."""
_LIBC, PR_SET_PDEATHSIG = ctypes.CDLL(None), 1
GONE = 5.0
"""Seconds that a killed process is waited for: one that is stuck in a driver may stay."""


@dataclass(frozen=True)
class Outcome:
    """How a step ended: the exit status of its command, None where it was ended or not run, and what is to be said."""

    status: int | None
    seconds: float
    failed: bool
    why: str = ""

    @property
    def succeeded(self) -> bool:
        return self.status == 0

    def text(self) -> str:
        return self.why or f"exit status {self.status} after {self.seconds:.0f} s"


def not_run(why: str) -> Outcome:
    return Outcome(None, 0.0, False, f"not run: {why}")


def run(
    command: Sequence[str],
    limit: float,
    log: Path,
    environment: Mapping[str, str],
    meanwhile: Callable[[], None] = lambda: None,
    fine: Sequence[int] = (0,),
    grace: float = 3.0,
) -> Outcome:
    """Runs a command for at most `limit` seconds, with what it prints appended to `log`; `fine` are no failures.

    It is interrupted `grace` seconds before, as by Ctrl-C, and killed in the end, with all that it has started. It
    writes into the file, not into a pipe that somebody it has left behind could hold open.
    """
    if shutil.which(command[0]) is None:
        return not_run(f"{command[0]} is not on the PATH")
    start = time.monotonic()
    try:
        output = log.open("ab")
    except OSError:  # a full disk: that it runs is worth more than what it prints
        output = open(os.devnull, "ab")  # noqa: SIM115
    with output:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, **environment},
            stdout=output,
            stderr=output,
            start_new_session=True,
            preexec_fn=_end_with_parent if sys.platform == "linux" else None,
        )
    try:
        interrupted = not _wait(process, start + max(limit - grace, limit / 2), meanwhile)
        if interrupted:
            _signal(process, signal.SIGINT)
            _wait(process, start + limit, meanwhile)
    finally:
        _signal(process, signal.SIGKILL)  # and to whom it has left behind
        with suppress(subprocess.TimeoutExpired):
            process.wait(GONE)
    seconds = round(time.monotonic() - start, 1)
    if interrupted:
        return Outcome(None, seconds, True, f"ended after {seconds:.0f} s, its limit")
    return Outcome(process.returncode, seconds, process.returncode not in fine)


def seconds_since_start() -> float:
    """How long this process has been there, its imports included; 0 where that is unknown."""
    with suppress(OSError, IndexError, ValueError):
        ticks = float(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        running = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
        return min(max(running, 0.0), 60.0)
    return 0.0


def end_what_runs_when_ended() -> None:
    """Has this process end what it runs when it is asked to end itself, and its children heed interrupts.

    A shell has what it runs in the background ignore interrupts, and children inherit that.
    """

    def end(number: int, _frame: Any) -> None:
        raise SystemExit(128 + number)

    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, end)


def _end_with_parent() -> None:
    """Also where the parent is killed and cannot."""
    _LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _wait(process: subprocess.Popen[bytes], until: float, meanwhile: Callable[[], None]) -> bool:
    """Whether it ended in time."""
    while (left := until - time.monotonic()) > 0:
        try:
            process.wait(min(left, LOOK_EVERY))
            return True
        except subprocess.TimeoutExpired:
            meanwhile()
    return process.poll() is not None


def _signal(process: subprocess.Popen[bytes], number: int) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, number)
