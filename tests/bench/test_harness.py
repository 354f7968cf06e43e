"""Cases are saved as they come, resumed on the same tree, and no figure is made by a quick run."""

from __future__ import annotations

import argparse
import itertools
import json

import pytest
import torch

from bench import harness, results
from bench.harness import LEFT_OUT, Bench, take_turns
from bench.results import Case, Result

SAMPLES = [0.002, 0.0021, None, 0.0019, 0.002, 0.0022, 0.002]


@pytest.fixture
def options(tmp_path) -> argparse.Namespace:
    return harness.parser(None).parse_args(["--device", "cpu", "--results", str(tmp_path)])


def case(rows: int) -> Case:
    return Case(
        {"rows": rows, "cache": "cold"},
        "ours",
        {"ours": SAMPLES, "theirs": [sample and 3 * sample for sample in SAMPLES]},
        moved=1000,
        floors={"memory, sum": [0.001] * 6, "memory, copy": [0.0005] * 6, "empty op": [0.00001] * 6},
        metrics={"peak bytes": {"ours": 12.0}},
    )


def test_a_result_is_read_as_it_was_written(options, tmp_path, capsys):
    with Bench("name", options) as bench:
        bench.add(case(1))
        [path] = tmp_path.glob("*/name.json")
        assert len(json.loads(path.read_text())["cases"]) == 1, "saved as it came"
        bench.add(case(8))
    found = Result.load(path)
    assert found.cases == [case(1), case(8)]
    assert found.environment["commit"]
    assert {"device", "torch", "threads", "date", "driver"} <= found.environment.keys()
    assert path.with_suffix(".png").exists()
    output = capsys.readouterr().out
    assert "3.00x (3.00-3.00)" in output
    assert "500 us" in output, "the floor is the fastest way to move the bytes"
    assert "6, 1 lost" in output


def test_only_what_is_missing_is_measured_again(options, monkeypatch):
    options.resume = True
    with Bench("name", options) as bench:
        bench.add(case(1))
    with Bench("name", options) as bench:
        assert not bench.wants(case(1).labels)
        assert bench.wants(case(8).labels)
        bench.add(case(8))
        assert [each.labels["rows"] for each in bench.result.cases] == [1, 8]
    monkeypatch.setattr(results, "git_commit", lambda: "another")
    with Bench("name", options) as bench:
        assert bench.wants(case(1).labels), "measured on another tree"
        bench.add(case(1))


def test_what_is_left_for_lack_of_time_is_told(options, capsys):
    options.budget = 0.0
    bench = Bench("name", options)
    bench.add(case(1))
    assert not bench.wants(case(8).labels)
    with pytest.raises(SystemExit) as end:
        bench.__exit__(None, None, None)
    assert end.value.code == LEFT_OUT
    assert "not measured for lack of time: 8 rows, cold" in capsys.readouterr().out


