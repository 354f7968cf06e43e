"""`make audit` fails on what is worse than the baseline, and says what it is."""

from __future__ import annotations

import importlib
import json
from typing import Any

import pytest

pytest.importorskip("triton")

from tests.aot import report
from tests.aot.audit import TARGETS
from tests.aot.variants import KERNELS

NAME = "kernel | variant | sm_90"
GOOD: dict[str, Any] = {
    "registers": 120,
    "spills": 0,
    "local_bytes": 0,
    "shared_bytes": 128,
    "load_bits": {"x_ptr": {"128": 16}, "slots_ptr": {"64": 2, "32": 1}},
    "order_faults": [],
}
WORSE = {
    "spills": ({"spills": 3}, "3 spills"),
    "local memory": ({"local_bytes": 16}, "16 bytes of local memory"),
    "order": ({"order_faults": ["no acquire"]}, "no acquire"),
    "all loads narrower": (
        {"load_bits": {"x_ptr": {"64": 32}}},
        "x_ptr is loaded by 32 x 64 bits, in the baseline by 16 x 128 bits",
    ),
    "one load narrower": (
        {"load_bits": {"x_ptr": {"128": 15, "64": 2}}},
        "x_ptr is loaded by 2 x 64 bits, 15 x 128 bits, in the baseline by 16 x 128 bits",
    ),
    "registers": ({"registers": 129}, "129 registers, in the baseline 120"),
}


@pytest.fixture
def audit(monkeypatch, tmp_path, capsys):
    """Runs the command on these builds; returns its exit status and what it printed."""
    monkeypatch.setattr(report, "BASELINE", tmp_path / "baseline.json")

    def run(builds: dict[str, Any], *arguments: str) -> tuple[int, str]:
        monkeypatch.setattr(report, "compile_all", lambda *_: (builds, []))
        with pytest.raises(SystemExit) as end:
            report.main(arguments)
        return end.value.code, capsys.readouterr().out

    assert run({NAME: GOOD}, "--update")[0] == 0
    return run


@pytest.mark.parametrize(("change", "figure"), WORSE.values(), ids=WORSE)
def test_a_worse_build_fails_and_is_named(audit, change, figure):
    status, output = audit({NAME: GOOD | change, "kernel | variant | sm_80": GOOD})
    assert status == 1
    assert f"{NAME}: {figure}" in output
    assert "kernel | variant | sm_80: not in baseline.json: run with --update" in output


def test_as_good_or_better_passes(audit):
    for change in ({}, {"registers": 128}, {"load_bits": {"x_ptr": {"128": 8}, "slots_ptr": {"64": 3}}}):
        assert audit({NAME: GOOD | change})[0] == 0
    assert audit({"kernel | another | sm_90": GOOD}, "--full")[0] == 0


def test_another_triton_is_held_to_the_hard_rules_alone(audit):
    baseline = json.loads(report.BASELINE.read_text())
    report.BASELINE.write_text(json.dumps({**baseline, "triton": "0.0"}))
    assert audit({NAME: GOOD | WORSE["registers"][0]})[0] == 0
    for name in WORSE.keys() - {"registers"}:
        assert audit({NAME: GOOD | WORSE[name][0]})[0] == 1


def test_what_another_triton_does_worse_passes_once_it_is_noted_and_no_further(audit):
    worse = {NAME: GOOD | WORSE["spills"][0] | WORSE["all loads narrower"][0]}
    with pytest.raises(SystemExit) as end:
        report.main(["--note"])
    assert end.value.code == 2, "the baseline's own Triton may do nothing worse"
    baseline = json.loads(report.BASELINE.read_text())
    report.BASELINE.write_text(json.dumps({**baseline, "triton": "0.0"}))
    assert audit(worse)[0] == 1
    assert audit(worse, "--note")[0] == 0
    assert audit(worse)[0] == 0
    for more in ({"spills": 4}, {"local_bytes": 8}, {"load_bits": {"x_ptr": {"32": 64}}}, WORSE["order"][0]):
        assert audit({NAME: worse[NAME] | more})[0] == 1
    assert audit({NAME: GOOD | WORSE["order"][0]}, "--note")[0] == 1, "a broken order is never noted away"


def test_what_spills_does_not_pass_by_updating(audit):
    assert audit({NAME: GOOD | WORSE["spills"][0]}, "--update")[0] == 1


def test_the_baseline_knows_every_representative_build():
    expected = {
        f"{kernel} | {variant} | {target}"
        for kernel, module in KERNELS.items()
        for variant in importlib.import_module(module).SMALL
        for target in TARGETS
    }
    assert set(json.loads(report.BASELINE.read_text())["builds"]) == expected
