"""Everything that needs a GPU, in stages that each end within nine minutes: `make gpu STAGE=1`, then 2 and 3.

Stage 1 runs the CUDA tests, stage 2 the headline rows of every benchmark, stage 3 the full sweeps and what looks for
races. Results are saved as they come, under `bench/results/<device>/`. A stage that is run again goes on where it was:
what was measured on the same tree is not repeated. The exit status is 1 if anything failed.

    python -m bench.gpu --dry-run

tries all of it out without a GPU: every benchmark on tiny shapes with every rival, every result file and its tables. No
figure comes out of that, and the table of figures says so.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench import report, results
from bench.harness import LEFT_OUT, NOT_HERE
from bench.results import RESULTS, Result
from bench.targets import targets_table

ROOT = Path(__file__).resolve().parents[1]
LIMIT_SECONDS = 530
"""Of a stage."""

FINE = (0, LEFT_OUT, NOT_HERE)
"""Exit statuses that are no failure."""

DRY_RUN = ROOT / "build" / "dry-run"

PYTEST = ["-m", "pytest", "-q", "-p", "no:cacheprovider"]
KERNELS = [f"tests/ops/test_{op}.py" for op in ("score_step", "rms_norm_score", "sequence")]
"""All tests of these: most are not marked for a GPU, and run on whatever runs Triton."""
ODD_SHAPES = "row_count or token_count or every_layout or many_entries or wide_rows or test_pool or no_rows"
"""Kernel tests in which an access beyond a tensor would be likeliest."""


@dataclass(frozen=True)
class Step:
    """One command of a stage: a benchmark by its module's arguments, or tests."""

    name: str
    arguments: list[str]
    budget: int = LIMIT_SECONDS
    """Seconds after which a benchmark begins no new case."""
    limit: float = LIMIT_SECONDS
    """Seconds after which it is ended."""
    prefix: tuple[str, ...] = ()

    @property
    def is_benchmark(self) -> bool:
        return self.arguments[1].startswith("bench.") and self.arguments[1] != "bench.gpu_stress"

    def command(self) -> list[str]:
        more = ["--resume", "--budget", str(self.budget), "--device", "cuda"] if self.is_benchmark else []
        return [*self.prefix, sys.executable, *self.arguments, *more]

    def dry_command(self) -> list[str]:
        """The same, so far as it goes without a GPU: tests are collected, the race is only looked up."""
        if self.is_benchmark:
            # What chooses full-sized cases would choose them here too.
            options = ["--quick", "--resume", "--device", "cpu", "--results", str(DRY_RUN)]
            return [sys.executable, *self.arguments[:2], *options]
        # Twice -q names files and how many tests they have. None, as by a misspelt -k, is a failure.
        more = ["--collect-only", "-q"] if "pytest" in self.arguments else ["--help"]
        return [sys.executable, *self.arguments, *more]

    def dry_environment(self) -> dict[str, str]:
        """Without a GPU kernel tests are only there to collect under the interpreter, which benchmarks do without."""
        return {"TRITON_INTERPRET": "1"} if "pytest" in self.arguments else {}


def benchmark(name: str, *arguments: str, budget: int) -> Step:
    return Step(" ".join([name, *arguments]), ["-m", f"bench.{name}", *arguments], budget)


