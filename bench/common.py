"""What the benchmarks share: timing, medians with intervals, bandwidth floors, and the files in `results/`."""

from __future__ import annotations

import json
import math
import os
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import swift_kernels

RESULTS = Path(__file__).parent / "results"

FLOOR_BYTES = 1 << 28
"""Far beyond any last-level cache."""

DISTURBED = 0.02
"""The share of a call's time that its threads may wait for a core: beyond it, the call timed its neighbours."""


@dataclass(frozen=True)
class Summary:
    """Median of some samples, and the interval that covers the true median with 95% confidence."""

    median: float
    low: float
    high: float

    @staticmethod
    def of(samples: Sequence[float]) -> Summary:
        ordered = sorted(samples)
        # Ranks from the binomial distribution (normal approximation): they assume no shape of the distribution.
        spread = 1.96 * math.sqrt(len(ordered)) / 2
        low = max(0, math.floor(len(ordered) / 2 - spread))
        high = min(len(ordered) - 1, math.ceil(len(ordered) / 2 + spread))
        return Summary(statistics.median(ordered), ordered[low], ordered[high])


def choose_device(name: str | None) -> torch.device:
    return torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))


def cpu_seconds(call: Callable[[], object]) -> float:
    """CPU time of one call that keeps to this thread: what it would take if it never had to wait for a core."""
    start = time.thread_time()
    call()
    return time.thread_time() - start


def seconds(call: Callable[[], object]) -> float | None:
    """Wall time of one call on the CPU; None if a thread of this process had to wait for a core meanwhile."""
    waited = seconds_without_core()
    start = time.perf_counter()
    call()
    elapsed = time.perf_counter() - start
    return elapsed if seconds_without_core() - waited <= DISTURBED * elapsed else None


def seconds_without_core() -> float:
    """How long threads of this process have been ready to run while others had the cores; 0 where that is unknown."""
    nanoseconds = 0
    for schedstat in Path("/proc/self/task").glob("*/schedstat"):
        with suppress(OSError, IndexError):  # a thread may end while it is looked at
            nanoseconds += int(schedstat.read_text().split()[1])
    return nanoseconds * 1e-9


def cuda_seconds(call: Callable[[], object]) -> float:
    """Wall time of one call on an idle GPU, launch and all, until the GPU is done."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def replay_seconds(calls: Sequence[Callable[[], object]], repeats: int) -> list[float]:
    """Time of a call without its launch: all of `calls` captured into one CUDA graph, replayed `repeats` times."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    samples = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        samples.append(start.elapsed_time(end) * 1e-3 / len(calls))
    return samples


class ReadBandwidth:
    """The rate at which this machine's memory can be read, in bytes a second: the best of torch's reductions of a
    buffer far larger than its caches. Sample it between the measurements that it is to be compared with."""

    def __init__(self, seconds: Callable[[Callable[[], object]], float | None], device: torch.device) -> None:
        buffer = torch.ones(FLOOR_BYTES // 4, device=device)
        self._seconds = seconds
        self._reductions: dict[str, Callable[[], object]] = {
            "sum": buffer.sum,
            "amax": buffer.amax,
            "dot": lambda: torch.dot(buffer, buffer),
        }
        self.samples: dict[str, list[float]] = {name: [] for name in self._reductions}

    def sample(self) -> None:
        for name, reduction in self._reductions.items():
            if elapsed := self._seconds(reduction):
                self.samples[name].append(FLOOR_BYTES / elapsed)

    def best(self) -> str:
        return max(self.samples, key=lambda name: statistics.median(self.samples[name] or [0.0]))


def environment(device: torch.device) -> dict[str, Any]:
    """What a reader needs to judge or to repeat a measurement."""
    return {
        "device": device_name(device),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "swift_kernels": swift_kernels.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "commit": git_commit(),
        "load_average": os.getloadavg(),
    }


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        with open("/proc/cpuinfo") as cpuinfo:
            models = [line.split(":", 1)[1].strip() for line in cpuinfo if line.startswith("model name")]
    except OSError:
        models = []
    return f"{models[0] if models else platform.machine()} ({os.cpu_count()} cpus)"


def git_commit() -> str:
    """The commit that was measured, with "+changes" where the tree, but for results, differed from it."""
    folder = Path(__file__).parent

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments], cwd=folder, capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        changes = git("status", "--porcelain", "--", ":/", f":(exclude){RESULTS.relative_to(folder)}")
        return git("rev-parse", "HEAD") + ("+changes" if changes else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def write_result(device: torch.device, name: str, result: dict[str, Any]) -> Path:
    """Writes `results/<device>/<name>.json`, complete or not at all."""
    slug = re.sub(r"[^a-z0-9]+", "-", device_name(device).lower()).strip("-")
    path = RESULTS / slug / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_text(json.dumps(result, indent=1) + "\n")
    temporary.replace(path)
    return path