def test_what_a_gpu_does_not_hold_is_left_out_and_the_rest_goes_on(options, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(harness.torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(harness.torch.cuda, "mem_get_info", lambda: (1 << 30, 12_000_000_000))
    with Bench("name", options) as bench:
        with bench.going_on("8b"):
            raise torch.OutOfMemoryError("as large as the model is")
        for rows in (1, 64, 8):
            with bench.going_on("8b"):
                assert bench.wants(case(rows).labels)
                if rows == 64:
                    raise torch.OutOfMemoryError("as large as 64 rows are")
                bench.add(case(rows))
    [path] = tmp_path.glob("*/name.json")
    assert Result.load(path).cases == [case(1), case(8)]
    output = capsys.readouterr().out
    assert "not measured: 8b: it needs more than the 12 GB of this GPU" in output
    assert "not measured: 64 rows, cold: it needs more than the 12 GB of this GPU" in output
    assert output.count("not measured") == 2


def test_a_case_that_fails_is_told_and_the_rest_goes_on(options, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(harness.torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(harness.torch.cuda, "mem_get_info", lambda: (1 << 30, 12_000_000_000))
    faults = {
        1: ValueError("what went wrong\nand more of it"),
        8: SystemExit("ours scores otherwise than the reference"),
        64: RuntimeError("CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"),
    }
    bench = Bench("name", options)
    for rows in (1, 8, 64, 256):
        with bench.going_on("8b"):
            assert bench.wants(case(rows).labels)
            if rows in faults:
                raise faults[rows]
            bench.add(case(rows))
    with pytest.raises(SystemExit) as end:
        bench.__exit__(None, None, None)
    assert end.value.code == 1
    [path] = tmp_path.glob("*/name.json")
    assert Result.load(path).cases == [case(256)]
    output, error = capsys.readouterr()
    assert "failed: 1 row, cold: what went wrong\n" in output
    assert "failed: 8 rows, cold: ours scores otherwise than the reference" in output
    assert "not measured: 64 rows, cold: it needs more than the 12 GB of this GPU" in output
    assert "Traceback" in error
    with pytest.raises(KeyboardInterrupt), bench.going_on("8b"):
        raise KeyboardInterrupt


def test_a_rival_that_fails_is_left_out_with_a_note_and_ours_may_not():
    class Contender:
        def __init__(self, name: str) -> None:
            self.name = name

    def attempt(contender: Contender) -> str:
        if contender.name != "good":
            raise SystemExit(f"{contender.name} scores otherwise")
        return "made"

    contenders = [Contender("good"), Contender("bad")]
    assert harness.without_faulty(contenders, attempt, "good") == (
        {"good": "made"},
        ["without bad: bad scores otherwise"],
    )
    with pytest.raises(SystemExit, match="bad scores otherwise"):
        harness.without_faulty(contenders, attempt, "bad")


def test_an_interrupted_run_leaves_what_was_measured(options, tmp_path):
    def interrupted() -> None:
        with Bench("name", options) as bench:
            bench.add(case(1))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    [path] = tmp_path.glob("*/*.json")
    assert Result.load(path).cases == [case(1)]
    assert not list(tmp_path.glob("*/*.tmp"))


def test_a_quick_run_writes_no_results():
    options = harness.parser(None).parse_args(["--quick"])
    with pytest.raises(SystemExit, match="expected --results FOLDER"):
        Bench("name", options)


@pytest.mark.parametrize("why", [None, "it does not fit"], ids=["", "left out"])
def test_a_run_without_cases_is_no_result(options, tmp_path, capsys, why):
    bench = Bench("name", options)
    if why:
        bench.leave_out([case(8).labels], why)
    with pytest.raises(SystemExit) as end, bench:
        pass
    assert end.value.code == (harness.NOT_HERE if why else 1)
    error = capsys.readouterr().err
    assert "name: nothing was measured" in error
    assert why is None or "not measured: 8 rows, cold: it does not fit" in error
    assert not list(tmp_path.glob("*/*.json"))


def test_a_folder_that_cannot_be_made_is_named(options, tmp_path):
    (tmp_path / "file").write_text("")
    options.results = tmp_path / "file"
    with pytest.raises(SystemExit, match="cannot be made for the results"):
        Bench("name", options)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--samples", "0"], "'0' is no whole number from 1 on"),
        (["--threads", "x"], "'x' is no whole number"),
        (["--device", "tpu"], "neither cpu nor cuda"),
        (["--rows", "1,-2"], "'-2' is no whole number"),
        (["--cache", "cold,hot"], "'hot' is none of: cold, warm"),
    ],
    ids=["samples", "threads", "device", "rows", "cache"],
)
def test_bad_arguments_are_named(capsys, arguments, message):
    parser = harness.parser(None)
    parser.add_argument("--rows", type=harness.counts)
    parser.add_argument("--cache", type=harness.choices("cold", "warm"))
    with pytest.raises(SystemExit) as end:
        parser.parse_args(arguments)
    assert end.value.code == 2
    assert message in capsys.readouterr().err


def test_a_device_that_is_not_there_is_named(capsys, monkeypatch):
    monkeypatch.setattr(harness.torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        harness.parser(None).parse_args(["--device", "cuda"])
    assert "torch sees no CUDA device" in capsys.readouterr().err


def test_everyone_follows_everyone():
    order: list[str] = []

    def sampler(name: str):
        return lambda _: order.append(name) or 1.0

    take_turns({name: sampler(name) for name in "abc"}, 18)
    followed = set(itertools.pairwise(order))
    assert followed >= {(a, b) for a in "abc" for b in "abc" if a != b}
    assert all(sorted(order[start : start + 3]) == ["a", "b", "c"] for start in range(0, len(order), 3))


def test_disturbed_samples_are_taken_again_until_patience_ends():
    busy = iter([None, 1.0] * 100)
    samples = take_turns({"a": lambda _: next(busy), "b": lambda _: 1.0}, 4)
    assert samples["a"] == [None, 1.0] * 4
    assert len(samples["b"]) == 8, "the same place is the same round"
    assert take_turns({"a": lambda _: None}, 4)["a"] == [None] * 4 * harness.PATIENCE
