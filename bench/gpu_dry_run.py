"""Every step of `bench.gpu` without a GPU, on tiny shapes, and what each stage would take on one."""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bench import kernel_cache, report, results, tables
from bench.gpu import step_variables
from bench.results import Result
from bench.stage_log import StageLog
from bench.stages import DRY_RUN, LIMITS, STAGES, WORK, WORKERS, Benchmark, PytestRerun, PytestRun, Step
from bench.steps import Outcome, run
from bench.targets import targets_table

LIMIT = 500
"""Seconds of a step here."""
MOST_FILES = 8
SANITIZED = 30
"""How many times as long a test takes under compute-sanitizer; a guess."""
QUICK_POINTS = {"score_step": 2, "decode": 2}
"""Shapes of a quick run, where it has more than one."""

Estimate = tuple["int | None", "int | None", "float | None", "float | None"]
"""Tests, kernels that they need, and seconds of a step, where these were compiled ahead, and where they were not."""


def dry_run(stages: Sequence[int], output: Path) -> bool:
    """Runs them, each into a folder of its own where there are several; True if anything failed."""
    if DRY_RUN.exists():
        shutil.rmtree(DRY_RUN)
    facts = kernel_cache.facts_of(kernel_cache.ARCHIVE) if kernel_cache.ARCHIVE.exists() else {}
    folder = results.folder_of(torch.device("cpu"), DRY_RUN)
    benchmarks: dict[str, Outcome] = {}
    failed, missing = [], []
    for stage in stages:
        log = StageLog(f"dry-run-{stage}", output / f"stage-{stage}" if len(stages) > 1 else output)
        rows = [["step", "limit, s", "tests", "kernels", "estimate, s", "without kernels ahead, s"]]
        totals = [0.0, 0.0]
        for step in STAGES[stage]:
            outcome, printed = run_step(step, log)
            if isinstance(step, Benchmark):
                benchmarks.setdefault(step.module, outcome)  # the second time there is nothing left to do
            found = estimate(step, printed, facts, benchmarks)
            totals = [total + (seconds or 0.0) for total, seconds in zip(totals, found[2:], strict=True)]
            rows.append([step.name, *("" if value is None else f"{value:.0f}" for value in (step.limit, *found))])
            failed += [step.name] if outcome.failed else []
            if step.xml:
                log.keep(step.xml)
            log.keep()
            log.note(WORK / f"dry-run-{stage}.json", [dict(zip(rows[0], row, strict=True)) for row in rows[1:]])
            log.keep_folder(DRY_RUN, "results.tar.gz")
        ahead, without = (f"{total:.0f} s" for total in totals)
        print(f"\nstage {stage}: {ahead} estimated of {LIMITS[stage]} s, {without} without kernels compiled ahead;")
        print("a benchmark counts as long as its tiny run took here, and takes longer, up to its limit")
        print(tables.markdown(rows))
        files = sorted(path.name for path in log.output.iterdir() if path.is_file())
        print(f"{len(files)} files in {log.output}: {', '.join(files)}\n", flush=True)
        missing += [f"no more than {MOST_FILES} files"] if len(files) > MOST_FILES else []
    for name, outcome in benchmarks.items():
        if outcome.succeeded:
            missing += missing_of(folder / f"{name}.json")
    print(targets_table(*[report.load_all(DRY_RUN).get(folder, {})] * 2))
    print(f"failed: {', '.join(failed) or 'nothing'}; not written: {', '.join(missing) or 'nothing'}")
    return bool(failed or missing)


def run_step(step: Step, log: StageLog) -> tuple[Outcome, str]:
    """How it ended, and what it printed."""
    log.begin(step.name, step.dry_command())
    # Without a GPU kernel tests are only there to collect under the interpreter, which benchmarks do without.
    variables = step_variables() | ({"TRITON_INTERPRET": "1"} if isinstance(step, PytestRun) else {})
    outcome = run(step.dry_command(), LIMIT, log.path, variables, log.keep, step.fine)
    printed = log.printed()
    log.end(step.name, outcome)
    return outcome, printed


def missing_of(path: Path) -> list[str]:
    """What a benchmark should have written; what it has is printed."""
    if not path.exists():
        return [path.name]
    cases = Result.load(path).cases
    contenders = list(dict.fromkeys(contender for case in cases for contender in case.samples))
    print(f"{path.stem}: {len(cases)} cases of {len(contenders)} contenders: {'; '.join(contenders)}")
    drawn = path.with_suffix(".png")
    return [] if drawn.exists() else [drawn.name]


def estimate(step: Step, printed: str, facts: dict[str, Any], benchmarks: dict[str, Outcome]) -> Estimate:
    """What a step may take on a GPU.

    A test is taken to last what it did when its kernels were compiled ahead, without their compilation; on a GPU they
    run as well. A benchmark is taken to last what its quick run did here, which starts and compiles rivals, once for
    each shape.
    """
    if isinstance(step, PytestRerun):
        return None, None, None, None
    if isinstance(step, Benchmark):
        shapes = max(1.0, step.points / QUICK_POINTS.get(step.module, 1))
        seconds = min(step.limit, benchmarks[step.module].seconds * shapes)
        return None, None, seconds, seconds
    if not isinstance(step, PytestRun):
        return None, None, step.expected, step.expected
    collected = re.search(r"^(\d+)(?:/\d+)? tests? collected", printed, re.MULTILINE)
    tests = int(collected[1]) if collected else 0
    parts = [part for file, part in facts.get("parts", {}).items() if file in step.arguments]
    if not parts:  # nobody has counted
        return tests, None, None, None
    of_all = {what: sum(part[what] for part in parts) for what in ("tests", "compiled", "compiling", "seconds")}
    a_test = (of_all["seconds"] - of_all["compiling"]) / of_all["tests"] * (SANITIZED if step.prefix else 1)
    workers = WORKERS if step.shared else 1
    # As many as its tests are of all in these files.
    kernels = round(of_all["compiled"] * min(1.0, tests / of_all["tests"]))
    a_kernel = of_all["compiling"] / of_all["compiled"]
    seconds = step.expected + tests * a_test / workers
    return tests, kernels, seconds, seconds + kernels * a_kernel / workers
