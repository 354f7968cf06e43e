"""The stages of `bench.gpu` with steps of their own, as if this machine had a GPU.

Each ends in time, and all there is by then is saved, whatever a step does.
"""

from __future__ import annotations

import json
import os
import sys
import tarfile
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import gpu, kernel_cache, machine, results, stage_log, stages, steps
from bench.gpu_dry_run import MOST_FILES
from bench.harness import NOT_HERE
from bench.stages import ATTACH, KERNELS, LIMITS, MACHINE, STAGES, Benchmark, PytestRerun, PytestRun, Script, Step

ROOT = Path(gpu.__file__).parents[1]


@pytest.fixture
def work(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """What a stage works in, with a device, and a grace of a second before the kill."""
    folder = tmp_path / "work"
    for module in (gpu, stage_log, stages):
        monkeypatch.setattr(module, "WORK", folder)
    device = tmp_path / "device"
    device.mkdir()
    (device / "result.json").write_text("{}")
    monkeypatch.setattr(gpu, "RESULTS", tmp_path)
    monkeypatch.setattr(gpu, "LEAST", 1.0)
    monkeypatch.setattr(gpu, "SAVING", 0.0)
    monkeypatch.setattr(steps, "GRACE", 1.0)
    monkeypatch.setattr(kernel_cache, "ARCHIVE", tmp_path / "kernels.tar.gz")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(stages, "number_of_workers", lambda: 0)
    monkeypatch.setattr(results, "folder_of", lambda device_of: device)
    monkeypatch.setattr(results, "environment", lambda device_of: dict.fromkeys(results.SAME, "one"))
    return folder


def python(name: str, code: str, limit: float = 3.0, **more: Any) -> Step:
    return Step(name, ("-c", code), limit, **more)


def run(steps_of_it: list[Step], monkeypatch: pytest.MonkeyPatch, output: Path, seconds: float = 60.0) -> bool:
    monkeypatch.setitem(STAGES, 1, steps_of_it)
    return gpu.run_stage(1, output, seconds)


HANGS = "import time; print('about to hang', flush=True); time.sleep(60)"
DEAF = "import signal; [signal.signal(each, signal.SIG_IGN) for each in (signal.SIGINT, signal.SIGTERM)]; " + HANGS
LEAVES_A_CHILD = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])"


def test_whatever_a_step_does_the_others_run_and_all_is_saved(monkeypatch, tmp_path, work, capsys):
    made = [
        python("passes", "print('passed')"),
        python("fails", "raise SystemExit('why')"),
        python("hangs", HANGS),
        python("is deaf to signals", DEAF),
        python("leaves a child", LEAVES_A_CHILD),
        python("lacks its tool", "print()", prefix=("no-such-tool",)),
        python("comes last", "print('the last')"),
    ]
    begun = time.monotonic()
    assert run(made, monkeypatch, tmp_path / "output")
    assert time.monotonic() - begun < 60, "three steps of 3 s, each of which would take a minute"
    output = capsys.readouterr().out
    log = (tmp_path / "output" / "log.txt").read_text()
    for line in (
        "== passes: exit status 0 after",
        "== fails: exit status 1 after",
        "== hangs: ended after",
        "== is deaf to signals: ended after",
        "== leaves a child: ended after",
        "== lacks its tool: not run: no-such-tool is not on the PATH",
        "== comes last: exit status 0 after",
    ):
        assert line in output
        assert line in log
    assert log.splitlines().count("about to hang") == 2
    assert "KeyboardInterrupt" in log.splitlines(), "one that hears is interrupted, and can save what it has"
    outcomes = json.loads((tmp_path / "output" / "steps.json").read_text())["outcomes"]
    assert [outcome["status"] for outcome in outcomes.values()] == [0, 1, 124, 124, 124, NOT_HERE, 0]
    with tarfile.open(tmp_path / "output" / "results.tar.gz") as archive:
        assert "device/result.json" in archive.getnames()
    assert not list((tmp_path / "output").glob(".*"))


