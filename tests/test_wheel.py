"""Wheels built from the tree, installed into a folder of their own, with and without what they could use."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

SCORE = """
import sys, warnings
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in {absent}:
            raise ModuleNotFoundError('No module named ' + repr(name), name=name)
sys.meta_path.insert(0, Absent())
import torch
import swift_kernels
from swift_kernels.schema import implementation
assert swift_kernels.__file__.startswith({site!r}), swift_kernels.__file__
torch.manual_seed(0)
head = swift_kernels.SwiftHead([64] * 3)
state = head.init_state(2)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter('always')
    for _ in range(5):
        head.step([torch.randn(2, 64) for _ in range(3)], state, torch.arange(2))
print(implementation('cpu'))
print([round(score, 5) for score in head.scores(state).tolist()])
print(len(caught))
print(*[str(warning.message) for warning in caught])
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A copy of the tree, so that building leaves nothing behind in it."""
    copy = tmp_path_factory.mktemp("source") / "tree"
    keep = ("swift_kernels", "csrc", "setup.py", "pyproject.toml", "README.md", "LICENSE")
    copy.mkdir()
    for name in keep:
        path = ROOT / name
        if path.is_dir():
            shutil.copytree(path, copy / name, ignore=shutil.ignore_patterns("__pycache__", "*.so", "*.egg-info"))
        else:
            shutil.copy2(path, copy / name)
    return copy


def install(source: Path, folder: Path, path: str | None = None) -> zipfile.ZipFile:
    """Builds a wheel with the packages of this environment, and unpacks it into `folder`."""
    environment = {**os.environ, **({} if path is None else {"PATH": path})}
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", folder, source],
        check=True,
        capture_output=True,
        env=environment,
    )
    (wheel,) = folder.glob("*.whl")
    archive = zipfile.ZipFile(wheel)
    archive.extractall(folder / "site")
    return archive


def score(folder: Path, absent: tuple[str, ...] = (), path: str | None = None) -> list[str]:
    """Implementation, scores, number of warnings and their text, in a process that sees only the unpacked wheel."""
    site = folder / "site"
    environment = {
        **os.environ,
        "PYTHONPATH": str(site),
        "SWIFT_KERNELS_CACHE": str(folder / "cache"),
        **({} if path is None else {"PATH": path}),
    }
    result = subprocess.run(
        [sys.executable, "-c", SCORE.format(absent=set(absent) or "()", site=str(site))],
        capture_output=True,
        text=True,
        cwd=folder,
        env=environment,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()


NO_COMPILER = "/nonexistent"


@pytest.fixture(scope="module")
def pure(source, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pure")
    names = install(source, folder, path=NO_COMPILER).namelist()
    assert not any(name.endswith(".so") for name in names)
    return folder


@pytest.fixture(scope="module")
def binary(source, tmp_path_factory) -> Path:
    if not (shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")):
        pytest.skip("there is no C++ compiler")
    folder = tmp_path_factory.mktemp("binary")
    names = install(source, folder).namelist()
    assert "swift_kernels/libswift_kernels.so" in names
    return folder


def test_the_wheel_carries_sources_and_heads_and_nothing_else(pure):
    (wheel,) = pure.glob("*.whl")
    assert wheel.name.endswith("py3-none-any.whl") or "-py3-none-" in wheel.name
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"swift_kernels"}
    for name in ("csrc/score_step.cpp", "heads/smollm2-135m-sums/model.safetensors", "py.typed"):
        assert f"swift_kernels/{name}" in names


def test_the_wheel_has_every_package_and_its_command_starts(pure, source):
    names = zipfile.ZipFile(next(pure.glob("*.whl"))).namelist()
    packages = {path.parent.relative_to(source) for path in (source / "swift_kernels").rglob("__init__.py")}
    assert {f"{package}/__init__.py" for package in packages} <= set(names)
    environment = {**os.environ, "PYTHONPATH": str(pure / "site")}
    command = [sys.executable, "-m", "swift_kernels", "--help"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=pure, env=environment, check=False)
    assert result.returncode == 0, result.stderr
    assert "rollout" in result.stdout


def test_without_compiler_and_triton_the_reference_scores_with_one_warning(pure):
    kind, _, warnings, text = score(pure, absent=("triton", "transformers"), path=NO_COMPILER)
    assert kind == "reference"
    assert warnings == "1"
    assert "no C++ compiler; install g++" in text


def test_with_a_compiler_the_same_wheel_builds_on_first_use(pure, binary):
    reference = score(pure, absent=("triton",), path=NO_COMPILER)[1]
    kind, scores, warnings, *_ = score(pure)
    assert (kind, warnings) == ("cpp", "0")
    assert scores == reference


def test_a_wheel_with_binaries_needs_no_compiler(binary):
    kind, _, warnings, *_ = score(binary, absent=("triton", "transformers"), path=NO_COMPILER)
    assert (kind, warnings) == ("cpp", "0")
