"""Everything that needs a GPU, in stages that end in time: `make gpu STAGE=1` in 400 s, 2 in 225 s; 3 has the rest.

    python -m bench.gpu --stage 1 --output FOLDER [--seconds 400] [--failed FILE]

Each step has its own limit within the stage's, the most telling come first, and after each all there is so far is in
FOLDER: a log, the tests by name as JUnit XML, which failed, and the results as an archive, in eight files at most. A
step that fails, hangs, or cannot run here says so in a line, and the rest goes on; the exit status is 1 if one failed.
Stage 2 begins with the tests that failed in stage 1, known from the same checkout or from its `failed_tests.json`. What
succeeded on the same tree is not repeated. Where git is not, SWIFT_KERNELS_COMMIT says what is measured.

    python -m bench.gpu --dry-run [--stage N] [--output FOLDER]

tries all of it out without a GPU: tests are collected and benchmarks run on tiny shapes with every rival. No figure
comes out of that; what a stage would take is estimated from the tests that were collected, the kernels that `make
gpu-prebuild` counted, and what benchmarks need here to start and to compile their rivals.
"""

from __future__ import annotations

import argparse
import json
import signal
import time
from pathlib import Path
from typing import Any

import torch

from bench import kernel_cache, report, results
from bench.harness import LEFT_OUT, NOT_HERE
from bench.results import RESULTS
from bench.stage_log import StageLog
from bench.stages import LIMITS, MACHINE, STAGES, WORK, Step, failed_tests_file
from bench.steps import FINE, ROOT, Outcome, run
from bench.targets import targets_table

LEAST = 10.0
"""Seconds without which no step begins."""
SAVING = 5.0
"""Seconds of a stage that are left for its end."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", type=int, choices=STAGES, help="1 unless told; of a dry run every one")
    parser.add_argument("--output", type=Path, default=WORK / "output", help="folder for what is to be kept")
    parser.add_argument("--seconds", type=float, help="of the stage; 400, 225 and 1800 unless told")
    parser.add_argument("--failed", type=Path, help="failed_tests.json of an earlier stage, of another checkout")
    parser.add_argument("--dry-run", action="store_true", help="on tiny shapes, without a GPU")
    options = parser.parse_args()
    interruptible()
    if options.failed:
        use_failed(options.failed)
    if options.dry_run:
        from bench.gpu_dry_run import dry_run

        raise SystemExit(dry_run([options.stage] if options.stage else list(STAGES), options.output))
    stage = options.stage or 1
    raise SystemExit(run_stage(stage, options.output, options.seconds or LIMITS[stage]))


def interruptible() -> None:
    """Has the children of this process heed interrupts, which a shell has what it runs in the background ignore."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def run_stage(stage: int, output: Path, seconds: float) -> bool:
    """Runs what of the stage has not succeeded yet; True if anything failed."""
    deadline = time.monotonic() + seconds - SAVING
    no_gpu = None if torch.cuda.is_available() else "not run: torch sees no CUDA device, and --dry-run needs none"
    device = torch.device("cpu" if no_gpu else "cuda")
    environment = results.environment(device)
    notes = WORK / f"stage-{stage}.json"
    outcomes = _outcomes_before(notes, environment)
    log = StageLog(f"stage-{stage}", output)
    cache = use_kernels()
    variables = {**step_variables(), "TRITON_CACHE_DIR": str(cache)}
    for step in STAGES[stage]:
        if step is not MACHINE and outcomes.get(step.name, {"status": 1})["status"] == 0:
            continue
        builds = kernel_cache.builds_in(cache)
        outcome = _run_step(step, deadline, no_gpu, log, variables)
        anew = kernel_cache.builds_in(cache) - builds
        log.end(step.name, outcome, f"; {anew} kernels compiled" if anew else "")
        outcomes[step.name] = {"status": outcome.status, "seconds": outcome.seconds, "why": outcome.why}
        notes.write_text(json.dumps({"environment": environment, "outcomes": outcomes}, indent=1) + "\n")
        log.keep()
        log.keep(notes, "steps.json")
        log.keep(failed_tests_file(), "failed_tests.json")
        if step.xml:
            log.keep(step.xml)
        if not no_gpu:
            log.keep_folder(results.folder_of(device), "results.tar.gz")
    if not no_gpu:
        print(targets_table(report.load_all(RESULTS).get(results.folder_of(device), {}), {}))
    return bool(no_gpu) or any(outcome["status"] not in FINE for outcome in outcomes.values())


def _run_step(step: Step, deadline: float, no_gpu: str | None, log: StageLog, variables: dict[str, str]) -> Outcome:
    limit = min(step.limit, deadline - time.monotonic())
    if step.xml:
        step.xml.unlink(missing_ok=True)  # of an earlier run
    if why_not := step.why_not() or (no_gpu if step is not MACHINE else None):
        return Outcome(NOT_HERE, 0.0, why_not)
    if limit < LEAST:
        return Outcome(LEFT_OUT, 0.0, "not run: no time was left")
    command = step.command(limit)
    log.begin(step.name, command)
    return run(command, limit, log.path, {**variables, **step.environment}, log.keep)


def _outcomes_before(notes: Path, environment: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Of the same stage on the same tree: that of a commit, as changes to it may be others each time."""
    if not notes.exists() or environment["commit"].endswith("+changes"):
        return {}
    before = json.loads(notes.read_text())
    same = all(before["environment"].get(key) == environment[key] for key in results.SAME)
    return before["outcomes"] if same else {}


def step_variables() -> dict[str, str]:
    """Of the environment of every step."""
    return {
        "PYTHONPATH": str(ROOT),
        "PYTHONUNBUFFERED": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "COLUMNS": "150",
    }


def use_kernels() -> Path:
    """Triton's cache for all steps, with the kernels that were compiled ahead."""
    folder = WORK / "triton-cache"
    if kernel_cache.ARCHIVE.exists():
        try:
            kernel_cache.unpack(kernel_cache.ARCHIVE, folder)
        except kernel_cache.UNREADABLE as error:
            print(f"{kernel_cache.ARCHIVE} cannot be used: {error!r}; kernels are compiled when they are needed")
    return folder


def use_failed(path: Path) -> None:
    """Makes the tests that failed elsewhere those that stage 2 begins with."""
    try:
        names = json.loads(path.read_text())
        if not isinstance(names, dict):
            raise ValueError("it holds no names")
    except (OSError, ValueError) as error:
        raise SystemExit(f"--failed {path} cannot be read ({error}): expected failed_tests.json of a stage") from None
    failed_tests_file().parent.mkdir(parents=True, exist_ok=True)
    failed_tests_file().write_text(json.dumps(names))


if __name__ == "__main__":
    main()
