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
import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import torch

from bench import kernel_cache, report, results
from bench.stage_log import StageLog
from bench.stages import LIMITS, MACHINE, STAGES, WORK, Step, failed_tests_file
from bench.stages import RESULTS as MEASURED
from bench.steps import ROOT, Outcome, end_what_runs_when_ended, not_run, run, seconds_since_start
from bench.targets import targets_table

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
    end_what_runs_when_ended()
    if options.failed:
        use_failed(options.failed)
    if options.dry_run:
        from bench.gpu_dry_run import dry_run

        raise SystemExit(dry_run([options.stage] if options.stage else list(STAGES), options.output))
    stage = options.stage or 1
    raise SystemExit(run_stage(stage, options.output, options.seconds or LIMITS[stage]))


def run_stage(stage: int, output: Path, seconds: float) -> bool:
    """Runs what of the stage has not succeeded yet; True if anything failed."""
    deadline = time.monotonic() + seconds - seconds_since_start() - SAVING
    no_gpu = None if torch.cuda.is_available() else "torch sees no CUDA device, and --dry-run needs none"
    environment = results.environment(torch.device("cpu" if no_gpu else "cuda"))
    notes = WORK / f"stage-{stage}.json"
    outcomes = _outcomes_before(notes, environment)
    log = StageLog(f"stage-{stage}", output)
    cache = use_kernels()
    variables = {**step_variables(), "TRITON_CACHE_DIR": str(cache)}
    failed = []
    for step in STAGES[stage]:
        if step is not MACHINE and outcomes.get(step.name, {}).get("status") == 0:
            continue
        builds = kernel_cache.builds_in(cache)
        outcome = _run_step(step, deadline, no_gpu, log, variables)
        anew = kernel_cache.builds_in(cache) - builds
        log.end(step.name, outcome, f"; {anew} kernels compiled" if anew else "")
        failed += [step.name] if outcome.failed else []
        outcomes[step.name] = dataclasses.asdict(outcome)
        log.note(notes, {"environment": environment, "outcomes": outcomes})
        log.keep()
        log.keep(failed_tests_file(), "failed_tests.json")
        if step.xml:
            log.keep(step.xml)
        log.keep_folder(MEASURED, "results.tar.gz")
    for measured in report.load_all(MEASURED).values():
        print(targets_table(measured, {}))
    print(f"nothing was measured: {no_gpu}" if no_gpu else f"failed: {', '.join(failed) or 'nothing'}")
    return bool(no_gpu or failed)


def _run_step(step: Step, deadline: float, no_gpu: str | None, log: StageLog, variables: dict[str, str]) -> Outcome:
    limit = min(step.limit, deadline - time.monotonic())
    if step.xml:
        step.xml.unlink(missing_ok=True)  # of an earlier run
    if why_not := step.why_not() or (no_gpu if step is not MACHINE else None):
        return not_run(why_not)
    if limit < step.least:
        return not_run("no time was left")
    command = step.command(limit)
    log.begin(step.name, command)

    def keep() -> None:
        log.keep()
        log.keep_folder(MEASURED, "results.tar.gz")

    return run(command, limit, log.path, {**variables, **step.environment}, keep, step.fine, step.grace)


def _outcomes_before(notes: Path, environment: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Of the same stage on the same tree."""
    try:
        before = json.loads(notes.read_text())
        same = results.is_known(environment["commit"]) and all(
            before["environment"].get(key) == environment[key] for key in results.SAME
        )
        return before["outcomes"] if same else {}
    except (OSError, ValueError, KeyError):  # there is none, or it was cut short
        return {}


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
