"""The stages of `bench.gpu` with steps of their own, as if this machine had a GPU.

Each ends in time, and all there is by then is saved, whatever a step does.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tarfile
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import gpu, gpu_dry_run, kernel_cache, machine, results, stage_log, stages, steps
from bench.gpu_dry_run import MOST_FILES
from bench.stages import ATTACH, KERNELS, LIMITS, MACHINE, STAGES, Benchmark, PytestRerun, PytestRun, Script, Step
from bench.summary import FEWEST_SAMPLES

ROOT = Path(gpu.__file__).parents[1]


@pytest.fixture
def work(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """What a stage works in, as if there were a GPU."""
    # Or the pytest that a step runs removes what earlier runs of this one have left.
    monkeypatch.setenv("PYTEST_DEBUG_TEMPROOT", str(tmp_path))
    folder = tmp_path / "work"
    for module in (gpu, stage_log, stages):
        monkeypatch.setattr(module, "WORK", folder)
    (folder / "results" / "device").mkdir(parents=True)
    (folder / "results" / "device" / "result.json").write_text("{}")
    monkeypatch.setattr(gpu, "MEASURED", folder / "results")
    monkeypatch.setattr(gpu, "SAVING", 0.0)
    monkeypatch.setattr(gpu, "seconds_since_start", lambda: 0.0)
    monkeypatch.setattr(kernel_cache, "ARCHIVE", tmp_path / "kernels.tar.gz")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(stages, "number_of_workers", lambda: 0)
    monkeypatch.setattr(results, "environment", lambda device_of: dict.fromkeys(results.SAME, "one"))
    return folder


def python(name: str, code: str, limit: float = 9.0, **more: Any) -> Step:
    return Step(name, ("-c", code), limit, **{"least": 1.0, **more})


def run(steps_of_it: list[Step], monkeypatch: pytest.MonkeyPatch, output: Path, seconds: float = 300.0) -> bool:
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
    assert time.monotonic() - begun < 100, "three steps of 9 s, each of which would take a minute"
    output = capsys.readouterr().out
    log = (tmp_path / "output" / "stage-1.log").read_text()
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
    outcomes = json.loads((tmp_path / "output" / "stage-1.json").read_text())["outcomes"]
    assert [outcome["status"] for outcome in outcomes.values()] == [0, 1, None, None, None, None, 0]
    assert [outcome["failed"] for outcome in outcomes.values()] == [False, True, True, True, True, False, False]
    assert "failed: fails, hangs, is deaf to signals, leaves a child" in output
    with tarfile.open(tmp_path / "output" / "results.tar.gz") as archive:
        assert "device/result.json" in archive.getnames()
    assert not list((tmp_path / "output").glob(".*"))


MEASURES_AND_WAITS = """
import pathlib, tarfile, time
(pathlib.Path({folder!r}) / "device" / "measured.json").write_text("{{}}")
def kept():
    try:
        return "device/measured.json" in tarfile.open({archive!r}).getnames()
    except OSError:
        return False
while not kept():
    time.sleep(0.1)
"""


def test_what_a_step_has_measured_is_kept_while_it_runs(monkeypatch, tmp_path, work):
    monkeypatch.setattr(steps, "LOOK_EVERY", 0.2)
    archive = tmp_path / "output" / "results.tar.gz"
    code = MEASURES_AND_WAITS.format(folder=str(work / "results"), archive=str(archive))
    assert not run([python("measures", code, limit=50.0)], monkeypatch, tmp_path / "output")


def test_no_step_begins_without_time_and_none_that_succeeded_runs_again(monkeypatch, tmp_path, work, capsys):
    count = tmp_path / "count"
    counts = f"open({str(count)!r}, 'a').write('x')"
    made = [python("counts", counts), python("hangs", HANGS, limit=30.0), python("is late", counts, least=5.0)]
    assert not run([*made[:1], made[2]], monkeypatch, tmp_path / "output")
    assert count.read_text() == "xx"
    assert run(made, monkeypatch, tmp_path / "output", seconds=8.0)
    assert count.read_text() == "xx", "what had succeeded was not run again"
    assert "== hangs: ended after" in capsys.readouterr().out
    assert run([made[1], python("is later", counts, least=5.0)], monkeypatch, tmp_path / "output", seconds=8.0)
    assert "== is later: not run: no time was left" in capsys.readouterr().out
    for commit in ("another", "one+changes", "one+changes", "unknown", "unknown"):
        monkeypatch.setattr(results, "environment", lambda device, at=commit: dict.fromkeys(results.SAME, at))
        run(made[:1], monkeypatch, tmp_path / "output")
    assert count.read_text() == "xxxxxxx", "on another tree, and on one that may differ each time"
    (work / "stage-1.json").write_text("{")
    assert not run(made[:1], monkeypatch, tmp_path / "output"), "notes that were cut short are none"


TESTS = """
import ctypes, signal, time
import pytest
@pytest.mark.parametrize("number", [1, 2, 3])
def test_some(number):
    assert number != 2
