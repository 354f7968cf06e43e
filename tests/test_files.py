"""Files that are replaced whole: killed half-way, the next write of the same file leaves nothing else behind."""

from __future__ import annotations

import errno
import signal
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

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


@pytest.mark.parametrize("what", ["no locks", "no such module"])
def test_without_locks_files_are_written_and_leftovers_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    leftover = tmp_path / ".file.txt.12345678.tmp"
    leftover.touch()
    if what == "no such module":
        monkeypatch.setitem(sys.modules, "fcntl", None)
    else:
        monkeypatch.setattr("fcntl.flock", Mock(side_effect=OSError(errno.ENOLCK, "No locks available")))
    files.write_text(tmp_path / "file.txt", "new")
    assert (tmp_path / "file.txt").read_text() == "new"
    assert leftover.exists()
    monkeypatch.undo()
    files.write_text(tmp_path / "file.txt", "newer")
    assert not leftover.exists()
