"""What the README says was measured is what the results hold, and what was not measured says so."""

from __future__ import annotations

import dataclasses
import tarfile
from pathlib import Path

import pytest

from bench import report, results, targets
from bench.results import RESULTS, Case, Result
from bench.stages import STAGES, Benchmark
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


def test_results_of_several_stages_are_added_up(tmp_path, capsys):
    environment = {**results.environment(results.torch.device("cpu")), "commit": "a" * 40}

    def archive(name: str, *cases: Case, commit: str = "a" * 40) -> Path:
        found = Result("score_step", {**environment, "commit": commit}, {"quick": False}, list(cases))
        found.save(tmp_path / name / "gpu")
        with tarfile.open(tmp_path / f"{name}.tar.gz", "w:gz") as packed:
            packed.add(tmp_path / name / "gpu", "gpu")
        return tmp_path / f"{name}.tar.gz"

    first, again = step_case(64), step_case(64)
    again.samples["cat"] = [1.0] * 6
    folder = tmp_path / "results"
    report.add(archive("one", first, step_case(256)), folder)
    report.add(archive("two", step_case(8), again), folder)
    cases = Result.load(folder / "gpu" / "score_step.json").cases
    assert [case.labels["rows"] for case in cases] == [256, 8, 64]
    assert cases[2].samples["cat"] == again.samples["cat"], "the newer of two"
    assert "gpu/score_step.json: 3 cases" in capsys.readouterr().out
    with pytest.raises(SystemExit, match=f"other conditions, at {'a' * 40} and not at {'b' * 40}: move it away"):
        report.add(archive("three", step_case(1), commit="b" * 40), folder)
    (tmp_path / "cut.tar.gz").write_bytes(archive("four", step_case(1)).read_bytes()[:50])
    with pytest.raises(SystemExit, match=r"cannot be read .* expected results"):
        report.add(tmp_path / "cut.tar.gz", folder)


def test_a_readme_without_markers_is_refused():
    with pytest.raises(SystemExit, match="has no markers"):
        report.with_block("# title\n", "table")


def test_every_benchmark_has_its_place_in_a_stage():
    scripts = {path.stem for path in Path(report.__file__).parent.glob("*.py") if "Bench(" in path.read_text()} - {
        "harness"
    }
    staged = {step.module for stage in STAGES.values() for step in stage if isinstance(step, Benchmark)}
    assert scripts <= staged
    in_make = (report.README.parent / "Makefile").read_text()
    assert all(name in in_make for name in report.SECTIONS)
