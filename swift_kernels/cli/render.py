"""How results look in a terminal, in a pipe and as JSON."""

from __future__ import annotations

import json
import math
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
from swift_kernels.evaluation.metrics import Estimate
from swift_kernels.progress import Update

PIPE_WIDTH = 100
LOG_INTERVAL = 30.0
"""Seconds between lines of progress where stderr is no terminal."""

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


def percent(estimate: Estimate) -> str:
    return f"{100 * estimate.mean:.1f} ({100 * estimate.low:.1f}-{100 * estimate.high:.1f})"


def points(estimate: Estimate) -> str:
    return f"{100 * estimate.mean:+.1f} ({100 * estimate.low:+.1f} to {100 * estimate.high:+.1f})"


def p_value(p: float) -> str:
    return "<0.001" if p < 0.001 else f"{p:.3f}"


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
            *(() if ahead is None else (points(ahead), p_value(ahead.p))),
        )
    return table


def evaluation_lines(evaluation: Evaluation) -> str:
    """What goes below the table: AUC, counts, what is left out, and how to read the figures."""
    auc = evaluation.auc
    lines = []
    if not math.isnan(auc.mean):
        lines.append(
            f"Within-problem AUC {auc.mean:.3f} ({auc.low:.3f}-{auc.high:.3f}), over the "
            f"{evaluation.mixed_problems} of {evaluation.problems} problems with right and wrong answers"
        )
    if evaluation.unscored:
        lines.append(f"{evaluation.unscored} of {evaluation.candidates} answers have no scored token; never chosen")
    lines += evaluation.notes
    if len(evaluation.accuracy) > SHOWN_NS:
        lines.append(f"{SHOWN_NS} of {len(evaluation.accuracy)} N are shown; --json has all")
    lines += [
        "Percent right; in brackets 95% intervals, bootstrapped over problems; ties count in expectation",
        "p: two-sided sign-flip test over problems, not corrected for making several comparisons",
    ]
    return "\n".join(lines)


def shown_ns(ns: list[int]) -> list[int]:
    """As many as a table has columns for, the first and the last among them."""
    if len(ns) <= SHOWN_NS:
        return ns
    return [ns[round(place * (len(ns) - 1) / (SHOWN_NS - 1))] for place in range(SHOWN_NS)]


def number(value: float) -> float | None:
    """A score for JSON, which has no NaN."""
    return None if math.isnan(value) else value
