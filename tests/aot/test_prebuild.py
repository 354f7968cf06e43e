"""Kernels compiled here are found in another folder, by another process: it compiles none and calls no C compiler."""

from __future__ import annotations

import shutil

import pytest

pytest.importorskip("triton")

import torch
import triton.knobs

from bench import kernel_cache
from tests.aot import prebuild

if triton.knobs.runtime.interpret or torch.cuda.is_available() or not shutil.which("cc"):
    pytest.skip("needs Triton's compiler, a C compiler, and no GPU", allow_module_level=True)

PART = "tests/integrations/test_gpu.py"
"""The quickest."""


@pytest.mark.slow
def test_a_second_process_in_another_folder_compiles_nothing(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(prebuild, "PARTS", {PART: prebuild.PARTS[PART]})
    monkeypatch.setattr("sys.argv", ["prebuild", "--output", str(tmp_path / "kernels.tar.gz")])
    with pytest.raises(SystemExit) as end:
        prebuild.main()
    output = capsys.readouterr().out
    assert end.value.code == 0, output
    facts = kernel_cache.facts_of(tmp_path / "kernels.tar.gz")
    made = facts["parts"][PART]["compiled"]
    assert made > 0
    assert f"{made} builds in" in output
    assert f"in another folder: {made} hits, 0 compiled, " in output
    folder = tmp_path / "unpacked"
    kernel_cache.unpack(tmp_path / "kernels.tar.gz", folder)
    assert kernel_cache.builds_in(folder) == made
    # A kernel that is lost is compiled again, and counted.
    shutil.rmtree(next(folder.glob("*/*.cubin")).parent)
    again = prebuild.run_parts(prebuild.ROOT, folder)[PART]
    assert (again["hits"], again["compiled"]) == (made - 1, 1)


def test_an_archive_takes_nothing_but_kernels_and_facts(tmp_path):
    folder = tmp_path / "cache"
    (folder / "KEY").mkdir(parents=True)
    for name in ("a.cubin", "a.json", "launcher.so", "libcuda.so.1", "a.ptx", "lock"):
        (folder / "KEY" / name).write_text("{}")
    kernel_cache.pack(folder, tmp_path / "a.tar.gz", {"triton": "3.6.0"})
    assert kernel_cache.unpack(tmp_path / "a.tar.gz", tmp_path / "there") == {"triton": "3.6.0"}
    assert sorted(path.name for path in (tmp_path / "there" / "KEY").iterdir()) == ["a.cubin", "a.json", "launcher.so"]
    assert not list(tmp_path.glob("*.tmp"))