STAGES = {
    1: [
        *(Step(path, [*PYTEST, path, "-k", "not 100_000"]) for path in [*KERNELS, "tests/integrations/test_gpu.py"]),
    ],
    2: [
        benchmark("score_step", budget=90),
        benchmark("decode", budget=90),
        benchmark("score_sequence", "--heads", "1", budget=40),
        benchmark("best_of_n", "--n", "16", budget=60),
        benchmark("memory", "--lengths", "32,32768", budget=30),
        benchmark("launch_cost", budget=30),
        benchmark("greedy_difference", "--answers", "200", budget=30),
    ],
    3: [
        Step("stress", ["-m", "bench.gpu_stress", "--launches", "100000"], limit=90),
        benchmark("score_step", "--sweep", budget=130),
        benchmark("decode", "--sweep", budget=90),
        benchmark("best_of_n", "--n", "4,64", budget=60),
        benchmark("score_sequence", budget=30),
        benchmark("memory", budget=30),
        # Last: under it everything takes many times as long, and a benchmark is not to wait for it.
        Step(
            "memcheck",
            [*PYTEST, *KERNELS, "-k", ODD_SHAPES],
            prefix=("compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "9"),
        ),
    ],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", type=int, choices=STAGES, default=1)
    parser.add_argument("--dry-run", action="store_true", help="all stages on tiny shapes, without a GPU")
    options = parser.parse_args()
    if options.dry_run:
        raise SystemExit(dry_run())
    if not torch.cuda.is_available():
        raise SystemExit(
            "make gpu needs a CUDA device, and torch sees none: run it where there is one, or try it with --dry-run"
        )
    raise SystemExit(run_stage(options.stage))


def run_stage(stage: int) -> bool:
    """Runs what of the stage has not succeeded yet; True if anything failed."""
    device = torch.device("cuda")
    log = results.folder_of(device) / f"stage_{stage}.json"
    environment = results.environment(device)
    same = {key: environment[key] for key in results.SAME}
    outcomes: dict[str, dict[str, Any]] = {}
    if log.exists():
        before = json.loads(log.read_text())
        if {key: before["environment"].get(key) for key in results.SAME} == same:
            outcomes = before["outcomes"]
    deadline = time.monotonic() + LIMIT_SECONDS
    # What failed before is tried again after all that was not tried yet.
    unfinished = [step for step in STAGES[stage] if outcomes.get(step.name, {"status": 1})["status"] != 0]
    for step in sorted(unfinished, key=lambda step: _was_tried(outcomes.get(step.name))):
        outcomes[step.name] = run(step.command(), min(step.limit, deadline - time.monotonic()))
        print(
            f"{step.name}: exit status {outcomes[step.name]['status']}, {outcomes[step.name]['seconds']} s", flush=True
        )
        log.parent.mkdir(parents=True, exist_ok=True)
        temporary = log.with_suffix(".tmp")
        temporary.write_text(json.dumps({"environment": environment, "outcomes": outcomes}, indent=1) + "\n")
        temporary.replace(log)
    print(targets_table(report.load_all(RESULTS).get(log.parent, {}), {}))
    return any(outcome["status"] not in FINE for outcome in outcomes.values())


def _was_tried(outcome: dict[str, Any] | None) -> bool:
    """Whether it ran and failed, rather than having no time left."""
    return outcome is not None and outcome["status"] != LEFT_OUT and bool(outcome["seconds"])


def dry_run() -> bool:
    """Every step of every stage without a GPU, and what they should have written; True if anything failed."""
    for path in DRY_RUN.glob("*/*"):
        path.unlink()
    failed = []
    for step in (step for stage in STAGES.values() for step in stage):
        outcome = run(step.dry_command(), LIMIT_SECONDS, step.dry_environment())
        print(f"{step.name}: exit status {outcome['status']} after {outcome['seconds']} s", flush=True)
        failed += [step.name] if outcome["status"] else []
    folder = results.folder_of(torch.device("cpu"), DRY_RUN)
    expected = {
        step.arguments[1].removeprefix("bench.") for stage in STAGES.values() for step in stage if step.is_benchmark
    }
    missing = sorted(name for name in expected if not (folder / f"{name}.json").exists())
    for name in sorted(expected.difference(missing)):
        cases = Result.load(folder / f"{name}.json").cases
        contenders = list(dict.fromkeys(contender for case in cases for contender in case.samples))
        print(f"{name}: {len(cases)} cases of {len(contenders)} contenders: {'; '.join(contenders)}")
        missing += [] if (folder / f"{name}.png").exists() else [f"{name}.png"]
    print(targets_table(*[report.load_all(DRY_RUN).get(folder, {})] * 2))
    print(f"failed: {', '.join(failed) or 'nothing'}; not written: {', '.join(missing) or 'nothing'}")
    return bool(failed or missing)


def run(command: list[str], limit: float, environment: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Runs one command, its output shown and its end kept; status 124 when the stage's time is over."""
    start = time.monotonic()
    if limit <= 0:
        return {"status": 124, "seconds": 0, "tail": ["no time was left"]}
    if shutil.which(command[0]) is None:
        why = f"not run: {command[0]} is not on the PATH"
        print(why)
        return {"status": NOT_HERE, "seconds": 0, "tail": [why]}
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, **(environment or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        # A group of its own: what it has started is ended with it, and cannot hold the pipe open.
        start_new_session=True,
    )
    assert process.stdout is not None
    tail: list[str] = []
    timer = threading.Timer(limit, os.killpg, (process.pid, signal.SIGKILL))
    timer.start()
    try:
        for line in process.stdout:
            print(line, end="", flush=True)
            tail = [*tail[-59:], line.rstrip()]
        status = process.wait()
        timed_out = not timer.is_alive()
    except BaseException:  # Ctrl-C, which the group does not get by itself
        os.killpg(process.pid, signal.SIGKILL)
        raise
    finally:
        timer.cancel()
    return {"status": 124 if timed_out else status, "seconds": round(time.monotonic() - start, 1), "tail": tail}


if __name__ == "__main__":
    main()
