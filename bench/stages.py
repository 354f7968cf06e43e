"""What the stages of `bench.gpu` run: tests, benchmarks and scripts, the most telling first."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch

from bench import results
from bench.harness import LEFT_OUT, NOT_HERE
from bench.steps import ROOT

WORK = ROOT / "build" / "gpu"
"""Everything that `bench.gpu` makes but results, also between stages."""
DRY_RUN = ROOT / "build" / "dry-run"
"""The results of quick runs."""
RESULTS = WORK / "results"
"""What is measured: where it is kept for good, `python -m bench.report --add` takes it to."""
LIMITS = {1: 400, 2: 225, 3: 1800}
"""Seconds of a stage, from the start of its process."""

KERNELS = tuple(f"tests/ops/test_{op}.py" for op in ("score_step", "rms_norm_score", "sequence"))
"""All tests of these: most are not marked for a GPU, and run on whatever runs Triton."""
ATTACH = "tests/integrations/test_gpu.py"
NONE_FOUND = 5
"""Exit status of pytest where it finds no test."""
RESTARTS = ("--max-worker-restart", "50")
"""A worker ends where a test has broken the GPU for it."""
WORKERS, GB_A_WORKER = 6, 12
"""Processes that share the tests, and what the largest test takes of a GPU's memory."""


@dataclass(frozen=True)
class Step:
    """One command of a stage: `python` with these arguments."""

    name: str
    arguments: tuple[str, ...]
    limit: float
    """Seconds after which it is ended."""
    least: float = 10.0
    """Seconds without which it does not begin."""
    expected: float = 20.0
    """Seconds that it may take, for the estimate."""
    fine: tuple[int, ...] = (0,)
    """Exit statuses that are no failure."""
    grace: float = 3.0
    """Seconds between interrupt and kill."""
    prefix: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)

    def command(self, limit: float) -> list[str]:
        """What is run, for so many seconds at most."""
        return [*self.prefix, sys.executable, *self.arguments]

    def dry_command(self) -> list[str]:
        return [sys.executable, *self.arguments]

    def why_not(self) -> str | None:
        """Why there is nothing to run."""
        return None

    @property
    def xml(self) -> Path | None:
        return None


@dataclass(frozen=True)
class Script(Step):
    """One that only runs on a GPU."""

    def dry_command(self) -> list[str]:
        return [*super().dry_command(), "--help"]


@dataclass(frozen=True)
class Benchmark(Step):
    points: int = 1
    """How many shapes are measured, each with rivals to compile."""
    fine: tuple[int, ...] = (0, LEFT_OUT, NOT_HERE)

    @property
    def module(self) -> str:
        return self.arguments[1].removeprefix("bench.")

    def command(self, limit: float) -> list[str]:
        # With a fifth of the time left no new case is begun.
        options = ["--device", "cuda", "--resume", "--budget", str(int(0.8 * limit)), "--results", str(RESULTS)]
        return [*super().command(limit), *options]

    def dry_command(self) -> list[str]:
        # What chooses full-sized cases would choose them here too.
        options = ["--quick", "--resume", "--device", "cpu", "--results", str(DRY_RUN)]
        return [sys.executable, *self.arguments[:2], *options]


@dataclass(frozen=True)
class PytestRun(Step):
    """Tests of some files, by `pytest -v`: its log names each, and whether it passed."""

    chosen: str = ""
    """By words in their names, as pytest's -k has it."""
    shared: bool = False
    """Whether several processes share them, where pytest-xdist is there."""
    grace: float = 14.0
    """pytest-xdist waits ten for a worker that hangs, and then writes what it has."""

    @property
    def xml(self) -> Path:
        return WORK / f"{self.name}.xml"

    def tests(self) -> list[str]:
        return [*self.arguments, *(["-k", self.chosen] if self.chosen else [])]

    def command(self, limit: float) -> list[str]:
        options = ["-v", "--tb=short", "--durations=15", f"--junitxml={self.xml}", "-o", f"cache_dir={WORK / 'pytest'}"]
        # Where a test hangs, what it was doing is in the log before it is ended.
        options += ["-o", f"faulthandler_timeout={max(int(limit / 2), 1)}"]
        workers = number_of_workers() if self.shared else 0
        options += ["-n", str(workers), "--dist", "worksteal", *RESTARTS] if workers else []
        return [*self.prefix, sys.executable, "-m", "pytest", *options, *self.tests()]

    def dry_command(self) -> list[str]:
        # Nothing chosen, as by a misspelt -k, is a failure.
        options = ["--collect-only", "-q", "-p", "no:cacheprovider", f"--junitxml={self.xml}"]
        return [sys.executable, "-m", "pytest", *options, *self.tests()]


