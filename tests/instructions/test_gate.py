"""More instructions than the baseline says are named, also those of a real copy in a real kernel."""

from __future__ import annotations

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from unittest import mock

import pytest

from swift_kernels import SwiftHead
from tests.instructions import measure, report
from tests.instructions.cases import CASES, STEP_64

VERSIONS = {"valgrind": "3.19.0", "torch": "2.13.0"}
COUNTS = {"one": 100_000, "another": 2_000}
ABOVE = round(COUNTS["one"] * (1 + report.SLACK)) + 1
BELOW = round(COUNTS["one"] * (1 - report.SLACK)) - 1


def test_what_takes_more_than_the_slack_is_named():
    assert report.worse(COUNTS, COUNTS) == []
    assert report.worse({**COUNTS, "one": ABOVE - 1}, COUNTS) == []
    assert report.worse({**COUNTS, "one": BELOW}, COUNTS) == []
    [line] = report.worse({**COUNTS, "one": ABOVE}, COUNTS)
    assert line == f"one: {ABOVE:,} instructions, in the baseline 100,000"


def test_what_takes_fewer_is_noted_as_a_stale_baseline():
    assert report.better({**COUNTS, "one": BELOW + 1}, COUNTS) == []
    [line] = report.better({**COUNTS, "one": BELOW}, COUNTS)
    assert line == f"one: {BELOW:,} instructions, in the baseline 100,000: run with --update"


def test_a_case_that_only_one_of_the_two_knows_is_named():
    assert report.worse({**COUNTS, "third": 1}, COUNTS) == ["third: not in baseline.json: run with --update"]
    assert report.worse({"one": 100_000}, COUNTS) == ["another: in baseline.json and not counted: run with --update"]


def test_versions_that_differ_are_named():
    assert report.other_versions(VERSIONS, VERSIONS) == []
    assert report.other_versions({**VERSIONS, "torch": "2.14.0"}, {**VERSIONS, "compiler": "g++ 12"}) == [
        "torch is 2.14.0, in the baseline 2.13.0",
        "compiler is unknown, in the baseline g++ 12",
    ]


@pytest.fixture
def gate(monkeypatch, tmp_path, capsys):
    """Runs the command on these counts; returns its exit status and what it printed."""
    monkeypatch.setattr(report, "BASELINE", tmp_path / "baseline.json")
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")

    def run(counts: dict[str, int], *arguments: str, versions: dict[str, str] = VERSIONS) -> tuple[Any, str]:
        monkeypatch.setattr(measure, "versions", lambda: versions)
        monkeypatch.setattr(measure, "measure", lambda: counts)
        status: Any = 0
        try:
            report.main(arguments)
        except SystemExit as end:
            status = end.code
        return status, capsys.readouterr().out

    assert run(COUNTS, "--update")[0] == 0
    return run


def test_the_command_fails_on_more_instructions(gate, tmp_path):
    assert gate(COUNTS)[0] == 0
    kept = tmp_path / "counts.json"
    status, output = gate({**COUNTS, "one": ABOVE}, "--json", str(kept))
    assert status == 1
    assert f"one: {ABOVE:,} instructions, in the baseline 100,000" in output
    assert json.loads(kept.read_text()) == {"versions": VERSIONS, "instructions": {**COUNTS, "one": ABOVE}}
    status, output = gate({**COUNTS, "one": BELOW})
    assert (status, "in the baseline 100,000: run with --update" in output) == (0, True)
    assert gate({**COUNTS, "one": ABOVE}, "--update")[0] == 0
    assert gate({**COUNTS, "one": ABOVE})[0] == 0


@pytest.mark.parametrize("arguments", [(), ("--json", "counts.json")], ids=["", "--json"])
def test_under_other_versions_nothing_is_compared(gate, monkeypatch, tmp_path, arguments):
    monkeypatch.chdir(tmp_path)
    status, output = gate({"one": ABOVE}, *arguments, versions={**VERSIONS, "torch": "2.14.0"})
    assert status == 0
    assert "compared: torch is 2.14.0, in the baseline 2.13.0" in output
    assert "100,000" not in output


def test_without_valgrind_nothing_is_counted(gate, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    status, output = gate({"one": ABOVE})
    assert status == 0
    assert "there is no valgrind on the PATH" in output


def test_the_baseline_knows_every_case():
    baseline = json.loads(report.BASELINE.read_text())
    assert list(baseline["instructions"]) == list(CASES)


COPY = """  std::vector<Entry> entries = entries_of(hidden_states);
  std::vector<std::vector<char>> copies;
  for (Entry& entry : entries) {
    const int64_t bytes = sizes.rows * entry.row_stride * hidden_bytes(hidden_dtype(hidden_states.front()));
    copies.emplace_back(entry.hidden, entry.hidden + bytes);
    entry.hidden = copies.back().data();
  }
  reduce_chunks(
      entries, hidden_dtype"""
READ = """  reduce_chunks(
      entries_of(hidden_states), hidden_dtype"""


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("valgrind"), reason="needs valgrind")
def test_a_kernel_that_copies_what_it_reads_is_caught(tmp_path):
    shutil.copytree(measure.ROOT / "csrc", tmp_path / "csrc")
    source = tmp_path / "csrc" / "score_step.cpp"
    assert source.read_text().count(READ) == 1
    source.write_text(source.read_text().replace(READ, COPY))
    with ThreadPoolExecutor() as pool:
        as_it_is = pool.submit(measure.measure, [STEP_64])
        slowed = pool.submit(measure.measure, [STEP_64], tmp_path / "csrc", tmp_path / "cache")
    baseline = json.loads(report.BASELINE.read_text())
    # Under other versions than the baseline's, against the kernel as it is.
    same = not report.other_versions(measure.versions(), baseline["versions"])
    known = {STEP_64: (baseline["instructions"] if same else as_it_is.result())[STEP_64]}
    assert report.worse(as_it_is.result(), known) == []
    [line] = report.worse(slowed.result(), known)
    assert line == f"{STEP_64}: {slowed.result()[STEP_64]:,} instructions, in the baseline {known[STEP_64]:,}"


def test_a_host_path_that_copies_what_it_hands_over_is_caught():
    """By what it launches and moves, whatever the host executes for it."""
    pytest.importorskip("triton")
    pytest.importorskip("transformers")
    from tests.aot import decode_step

    before = [entry for entry in decode_step.baseline() if (entry["mode"], entry["variant"]) == ("eager", "gather")]
    layers = min(entry["layers"] for entry in before)
    step = SwiftHead.step

    def step_on_copies(head, hidden_states, *arguments):
        step(head, [entry.clone() for entry in hidden_states], *arguments)

    assert decode_step.worse([decode_step.count("eager", "gather", layers)], before) == []
    with mock.patch.object(SwiftHead, "step", step_on_copies):
        [launches, moved] = decode_step.worse([decode_step.count("eager", "gather", layers)], before)
    known = next(entry["launches"] for entry in before if entry["cache"] == "dynamic")
    key = f"gather, eager, dynamic cache, {layers} layers"
    assert launches == f"{key}: {known + layers + 1:,} launches, {known:,} in the baseline"
    assert moved.startswith(key)
    assert "bytes" in moved