def test_slow():
    {hang}
"""
DEAF_TO_ALL = "signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT, signal.SIGTERM]); ctypes.CDLL(None).sleep(60)"


def test_tests_are_named_one_by_one_and_those_that_failed_come_first_in_the_next_stage(monkeypatch, tmp_path, work):
    file = tmp_path / "test_it.py"
    file.write_text(TESTS.format(hang="pass"))
    rerun = PytestRerun("failed", (str(file),), 100.0, fine=(0, stages.NONE_FOUND))
    output = tmp_path / "output"
    assert rerun.why_not() == "no test is known to have failed"
    assert run([PytestRun("tests", (str(file),), 100.0, chosen="some")], monkeypatch, output)
    assert "test_it.py::test_some[1] PASSED" in (output / "stage-1.log").read_text()
    cases = ElementTree.parse(output / "tests.xml").iter("testcase")
    assert {case.get("name"): len(case) for case in cases} == {"test_some[1]": 0, "test_some[2]": 1, "test_some[3]": 0}
    # In another checkout, from what was saved, with a name that is gone since.
    names = json.loads((output / "failed_tests.json").read_text())
    [name] = names
    assert name.endswith("::test_some[2]")
    (tmp_path / "saved.json").write_text(json.dumps({**names, name.replace("some[2]", "gone"): True}))
    stages.failed_tests_file().unlink()
    gpu.use_failed(tmp_path / "saved.json")
    for workers in (0, 1):
        monkeypatch.setattr(stages, "number_of_workers", lambda found=workers: found)
        assert run([rerun], monkeypatch, output)
        cases = ElementTree.parse(output / "failed.xml").iter("testcase")
        assert {case.get("name"): len(case) for case in cases} == {"test_some[2]": 1}, "that one alone"
        assert "number     = 2" in (output / "stage-1.log").read_text(), "with what its variables were"
    file.write_text(TESTS.format(hang="pass").replace("!= 2", "!= 4"))
    assert not run([rerun], monkeypatch, output), "mended"
    stages.failed_tests_file().write_text("")
    assert stages.failed_before() == []
    (tmp_path / "wrong").write_text("[1")
    for path in (tmp_path / "wrong", tmp_path / "missing"):
        with pytest.raises(SystemExit, match=r"cannot be read .* expected failed_tests\.json"):
            gpu.use_failed(path)


@pytest.mark.parametrize("fault", ["no such file", "a conftest that fails"])
def test_tests_that_cannot_run_are_a_failure(monkeypatch, tmp_path, work, fault):
    """pytest's own exit statuses are not those by which benchmarks tell that something was left out."""
    file = tmp_path / "test_it.py"
    if fault != "no such file":
        file.write_text(TESTS.format(hang="pass"))
        (tmp_path / "conftest.py").write_text("import nothing_of_this_name")
    assert run([PytestRun("tests", (str(file),), 30.0)], monkeypatch, tmp_path / "output")


