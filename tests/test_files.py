"""Files that are replaced whole: killed half-way, the next write of the same file leaves nothing else behind."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

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
    (tmp_path / ".another.txt.12345678.tmp").write_text("of a file of another name")
    before = set(tmp_path.iterdir())
    for _ in range(2):
        killed_while_it_writes(code, path)
        assert path.read_text() == "old"
        assert len(set(tmp_path.iterdir()) - before) == 1
    files.write_text(path, "new")
    assert path.read_text() == "new"
    assert set(tmp_path.iterdir()) == before


@pytest.mark.parametrize("write_again", [False, True], ids=["removed", "written again"])
def test_what_is_being_written_is_no_leftover(tmp_path: Path, write_again: bool) -> None:
    path = tmp_path / "file.txt"
    with files.replacing(path) as temporary:
        temporary.write_text("first")
        if write_again:
            files.write_text(path, "second")
        else:
            files.remove_leftovers(path)
    assert path.read_text() == "first", "the last to end wins"
    assert list(tmp_path.iterdir()) == [path]
