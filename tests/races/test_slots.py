from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from swift_kernels import cpp
from tests.races import run

STEPS = 4000
ONCE = "const int64_t slot = __atomic_load_n(slot_of + row, __ATOMIC_RELAXED);"
PLAINLY = "const int64_t slot = slot_of[row];"


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if reason := run.missing():
        pytest.skip(reason)
    return run.build(tmp_path_factory.mktemp("instrumented"))


def test_slots_that_another_thread_rewrites_are_read_once_and_written_through_as_checked(built: Path) -> None:
    code, found, said = run.run(built, steps=STEPS)
    assert code == 0, said
    assert found is not None
    assert found["kernels"] == "cpp"
    assert found["finite"]
    assert found["steps"] > 0
    assert found["refused"] > 0


def test_a_plain_read_of_them_would_be_found(built: Path, tmp_path: Path) -> None:
    csrc, objects = tmp_path / "csrc", tmp_path / "objects"
    csrc.mkdir()
    for source in cpp._sources():
        shutil.copy(source, csrc)
    checks = csrc / "checks.cpp"
    assert ONCE in checks.read_text()
    checks.write_text(checks.read_text().replace(ONCE, PLAINLY))
    shutil.copytree(built.parent, objects)
    (objects / "checks.o").unlink()
    code, _, said = run.run(run.build(objects, csrc), steps=STEPS)
    assert code == run.FOUND_A_RACE
    assert "data race" in said
    assert "check_slots" in said