def test_no_step_begins_without_time_and_none_that_succeeded_runs_again(monkeypatch, tmp_path, work, capsys):
    count = tmp_path / "count"
    counts = f"open({str(count)!r}, 'a').write('x')"
    made = [python("counts", counts), python("hangs", HANGS, limit=30.0), python("is late", counts)]
    assert not run([*made[:1], made[2]], monkeypatch, tmp_path / "output")
    assert count.read_text() == "xx"
    assert run(made, monkeypatch, tmp_path / "output", seconds=4.0)
    assert count.read_text() == "xx", "what had succeeded was not run again"
    assert "== hangs: ended after" in capsys.readouterr().out
    assert run([made[1], python("is later", counts)], monkeypatch, tmp_path / "output", seconds=4.0)
    assert "== is later: not run: no time was left" in capsys.readouterr().out
    for commit in ("another", "one+changes", "one+changes"):
        monkeypatch.setattr(results, "environment", lambda device, at=commit: dict.fromkeys(results.SAME, at))
        run(made[:1], monkeypatch, tmp_path / "output")
    assert count.read_text() == "xxxxx", "on another tree, and on one that may differ each time"


TESTS = """
import time
import pytest
@pytest.mark.parametrize("number", [1, 2, 3])
def test_some(number):
    assert number != 2
def test_slow():
    time.sleep({seconds})
"""


def test_tests_are_named_one_by_one_and_those_that_failed_come_first_in_the_next_stage(monkeypatch, tmp_path, work):
    file = tmp_path / "test_it.py"
    file.write_text(TESTS.format(seconds=0))
    assert PytestRerun("failed", (), 30.0).why_not() == "not run: no test is known to have failed"
    assert run([PytestRun("tests", (str(file),), 30.0, chosen="some")], monkeypatch, tmp_path / "output")
    output = tmp_path / "output"
    assert "test_it.py::test_some[1] PASSED" in (output / "log.txt").read_text()
    cases = ElementTree.parse(output / "tests.xml").iter("testcase")
    faults = {case.get("name"): len(case) for case in cases}
    assert faults == {"test_some[1]": 0, "test_some[2]": 1, "test_some[3]": 0}
    [failed] = json.loads((output / "failed_tests.json").read_text())
    assert failed.endswith("test_it.py::test_some[2]")
    assert stages.failed_before() == [failed]
    command = PytestRerun("failed", (), 30.0).command(30.0)
    assert command[-1] == failed
    assert "--tb=long" in command
    # In another checkout, from what was saved.
    stages.failed_tests_file().unlink()
    gpu.use_failed(output / "failed_tests.json")
    assert stages.failed_before() == [failed]
    (tmp_path / "wrong").write_text("[1")
    for path in (tmp_path / "wrong", tmp_path / "missing"):
        with pytest.raises(SystemExit, match=r"cannot be read .* expected failed_tests\.json"):
            gpu.use_failed(path)


@pytest.mark.parametrize("workers", [0, 2], ids=["one process", "two workers"])
def test_a_test_that_hangs_leaves_the_others_results(monkeypatch, tmp_path, work, workers):
    monkeypatch.setattr(steps, "GRACE", 5.0)
    monkeypatch.setattr(stages, "number_of_workers", lambda: workers)
    file = tmp_path / "test_it.py"
    file.write_text(TESTS.format(seconds=60))
    assert run([PytestRun("tests", (str(file),), 20.0, shared=True)], monkeypatch, tmp_path / "output")
    output = tmp_path / "output"
    log = (output / "log.txt").read_text()
    assert "its limit" in log
    assert "test_some[2]" in log
    assert "assert 2 != 2" in log, "the traceback of one that failed before"
    assert 'test_it.py", line 8 in test_slow' in log or workers, "what it did when half of its time was over"
    names = [case.get("name") for case in ElementTree.parse(output / "tests.xml").iter("testcase")]
    assert {"test_some[1]", "test_some[2]", "test_some[3]"} <= set(names)
    assert "test_some[2]" in (output / "failed_tests.json").read_text()


