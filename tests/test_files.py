"""Files that are replaced whole: killed half-way, the next write of the same file leaves nothing else behind."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from unittest import mock

import pytest

from swift_kernels import files

WRITES: dict[str, str] = {
    "text": "files.write_text(path, 'new' * 1000)",
    "tensors": "files.write_tensors(path, {'weight': torch.zeros(1000)})",
}


def killed_while_it_writes(code: str, path: Path) -> None:
    """The system kills a process in the middle of a file that grows beyond what it may have."""
    script = f"""
import resource, signal, torch
from pathlib import Path
from swift_kernels import files
path = Path({str(path)!r})
signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
{code}
"""
    assert subprocess.run([sys.executable, "-c", script]).returncode == -signal.SIGXFSZ


@pytest.mark.parametrize("code", WRITES.values(), ids=WRITES)
def test_killed_it_leaves_the_old_file_and_nothing_that_the_next_write_does_not_remove(
    tmp_path: Path, code: str
) -> None:
    path = tmp_path / "a [file].txt"
    path.write_text("old")
    for name in (".another.txt.12345678.tmp", ".a [file].txt.part0.12345678.tmp", ".a [file].txt.mine.tmp"):
        (tmp_path / name).write_text("of a file of another name")
    (tmp_path / ".a [file].txt.87654321.tmp").mkdir()
    before = set(tmp_path.iterdir())
    for _ in range(2):
        killed_while_it_writes(code, path)
        assert path.read_text() == "old"
        assert len(set(tmp_path.iterdir()) - before) == 1
    files.write_text(path, "new")
    assert path.read_text() == "new"
    assert set(tmp_path.iterdir()) == before


@pytest.mark.parametrize("meanwhile", ["removed", "written", "written by a library"])
def test_what_is_being_written_is_no_leftover(tmp_path: Path, meanwhile: str) -> None:
    path = tmp_path / "file.txt"
    with files.replacing(path) as temporary:
        if meanwhile == "written by a library":  # that replaces it by a file of its own
            temporary.unlink()
        temporary.write_text("first")
        if meanwhile == "removed":
            files.remove_leftovers(path)
        else:
            files.write_text(path, "second")
    assert path.read_text() == "first", "the last to end wins"
    assert list(tmp_path.iterdir()) == [path]


def test_who_writes_and_who_removes_leftovers_do_not_disturb_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Threads open the folder each for itself, as processes do."""
    monkeypatch.setattr(files, "PATIENCE", 100.0)

    def write(number: int) -> None:
        for _ in range(500):
            files.write_text(tmp_path / f"{number % 2}", str(number))

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(write, range(4)))
    assert {path.name for path in tmp_path.iterdir()} == {"0", "1"}


@pytest.fixture(params=["no locks", "no such module", "locked by who runs this"])
def without_locks(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[None]:
    with ExitStack() as stack:
        if request.param == "no such module":
            stack.enter_context(mock.patch.dict(sys.modules, fcntl=None))
        elif request.param == "no locks":
            error = OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))
            stack.enter_context(mock.patch.object(fcntl, "flock", side_effect=error))
        else:
            stack.enter_context(mock.patch.object(files, "PATIENCE", 0.01))
            descriptor = os.open(tmp_path, os.O_RDONLY)
            stack.callback(os.close, descriptor)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield


@pytest.mark.usefixtures("without_locks")
def test_without_locks_files_are_written_and_leftovers_stay(tmp_path: Path) -> None:
    leftover = tmp_path / ".file.txt.12345678.tmp"
    leftover.touch()
    files.write_text(tmp_path / "file.txt", "new")
    assert (tmp_path / "file.txt").read_text() == "new"
    assert leftover.exists()


HOLDS = """
import sys
from swift_kernels import files
with files.alone(sys.argv[1], folder=sys.argv[2] == "folder"):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture(params=["file", "folder"])
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@contextmanager
def another_process_holds(path: Path, kind: str) -> Iterator[subprocess.Popen[str]]:
    """A process that holds a path until it is told to end."""
    command = [sys.executable, "-c", HOLDS, str(path), kind]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    try:
        yield process
    finally:
        process.communicate()


def test_what_another_process_writes_is_refused_until_it_ends(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "deep" / "output"
    with another_process_holds(path, kind):
        with (
            pytest.raises(files.BusyError, match=rf"{path} is being written by another process"),
            files.alone(path, folder=kind == "folder"),
        ):
            pass
        with files.alone(tmp_path / "deep" / "another", folder=kind == "folder"):
            pass
    with files.alone(path, folder=kind == "folder"):
        pass
    assert not path.exists(), "nothing stays of a lock"


def test_what_a_killed_process_held_is_free_at_once(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "output"
    with another_process_holds(path, kind) as process:
        process.kill()
        process.wait()
        with (
            files.alone(path, folder=kind == "folder"),
            pytest.raises(files.BusyError),
            files.alone(path, folder=kind == "folder"),
        ):
            pass
    assert not [file for file in tmp_path.rglob("*") if file.is_file()]


def test_a_lock_is_taken_by_one_of_many_at_a_time(tmp_path: Path) -> None:
    """Threads open the lock each for itself, as processes do; it is removed and made again all the time."""
    inside: list[int] = []
    entered = []

    def enter(number: int) -> None:
        for _ in range(300):
            try:
                with files.alone(tmp_path / "output", folder=number % 2 == 0):
                    inside.append(number)
                    entered.append(number)
                    assert [other for other in inside if other % 2 == number % 2] == [number]
                    inside.remove(number)
            except files.BusyError:
                pass

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(enter, range(4)))
    assert entered
    assert not [file for file in tmp_path.rglob("*") if file.is_file()]


def test_a_folder_that_holds_something_stays(tmp_path: Path) -> None:
    with files.alone(tmp_path / "output", folder=True):
        (tmp_path / "output" / "result").touch()
    assert [path.name for path in (tmp_path / "output").iterdir()] == ["result"]


@pytest.mark.parametrize("without_locks", ["no locks", "no such module"], indirect=True)
@pytest.mark.usefixtures("without_locks")
def test_without_locks_nobody_is_kept_off(tmp_path: Path) -> None:
    with files.alone(tmp_path / "output"), files.alone(tmp_path / "output"):
        files.write_text(tmp_path / "output", "new")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": ["\\ud800"]}', r"it holds \\ud800, half a character"),
        ('{"\\uDC00a": 1}', r"it holds \\udc00, half"),
        ('{"a": ' + "1" * 5000 + "}", r"not JSON \(Exceeds the limit"),
        ("[" * 100_000, "not JSON"),
        ('{"a": 1', "not JSON"),
        ('"\0"', "not JSON"),
    ],
    ids=["half", "key", "digits", "deep", "torn", "nul"],
)
def test_what_json_may_not_hold(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        files.parse_json(text)


def test_halves_of_one_character_are_put_together() -> None:
    assert files.parse_json('"\\ud83d\\ude00 \\\\ud800"') == "\U0001f600 \\ud800"
    assert files.whole_characters("a\ud83d\ude00\ud800b") == "a\U0001f600\ufffdb"