@pytest.mark.slow
@pytest.mark.parametrize(("workers", "hang"), [(0, "time.sleep(60)"), (2, DEAF_TO_ALL)], ids=["interruptible", "in C"])
def test_a_test_that_hangs_leaves_the_others_results(monkeypatch, tmp_path, work, workers, hang):
    """In a worker also one that hangs as in a driver, where no interrupt reaches Python."""
    monkeypatch.setattr(stages, "number_of_workers", lambda: workers)
    file = tmp_path / "test_it.py"
    file.write_text(TESTS.format(hang=hang))
    assert run([PytestRun("tests", (str(file),), 30.0, shared=True)], monkeypatch, tmp_path / "output")
    output = tmp_path / "output"
    log = (output / "stage-1.log").read_text()
    assert "its limit" in log
    assert "assert 2 != 2" in log, "the traceback of one that failed before"
    assert "test_slow" in log, "what it did when half of its time was over"
    names = [case.get("name") for case in ElementTree.parse(output / "tests.xml").iter("testcase")]
    assert {"test_some[1]", "test_some[2]", "test_some[3]"} <= set(names)
    assert "test_some[2]" in (output / "failed_tests.json").read_text()


BROKEN_BY_ONE = """
import os
import pytest, torch
from tests.conftest import pytest_runtest_logreport
broken = []
def synchronize():
    if broken:
        raise RuntimeError("an illegal memory access was encountered")
torch.cuda.is_initialized = lambda: True
torch.cuda.synchronize = synchronize
@pytest.fixture
def gpu():
    yield broken
    synchronize()
"""
ONE_BREAKS_IT = """
import pytest, torch
@pytest.mark.parametrize("number", range(24))
def test_some(gpu, number):
    if number == 5:
        gpu.append("broken")
    torch.cuda.synchronize()
"""


@pytest.mark.slow
def test_a_test_that_breaks_the_gpu_for_its_process_fails_alone(monkeypatch, tmp_path, work):
    monkeypatch.setattr(stages, "number_of_workers", lambda: 2)
    (tmp_path / "conftest.py").write_text(BROKEN_BY_ONE)
    file = tmp_path / "test_it.py"
    file.write_text(ONE_BREAKS_IT)
    assert run([PytestRun("tests", (str(file),), 200.0, shared=True)], monkeypatch, tmp_path / "output")
    [name] = json.loads((tmp_path / "output" / "failed_tests.json").read_text())
    assert name.endswith("::test_some[5]")
    cases = ElementTree.parse(tmp_path / "output" / "tests.xml").iter("testcase")
    passed = {case.get("name") for case in cases if not len(case)}
    assert passed >= {f"test_some[{number}]" for number in range(24) if number != 5}


def test_a_folder_that_takes_nothing_is_told_once_and_the_rest_goes_on(monkeypatch, tmp_path, work, capsys):
    (tmp_path / "file").write_text("")
    made = [python("one", "print('first')"), python("two", "print('second')")]
    assert not run(made, monkeypatch, tmp_path / "file" / "output")
    output = capsys.readouterr().out
    assert output.count("cannot keep everything in") == 1
    assert "Not a directory" in output
    assert "second" in (work / "stage-1.log").read_text()

    def full(self: Path, content: bytes) -> int:
        raise OSError(28, os.strerror(28))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        assert not run([python("three", "print('third')")], monkeypatch, tmp_path / "output")
    assert "No space left on device" in capsys.readouterr().out
    monkeypatch.setattr(tarfile, "open", lambda *_: full(Path(), b""))
    assert not run([python("four", "print('fourth')")], monkeypatch, tmp_path / "output")
    output = capsys.readouterr().out
    assert "No space left on device" in output
    assert "== four: exit status 0" in output


def test_without_a_gpu_every_step_says_so_and_the_machine_is_described(monkeypatch, tmp_path, work, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert run([MACHINE, python("measures", "print('never')")], monkeypatch, tmp_path / "output")
    output = capsys.readouterr().out
    assert "== measures: not run: torch sees no CUDA device" in output
    assert "| CUDA |" not in output, "what a CPU measured is no figure of a GPU"
    assert "nothing was measured: torch sees no CUDA device" in output
    log = (tmp_path / "output" / "stage-1.log").read_text()
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
        files = {"a log", "its notes", "failed_tests.json", "results.tar.gz"} | {s.xml.name for s in every if s.xml}
        assert len(files) <= MOST_FILES
        assert len({step.name for step in every}) == len(every)
        for step in every:
            assert step.limit <= LIMITS[stage]
            command = step.command(step.limit)
            assert ("-v" in command and "-q" not in command) or not isinstance(step, PytestRun)
            if isinstance(step, Benchmark):
                assert float(command[command.index("--budget") + 1]) < step.limit - step.grace
                if "--samples" in command:
                    assert int(command[command.index("--samples") + 1]) >= FEWEST_SAMPLES
    assert [step.name.partition(" ")[0] for step in STAGES[1]] == [
        *("machine", "stress", "tests", "score_step", "decode", "score_sequence", "memory")
    ]
    assert isinstance(STAGES[1][1], Script)
    assert STAGES[1][2].arguments == (*KERNELS, ATTACH)
    assert STAGES[2][0].name == "failed"
    memcheck = next(step for step in STAGES[2] if step.name == "memcheck")
    assert memcheck.environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] == "1"


