"""What the README says was measured is what the results hold, and what was not measured says so."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from bench import gpu, report, results, targets
from bench.results import RESULTS, Case, Result
from bench.targets import NOT_MEASURED

FIX = "run python -m bench.report and commit what it writes"


def test_the_readme_is_what_the_results_make_it():
    text = report.README.read_text()
    assert text == report.with_block(text, report.readme_block(report.load_all(RESULTS))), FIX


def test_the_page_of_every_device_is_what_its_results_make_it():
    every = report.load_all(RESULTS)
    assert every, "no results are committed"
    for folder, found in every.items():
        assert (folder / "README.md").read_text() == report.device_page(found), FIX
        for name in found:
            assert (folder / f"{name}.png").exists(), FIX


def test_committed_results_are_of_a_committed_tree():
    for found in report.load_all(RESULTS).values():
        for result in found.values():
            assert len(result.environment["commit"]) == 40, f"{result.name} is of {result.environment['commit']}"


def test_a_changed_figure_is_noticed():
    every = report.load_all(RESULTS)
    folder, found = next(iter(every.items()))
    first = found["score_step"].cases[0]
    slower = [sample and 2 * sample for sample in first.samples["swift_kernels"]]
    changed = dataclasses.replace(first, samples={**first.samples, "swift_kernels": slower})
    other = dataclasses.replace(found["score_step"], cases=[changed, *found["score_step"].cases[1:]])
    text = report.README.read_text()
    assert text != report.with_block(text, report.readme_block({folder: {**found, "score_step": other}}))


def test_without_results_nothing_is_measured():
    lines = targets.targets_table({}, {}).splitlines()[2:]
    assert len(lines) == len(targets.TARGETS)
    assert all(NOT_MEASURED in line for line in lines)
    assert not any(character.isdigit() for line in lines for character in line.split("|")[4] + line.split("|")[5])


def step_case(rows: int, clock: str = "replayed") -> Case:
    labels = {"model": "Llama-3.1-8B", "entries": "33 x 4096", "rows": rows, "cache": "cold", "clock": clock}
    samples = {
        name: [time * rows] * 6 for name, time in {"swift_kernels": 1e-6, "upstream": 3e-5, "cat": 2.5e-6}.items()
    }
    floors = {"memory, copy": [0.9e-6 * rows] * 6, "empty kernel, replayed": [0.8e-6] * 6}
    return Case(labels, "swift_kernels", samples, floors=floors)


def test_targets_are_read_from_the_cases_that_they_speak_of():
    environment = {**results.environment(results.torch.device("cpu")), "driver": "1"}
    cases = [step_case(rows) for rows in (1, 64, 256)] + [step_case(64, "called")]
    measured = {"score_step": Result("score_step", environment, {"quick": False}, cases)}
    figures = {target.what: target.figure(measured) for target in targets.TARGETS}
    assert figures["score_step, launch included (rows)"] == "30.0x (64)"
    assert figures["score_step, graph replay, on a CPU called (rows)"] == "2.50x (1), 2.50x (64), 2.50x (256)"
    assert figures["score_step, 1 row"] == "1.25x"
    assert figures["score_step, 256 rows, cold"] == "90%"
    assert figures["decode, CUDA graph, 8B shape"] is None


def test_no_difference_is_no_figure_in_the_targets_either():
    environment = results.environment(results.torch.device("cpu"))
    case = step_case(64)
    case.samples["cat"] = [0.5 * case.samples["swift_kernels"][0], *[2 * case.samples["swift_kernels"][0]] * 5]
    measured = {"score_step": Result("score_step", environment, {"quick": False}, [case])}
    figures = {target.what: target.figure(measured) for target in targets.TARGETS}
    assert figures["score_step, graph replay, on a CPU called (rows)"] == "no difference (64)"


def test_quick_runs_are_no_results(tmp_path):
    environment = results.environment(results.torch.device("cpu"))
    Result("score_step", environment, {"quick": True}, [step_case(1)]).save(tmp_path / "device")
    assert report.load_all(tmp_path) == {}


def test_a_readme_without_markers_is_refused():
    with pytest.raises(SystemExit, match="has no markers"):
        report.with_block("# title\n", "table")


def test_a_stage_ends_on_time_and_goes_on_where_it_was(monkeypatch, tmp_path, capsys):
    """The stages with commands of their own in place of benchmarks, as if this machine had a GPU."""
    count = tmp_path / "count"
    counting = (
        f"from pathlib import Path; p = Path({str(count)!r}); p.write_text(p.read_text() + 'x' if p.exists() else 'x')"
    )
    steps = [
        gpu.Step("passes", ["-c", counting]),
        gpu.Step("fails", ["-c", "raise SystemExit('why')"]),
        # Its child would hold the output open.
        gpu.Step("hangs", ["-c", "import subprocess; subprocess.run(['sleep', '60'])"]),
        gpu.Step("comes too late", ["-c", counting]),
        gpu.Step("lacks its tool", ["-c", counting], prefix=("no-such-tool",)),
    ]
    monkeypatch.setattr(gpu, "STAGES", {1: steps})
    monkeypatch.setattr(gpu, "LIMIT_SECONDS", 3)
    monkeypatch.setattr(gpu, "RESULTS", tmp_path)
    monkeypatch.setattr(results, "folder_of", lambda device: tmp_path / "device")
    monkeypatch.setattr(results, "environment", lambda device: dict.fromkeys(results.SAME, "one"))
    assert gpu.run_stage(1)
    output = capsys.readouterr().out
    assert "passes: exit status 0" in output
    assert "fails: exit status 1" in output
    assert "why" in output
    assert "hangs: exit status 124" in output
    assert "comes too late: exit status 124, 0 s" in output
    assert gpu.run_stage(1)
    assert count.read_text() == "xx", "what had passed was not run again, what had come too late was, before the hang"
    output = capsys.readouterr().out
    assert "not run: no-such-tool is not on the PATH" in output
    steps[1:3] = []
    log = tmp_path / "device" / "stage_1.json"
    outcomes = json.loads(log.read_text())
    outcomes["outcomes"] = {name: outcomes["outcomes"][name] for name in ("passes", "comes too late")}
    log.write_text(json.dumps(outcomes))
    assert not gpu.run_stage(1), "a tool that is not there is no failure"
    monkeypatch.setattr(results, "environment", lambda device: dict.fromkeys(results.SAME, "another"))
    gpu.run_stage(1)
    assert count.read_text() == "xxxx"


def test_every_benchmark_has_its_place_in_a_stage():
    scripts = {path.stem for path in Path(gpu.__file__).parent.glob("*.py") if "Bench(" in path.read_text()} - {
        "harness"
    }
    staged = {step.arguments[1].removeprefix("bench.") for stage in gpu.STAGES.values() for step in stage}
    assert scripts <= staged
    in_make = (report.README.parent / "Makefile").read_text()
    assert all(name in in_make for name in report.SECTIONS)