@dataclass(frozen=True)
class PytestRerun(PytestRun):
    """The tests that failed before, with all there is to know of why."""

    def why_not(self) -> str | None:
        return None if failed_before() else "no test is known to have failed"

    def command(self, limit: float) -> list[str]:
        # Names that are gone since are not missed. In a worker, so that one that hangs leaves what others showed.
        worker = ["-n", "1", *RESTARTS] if number_of_workers() else []
        options = ["--last-failed", "--last-failed-no-failures=none", "--tb=long", "--showlocals", "--maxfail=10"]
        return [*super().command(limit), *worker, *options]

    def dry_command(self) -> list[str]:
        return [sys.executable, "-m", "pytest", "--version"]


def number_of_workers() -> int:
    """As many as the host's cores and the GPU's memory carry; 0 where pytest-xdist is not there."""
    if results.version("pytest-xdist") is None:
        return 0
    memory = torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else 0
    return max(1, min(WORKERS, (os.cpu_count() or 1) // 2, int(memory / 1e9) // GB_A_WORKER))


def failed_tests_file() -> Path:
    """Where pytest notes which tests failed when they last ran."""
    return WORK / "pytest" / "v" / "cache" / "lastfailed"


def failed_before() -> list[str]:
    try:
        return list(json.loads(failed_tests_file().read_text()))
    except (OSError, ValueError):  # none have failed, or the note of it was cut short
        return []


def benchmark(name: str, *arguments: str, limit: float, points: int = 1, least: float = 10.0) -> Benchmark:
    return Benchmark(" ".join([name, *arguments]), ("-m", f"bench.{name}", *arguments), limit, least, points=points)


SHARED = {"TORCHINDUCTOR_COMPILE_THREADS": "4", "OMP_NUM_THREADS": "2"}
"""For tests that several processes share."""
# A call of the driver that only asks may fail: that is no error of memory. Python takes its time until it calls any.
MEMCHECK = (
    *("compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "9"),
    *("--report-api-errors", "no", "--launch-timeout", "0"),
)
UNCACHED = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
"""In a large block of PyTorch's allocator an access beyond a tensor is no error."""


MACHINE = Step("machine", ("-m", "bench.machine"), limit=25, expected=8)
STAGES: dict[int, list[Step]] = {
    1: [
        MACHINE,
        # 100,000 launches twice, at 20 us for the host, and the comparison of half of them.
        Script("stress", ("-m", "bench.gpu_stress", "--launches", "100000"), limit=60, expected=20),
        PytestRun(
            "tests",
            (*KERNELS, ATTACH),
            limit=150,
            # Those that compile models wait for stage 2.
            chosen="not 100_000 and not static_cache and not reduce-overhead and not bytes_on_the_device",
            shared=True,
            environment=SHARED,
        ),
        benchmark("score_step", "--rows", "64,256,1", "--samples", "40", limit=110, points=3),
        benchmark("decode", "--models", "8b", "--rows", "64", "--how", "eager", "--samples", "12", limit=95),
        benchmark("score_sequence", "--heads", "1", limit=45),
        benchmark("memory", "--lengths", "32,32768", limit=45),
    ],
    2: [
        # One launch at a time, so that what goes wrong in one is not told by the next.
        PytestRerun(
            "failed", (*KERNELS, ATTACH), limit=45, fine=(0, NONE_FOUND), environment={"CUDA_LAUNCH_BLOCKING": "1"}
        ),
        PytestRun(
            "compiled",
            (ATTACH,),
            limit=75,
            chosen="(static_cache and llama) or (reduce-overhead and gather) or bytes_on_the_device",
            shared=True,
            environment=SHARED,
        ),
        PytestRun(
            "memcheck",
            KERNELS[:1],
            limit=60,
            chosen="every_layout and (odd or off) or row_count and 33",
            prefix=MEMCHECK,
            environment=UNCACHED,
        ),
        benchmark("score_step", "--rows", "8,512", "--samples", "25", limit=60, points=2),
        benchmark("launch_cost", limit=25),
        benchmark("decode", "--models", "8b", "--rows", "1", "--how", "eager", "--samples", "8", limit=70),
        # Some 44 times 32 steps of 16 rows of an 8B model, saved in the end alone.
        benchmark("best_of_n", "--n", "16", "--new-tokens", "32", limit=120, least=70),
    ],
    3: [
        benchmark("score_step", "--sweep", limit=500, points=40),
        benchmark("decode", "--sweep", limit=400, points=11),
        benchmark("best_of_n", "--n", "4,64", limit=200, points=2),
        benchmark("score_sequence", limit=90, points=2),
        benchmark("memory", limit=60, points=4),
        benchmark("greedy_difference", "--answers", "200", limit=60),
        PytestRun(
            "every_test",
            (*KERNELS, ATTACH),
            limit=400,
            shared=True,
            environment=SHARED,
        ),
        PytestRun(
            "memcheck_of_all",
            KERNELS,
            limit=300,
            chosen="row_count or token_count or every_layout or many_entries or wide_rows or test_pool or no_rows",
            prefix=MEMCHECK,
            environment=UNCACHED,
        ),
    ],
}
