"""How results look in a terminal, in a pipe and as JSON."""

from __future__ import annotations

import json
import math
import textwrap
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from swift_kernels.evaluation.compare import SELECTOR_NAMES
from swift_kernels.evaluation.evaluate import Evaluation
from swift_kernels.evaluation.study import TaskStudy, Transfer
from swift_kernels.evaluation.wording import evaluation_facts, p_value, percent, points, study_facts
from swift_kernels.progress import Update

PIPE_WIDTH = 100
LOG_INTERVAL = 30.0
"""Seconds between lines of progress where stderr is no terminal."""

LEGEND = (
    "Percent right; in brackets 95% intervals, bootstrapped over problems; ties count in expectation\n"
    "p: two-sided sign-flip test over problems, adjusted for the comparisons in one table (Holm)"
)

SHOWN_NS = 5
"""Columns of N that fit beside the comparison; of more, some in the middle are left to `--json`."""


def stdout() -> Console:
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=PIPE_WIDTH)


def stderr() -> Console:
    return Console(stderr=True, highlight=False)


def emit(facts: dict[str, Any], as_json: bool, *parts: RenderableType) -> None:
    """Prints the result: `facts` as one JSON object, or `parts` for people."""
    if as_json:
        print(json.dumps(facts, ensure_ascii=False))
        return
    console = stdout()
    for part in parts:
        if isinstance(part, str):
            console.print(part, markup=False, soft_wrap=True)
        else:
            console.print(part)


def note(text: str) -> None:
    """One line about what is going on, to stderr."""
    stderr().print(text, markup=False, soft_wrap=True)


@contextmanager
def progress(description: str, total: int, quiet: bool = False) -> Iterator[Update]:
    """A `swift_kernels.progress.Progress`: a bar on stderr, or lines where that is no terminal; `quiet`, nothing."""
    console = Console(stderr=True, quiet=True) if quiet else stderr()
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        TimeRemainingColumn(compact=True),
        TextColumn("{task.fields[detail]}"),
        console=console,
        disable=not console.is_terminal,
        transient=True,
    )
    last = ("0", "")
    logged = time.monotonic()

    def line() -> str:
        return f"{description}: {last[0]}/{total} {last[1]}".rstrip()

    with bar:
        task = bar.add_task(description, total=total, detail="")

        def update(done: int, detail: str = "") -> None:
            nonlocal last, logged
            last = (str(done), detail)
            bar.update(task, completed=done, detail=detail)
            if bar.disable and time.monotonic() - logged > LOG_INTERVAL:
                logged = time.monotonic()
                console.print(line(), markup=False, soft_wrap=True)

        yield update
    console.print(line(), markup=False, soft_wrap=True)


def plain_table(title: str | None) -> Table:
    return Table(title=title, title_justify="left", box=None, padding=(0, 2, 0, 0), pad_edge=False)


def evaluation_table(evaluation: Evaluation, title: str | None = None) -> Table:
    """A selector a line: its accuracy at each N, and at the largest how far SWIFT is ahead of it."""
    *smaller, largest = shown_ns(list(evaluation.accuracy))
    table = plain_table(title)
    table.add_column("picked by", no_wrap=True)
    for n in (*smaller, largest):
        table.add_column(f"N={n}", justify="right", no_wrap=True)
    table.add_column("SWIFT is ahead, paired", justify="right", no_wrap=True)
    table.add_column("p", justify="right", no_wrap=True)
    for key, name in SELECTOR_NAMES.items():
        if key not in evaluation.accuracy[largest]:
            continue
        ahead = evaluation.differences.get(f"swift - {key}")
        table.add_row(
            Text(name, "bold" if key == "swift" else ""),
            *(f"{100 * evaluation.accuracy[n][key].mean:.1f}" for n in smaller),
            percent(evaluation.accuracy[largest][key]),
            *(() if ahead is None else (points(ahead), p_value(evaluation.adjusted_p[f"swift - {key}"]))),
        )
    return table


def evaluation_lines(evaluation: Evaluation) -> str:
    """What goes below the table: AUC, counts, what is left out, and how to read the figures."""
    return "\n".join([*evaluation_facts(evaluation), *_hidden(evaluation), LEGEND])


def _hidden(evaluation: Evaluation) -> list[str]:
    """Says that the table has no column for every N."""
    count = len(evaluation.accuracy)
    return [f"{SHOWN_NS} of {count} N are shown; --json has all"] if count > SHOWN_NS else []


def study_parts(study: TaskStudy) -> list[RenderableType]:
    """The table and lines of one task."""
    evaluation = study.evaluation
    title = f"{study.task}: Best-of-N accuracy on {evaluation.problems} problems of {study.rollouts}, by {study.head}"
    facts = [*study_facts(study), *_hidden(evaluation)]
    lines = [textwrap.fill(fact, PIPE_WIDTH, subsequent_indent="  ") for fact in facts]
    return [evaluation_table(evaluation, title), "\n".join([*lines, ""])]


def transfer_table(found: Transfer) -> Table:
    """Rows are heads, columns tasks."""
    table = plain_table("Heads on the tasks of others: accuracy of the pick, difference from the task's own head, AUC")
    table.add_column("head", overflow="fold")
    for task, n in zip(found.tasks, found.n, strict=True):
        table.add_column(f"{task}, N={n}", justify="right", overflow="fold")
    for row, head in enumerate(found.heads):
        cells = []
        for column in range(len(found.tasks)):
            gap = found.difference[row][column]
            parts = [percent(found.accuracy[row][column]), "own" if gap is None else points(gap)]
            cells.append(" | ".join([*parts, f"{found.auc[row][column].mean:.3f}"]))
        table.add_row(head, *cells)
    return table


def shown_ns(ns: list[int]) -> list[int]:
    """As many as a table has columns for, the first and the last among them."""
    if len(ns) <= SHOWN_NS:
        return ns
    return [ns[round(place * (len(ns) - 1) / (SHOWN_NS - 1))] for place in range(SHOWN_NS)]


def score_facts(head: Any, score: float) -> dict[str, float | None]:
    """A score for JSON, and of a calibrated head the chance that the answer is right."""
    facts = {"score": number(score)}
    if head.config.is_calibrated:
        facts["p_correct"] = number(0.5 * (1 + math.tanh(score / 2)))
    return facts


def number(value: float) -> float | None:
    """A score for JSON, which has no NaN."""
    return None if math.isnan(value) else value
