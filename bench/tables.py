"""Results as tables: for a terminal, and in markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from bench.results import Case, Result


def print_result(result: Result, console: Console) -> None:
    environment = result.environment
    where = f"{environment['device']}, {environment['threads']} threads, torch {environment['torch']}"
    console.print(f"[bold]{result.name}[/] on {escape(where)}, commit {short(environment['commit'])}", highlight=False)
    if result.settings["quick"]:
        console.print("A quick run, on tiny shapes: it shows that everything runs; no figure here is one.")
    for case in result.cases:
        header, *rows = rows_of(case)
        table = Table(title=escape(case.title()), title_justify="left", caption=caption(case), caption_justify="left")
        for column in header:
            table.add_column(column, justify="right" if column else "left", no_wrap=True)
        for row in rows:
            table.add_row(*map(escape, row))
        console.print(table)


def rows_of(case: Case) -> list[list[str]]:
    """A row a contender, below the names of the columns."""
    against = f"{'speed of' if case.faster else 'times'} {case.reference}"
    if case.unit != "s":  # counted, not timed: once is enough
        rows = [["", case.unit, against, *case.metrics]]
        reference = case.samples[case.reference][0]
        for name, (count, *_) in case.samples.items():
            rows.append([name, counted(case.unit, count or 0), times(count, reference), *_metrics(case, name)])
        return rows
    rows = [["", "median", "95% interval", against, *case.metrics, "of floor", "samples"]]
    for name, samples in case.samples.items():
        summary, ratio, share = case.summary(name), case.ratio(name), case.share_of_floor(name)
        kept = sum(sample is not None for sample in samples)
        lost = len(samples) - kept
        figures = ["disturbed" if lost else "too few samples", "", ""]
        taken = f"{kept}, {lost} lost" if lost else str(kept)
        if summary is not None:
            median, low, high = in_units([summary.median, summary.low, summary.high])
            compared = ratio.text(percent=case.faster) if ratio and name != case.reference else ""
            figures = [median, f"{low.split()[0]} .. {high}", compared]
            taken += f", {summary.outliers} far out" if summary.outliers else ""
        shown = "" if share is None else f"{share:.0%}" if share > 0.005 else "<1%"
        rows.append([name, *figures, *_metrics(case, name), shown, taken])
    return rows


def caption(case: Case) -> str | None:
    """What has to be moved, and the floor that binds."""
    parts = [] if case.moved is None else [f"{in_bytes(case.moved)} to move"]
    if floor := case.floor():
        name, seconds = floor
        rate = f", {case.moved / seconds / 1e9:.1f} GB/s" if case.moved and name.startswith(("memory", "cache")) else ""
        parts.append(f"floor: {in_units([seconds])[0]} ({name}{rate})")
    return "; ".join([*parts, *([case.note] if case.note else [])]) or None


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """A table in markdown, its first row the header."""
    header, *body = ([cell.replace("|", "\\|") for cell in row] for row in rows)
    lines = [_line(header), "|---|" + "---:|" * (len(header) - 1), *map(_line, body)]
    return "\n".join(lines) + "\n"


def in_units(seconds: Iterable[float]) -> list[str]:
    """Times in the unit that suits the first."""
    every = list(seconds)
    scale, unit = next(
        ((scale, unit) for scale, unit in ((1, "s"), (1e3, "ms"), (1e6, "us")) if every[0] * scale >= 0.9995),
        (1e6, "us"),
    )
    return [f"{digits(value * scale)} {unit}" for value in every]


def in_bytes(nbytes: float) -> str:
    for scale, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if nbytes >= scale:
            return f"{digits(nbytes / scale)} {unit}"
    return f"{nbytes:.0f} bytes"


def counted(what: str, value: float) -> str:
    if "bytes" in what:
        return in_bytes(value)
    if what == "FLOPs":
        return f"{value / 1e12:,.3g} T"
    return f"{value:,.0f}" if float(value).is_integer() else digits(value)


def digits(value: float) -> str:
    """Three significant digits, no exponent."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def short(commit: str) -> str:
    commit, plus, _ = commit.partition("+")
    return commit[:9] + (" and changes" if plus else "")


def times(value: float | None, reference: float | None) -> str:
    if value is None or not reference or value == reference:
        return ""
    return f"{digits(value / reference)}x"


def _metrics(case: Case, name: str) -> list[str]:
    found = (values.get(name) for values in case.metrics.values())
    return ["" if value is None else counted(metric, value) for metric, value in zip(case.metrics, found, strict=True)]


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"