def test_a_folder_that_takes_nothing_is_told_once_and_the_rest_goes_on(monkeypatch, tmp_path, work, capsys):
    (tmp_path / "file").write_text("")
    made = [python("one", "print('first')"), python("two", "print('second')")]
    assert not run(made, monkeypatch, tmp_path / "file" / "output")
    output = capsys.readouterr().out
    assert output.count("cannot keep") == 1
    assert "Not a directory; it stays in" in output
    assert "second" in (work / "stage-1.log").read_text()

    def full(self: Path, content: bytes) -> int:
        raise OSError(28, os.strerror(28))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        assert not run([python("three", "print('third')")], monkeypatch, tmp_path / "output")
    assert "No space left on device" in capsys.readouterr().out


def test_without_a_gpu_every_step_says_so_and_the_machine_is_described(monkeypatch, tmp_path, work, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert run([MACHINE, python("measures", "print('never')")], monkeypatch, tmp_path / "output")
    output = capsys.readouterr().out
    assert "== measures: not run: torch sees no CUDA device" in output
    assert "| CUDA |" not in output, "what a CPU measured is no figure of a GPU"
    log = (tmp_path / "output" / "log.txt").read_text()
    assert f"torch {results.version('torch')}" in log
    assert "gpu: torch sees no CUDA device" in log
    assert "never" not in log


def test_kernels_of_another_triton_and_damaged_ones_are_told(monkeypatch, tmp_path, work, capsys):
    assert "none compiled ahead" in machine.kernels()
    folder = tmp_path / "cache"
    (folder / "KEY").mkdir(parents=True)
    (folder / "KEY" / "a.cubin").write_text("")
    parts = {"bench": {"compiled": 7}}
    kernel_cache.pack(folder, kernel_cache.ARCHIVE, {"triton": "0.1", "target": "sm_90", "parts": parts})
    assert "7 builds ahead, by Triton 0.1 for sm_90: of no use to Triton" in machine.kernels()
    assert kernel_cache.builds_in(gpu.use_kernels()) == 1
    kernel_cache.ARCHIVE.write_bytes(kernel_cache.ARCHIVE.read_bytes()[:80])
    assert "cannot be read" in machine.kernels()
    assert gpu.use_kernels() == work / "triton-cache"
    assert "cannot be used" in capsys.readouterr().out


def test_the_stages_have_what_they_promise():
    """Files that fit, limits within the stage's, tests by name, the most telling first."""
    assert LIMITS[1] <= 400
    assert LIMITS[2] <= 225
    for stage, every in STAGES.items():
        files = {"log.txt", "steps.json", "failed_tests.json", "results.tar.gz"} | {s.xml.name for s in every if s.xml}
        assert len(files) <= MOST_FILES
        assert len({step.name for step in every}) == len(every)
        for step in every:
            assert step.limit <= LIMITS[stage]
            command = step.command(step.limit)
            assert ("-v" in command and "-q" not in command) or not isinstance(step, PytestRun)
            if isinstance(step, Benchmark):
                assert float(command[command.index("--budget") + 1]) < step.limit
    assert [step.name.partition(" ")[0] for step in STAGES[1]] == [
        *("machine", "stress", "tests", "score_step", "decode", "score_sequence", "memory")
    ]
    assert isinstance(STAGES[1][1], Script)
    assert STAGES[1][2].arguments == (*KERNELS, ATTACH)
    assert STAGES[2][0].name == "failed"
    memcheck = next(step for step in STAGES[2] if step.name == "memcheck")
    assert memcheck.environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] == "1"


def test_what_fails_in_a_shell_that_ignores_interrupts_is_still_interrupted(tmp_path):
    """A shell runs what it puts into the background with interrupts ignored, and children inherit that."""
    code = (
        "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        "from pathlib import Path\n"
        "from bench import gpu, steps\n"
        "steps.GRACE = 20.0\n"
        "gpu.interruptible()\n"
        f"outcome = steps.run(['{sys.executable}', '-c', {HANGS!r}], 22.0, Path({str(tmp_path / 'log')!r}), {{}})\n"
        "assert outcome.seconds < 10, outcome\n"
    )
    log = tmp_path / "log"
    outcome = steps.run([sys.executable, "-c", code], 60.0, log, {"PYTHONPATH": str(ROOT)})
    assert outcome.status == 0, log.read_text()
    assert "KeyboardInterrupt" in log.read_text()
