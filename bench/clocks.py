"""How long a call takes: on the CPU, on a GPU with its launch, and replayed by a CUDA graph."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import torch

DISTURBED = 0.02
"""The share of a call's time that its threads may wait for a core: beyond it, the call timed its neighbours."""

BUSY_CYCLES, MOST_BUSY_CYCLES = 1_000_000, 256_000_000
"""Half a millisecond of a GPU, and an eighth of a second: how long it is kept busy while a graph is launched, at first
and at most."""

REPLAYED = 64
"""Steps in one graph, so that what a graph's start takes is little of a step."""

Call = Callable[[], object]
Clock = Callable[[Call], "float | None"]


def clock_for(device: torch.device) -> Clock:
    if device.type == "cuda":
        return cuda_seconds
    return wall_seconds if torch.get_num_threads() > 1 else cpu_seconds


def cpu_seconds(call: Call) -> float:
    """CPU time of one call that keeps to this thread: what it would take if it never had to wait for a core."""
    start = time.thread_time()
    call()
    return time.thread_time() - start


def wall_seconds(call: Call) -> float | None:
    """Wall time of one call on the CPU; None if a thread of this process had to wait for a core meanwhile."""
    waited = _seconds_without_core()
    start = time.perf_counter()
    call()
    elapsed = time.perf_counter() - start
    return elapsed if _seconds_without_core() - waited <= DISTURBED * elapsed else None


def cuda_seconds(call: Call) -> float:
    """Wall time of one call on an idle GPU, launch and all, until the GPU is done."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    torch.cuda.synchronize()
    return time.perf_counter() - start


class Replay:
    """Some calls captured into one CUDA graph. Without CUDA, for runs that only try a benchmark out, the calls.

    `before` is called before each replay that is timed, and not timed itself.
    """

    def __init__(self, calls: Sequence[Call], device: torch.device, before: Call = lambda: None) -> None:
        self._calls, self._before = calls, before
        self._busy_cycles = BUSY_CYCLES
        self._graph: torch.cuda.CUDAGraph | None = None
        if device.type == "cuda":
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for call in calls:
                    call()
            torch.cuda.current_stream().wait_stream(side)
            self._graph = torch.cuda.CUDAGraph()
            # Where a call cannot be captured, torch leaves the stream that it captured on the current one.
            with torch.cuda.stream(torch.cuda.current_stream()), torch.cuda.graph(self._graph):
                for call in calls:
                    call()

    def __call__(self) -> None:
        if self._graph is not None:
            self._graph.replay()
            return
        for call in self._calls:
            call()

    def seconds_a_call(self, _call: Call | None = None, wait: int = 1) -> float | None:
        """The GPU's own time from the first kernel's start to the last one's end, over the number of calls.

        The GPU is kept busy while the graph is launched: on an idle one the launch would be part of the time. Whether
        it was busy for long enough is asked of it, and where it was not, the sample is taken again after a longer wait;
        `wait` times as long a one must not change the result. None where no wait is long enough, as where a launch
        itself waits for what ran before.
        """
        if self._graph is None:
            self._before()
            return cpu_seconds(self) / len(self._calls)
        while self._busy_cycles <= MOST_BUSY_CYCLES:
            self._before()
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            torch.cuda._sleep(wait * self._busy_cycles)
            start.record()
            self._graph.replay()
            launched_in_time = not start.query()
            end.record()
            end.synchronize()
            if launched_in_time:
                return start.elapsed_time(end) * 1e-3 / len(self._calls)
            self._busy_cycles *= 2
        return None


def _seconds_without_core() -> float:
    """How long threads of this process have been ready to run while others had the cores; 0 where that is unknown."""
    nanoseconds = 0
    for schedstat in Path("/proc/self/task").glob("*/schedstat"):
        with suppress(OSError, IndexError):  # a thread may end while it is looked at
            nanoseconds += int(schedstat.read_text().split()[1])
    return nanoseconds * 1e-9