def test_a_dry_run_counts_tests_and_kernels_and_estimates_a_stage(monkeypatch, tmp_path, work, capsys):
    monkeypatch.setattr(gpu_dry_run, "WORK", work)
    monkeypatch.setattr(gpu_dry_run, "DRY_RUN", tmp_path / "dry-run")
    file = tmp_path / "test_it.py"
    file.write_text(TESTS.format(hang="pass"))
    counted = {"tests": 8, "compiled": 40, "compiling": 20.0, "seconds": 28.0}
    (tmp_path / "cache").mkdir()
    kernel_cache.pack(tmp_path / "cache", kernel_cache.ARCHIVE, {"parts": {str(file): counted}})
    step = PytestRun("tests", (str(file),), 100.0, expected=10.0, shared=True)
    monkeypatch.setitem(STAGES, 1, [MACHINE, step])
    assert not gpu_dry_run.dry_run([1], tmp_path / "output")
    output = capsys.readouterr().out
    # Of eight tests that take a second each and need 40 kernels of half a second, four are there, for six processes.
    assert "| tests | 100 | 4 | 20 | 11 | 12 |" in output
    assert "stage 1: 19 s estimated of 400 s, 20 s without kernels compiled ahead" in output
    assert "files in" in output
    assert "test_it.py::test_some[2]" in (tmp_path / "output" / "dry-run-1.log").read_text()
    monkeypatch.setitem(STAGES, 1, [PytestRun("tests", (str(file),), 100.0, chosen="misspelt")])
    assert gpu_dry_run.dry_run([1], tmp_path / "output"), "nothing chosen is a failure"
    assert "failed: tests" in capsys.readouterr().out


PARENT = """
import signal, sys
signal.signal(signal.SIGINT, signal.SIG_IGN)
from pathlib import Path
from bench import steps
steps.end_what_runs_when_ended()
command, grace = [sys.executable, '-c', {code!r}], float(sys.argv[2])
print(steps.run(command, 30.0, Path(sys.argv[1]), {{}}, grace=grace).seconds, flush=True)
"""


def test_what_runs_in_the_background_can_be_interrupted(tmp_path):
    """A shell has it ignore interrupts, and its children inherit that."""
    log = tmp_path / "log"
    parent = PARENT.format(code=HANGS)
    variables = {"PYTHONPATH": str(ROOT)}
    outcome = steps.run([sys.executable, "-c", parent, str(tmp_path / "child"), "25"], 60.0, log, variables)
    assert outcome.succeeded, log.read_text()
    assert float(log.read_text()) < 29, "half of its limit, then interrupted"
    assert "KeyboardInterrupt" in (tmp_path / "child").read_text()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=lambda number: number.name)
def test_what_a_stage_runs_ends_with_it(tmp_path, number):
    child = tmp_path / "child"
    tells = "import os, time; print(os.getpid(), flush=True); time.sleep(300)"
    command = [sys.executable, "-c", PARENT.format(code=tells), str(child), "1"]
    parent = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.DEVNULL)
    until = time.monotonic() + 60
    while not (child.exists() and child.read_text().endswith("\n")) and time.monotonic() < until:
        time.sleep(0.05)
    pid = int(child.read_text())
    parent.send_signal(number)
    parent.wait()
    while is_alive(pid) and time.monotonic() < until:
        time.sleep(0.05)
    assert not is_alive(pid)


def is_alive(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False


def test_how_long_a_process_is_there():
    code = "import time; time.sleep(0.5); from bench.steps import seconds_since_start as s; print(s())"
    variables = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=variables, capture_output=True)
    assert 0.5 <= float(done.stdout) <= 60
