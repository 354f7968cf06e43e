"""Counts the instructions of every case and holds them against `baseline.json`.

    python -m tests.instructions [--update] [--json FILE]

Exits with 1 and names case and figures where a call takes over SLACK more instructions than the baseline says. Counts
are compared only under the versions the baseline was made with: another compiler or Python runs other instructions.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from tests.instructions import measure

BASELINE = Path(__file__).with_name("baseline.json")
SLACK = 0.02
"""Runs of one tree are alike to the instruction. Another environment, folder or file beside the modules moves what the
allocators find free, and with it a count by up to 0.8%."""


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--update", action="store_true", help="rewrite the baseline from these counts")
    parser.add_argument("--json", type=Path, help="also write versions and counts to this file")
    options = parser.parse_args(arguments)

    console = Console(width=120)
    if shutil.which("valgrind") is None:
        console.print("there is no valgrind on the PATH: no instructions were counted, and nothing was compared")
        return
    versions = measure.versions()
    baseline: dict[str, Any] = {"versions": versions, "instructions": {}}
    if BASELINE.exists():
        baseline = json.loads(BASELINE.read_text())
    others = other_versions(versions, baseline["versions"])
    if others and not options.update and not options.json:
        console.print(f"nothing was counted or compared: {'; '.join(others)}", markup=False, soft_wrap=True)
        return
    counts = measure.measure()
    text = json.dumps({"versions": versions, "instructions": counts}, indent=1) + "\n"
    if options.json:
        options.json.write_text(text)
    if options.update:
        BASELINE.write_text(text)
    known = {} if others else baseline["instructions"]
    console.print(table_of(counts, known))
    if options.update:
        return
    if others:
        console.print(f"nothing was compared: {'; '.join(others)}", markup=False, soft_wrap=True)
        return
    failures = worse(counts, known)
    for note in better(counts, known):
        console.print(note, style="yellow", markup=False, soft_wrap=True)
    for failure in failures:
        console.print(failure, style="bold red", markup=False, soft_wrap=True)
    console.print(f"{len(counts)} cases, {len(failures)} failures")
    raise SystemExit(1 if failures else 0)


def other_versions(versions: Mapping[str, str], known: Mapping[str, str]) -> list[str]:
    """What differs from the versions of the baseline; a phrase each."""
    return [
        f"{name} is {versions.get(name, 'unknown')}, in the baseline {known.get(name, 'unknown')}"
        for name in {**known, **versions}
        if versions.get(name) != known.get(name)
    ]


def worse(counts: Mapping[str, int], known: Mapping[str, int]) -> list[str]:
    """What takes more instructions than it may, or is in one of the two alone; a line each."""
    lines = [f"{name}: in {BASELINE.name} and not counted: run with --update" for name in known if name not in counts]
    for name, count in counts.items():
        if name not in known:
            lines.append(f"{name}: not in {BASELINE.name}: run with --update")
        elif count > known[name] * (1 + SLACK):
            lines.append(f"{name}: {in_words(count, known[name])}")
    return lines


def better(counts: Mapping[str, int], known: Mapping[str, int]) -> list[str]:
    """What takes so many fewer that the baseline lets worse pass; a line each."""
    return [
        f"{name}: {in_words(count, known[name])}: run with --update"
        for name, count in counts.items()
        if name in known and count < known[name] * (1 - SLACK)
    ]


def in_words(count: int, known: int) -> str:
    return f"{count:,} instructions, in the baseline {known:,}"


def table_of(counts: Mapping[str, int], known: Mapping[str, int]) -> Table:
    table = Table("case", title="instructions of one call")
    for column in ("instructions", "baseline", "change"):
        table.add_column(column, justify="right")
    for name, count in counts.items():
        before = known.get(name)
        change = f"{count / before - 1:+.2%}" if before else ""
        table.add_row(name, f"{count:,}", f"{before:,}" if before else "", change)
    return table
