"""Counts instructions with `valgrind --tool=callgrind`, all cases in one process.

Instructions do not depend on what else the machine does, so a count can be held against one of another day. They are
not time: a wait for memory, which is most of a step on many rows, costs none. Valgrind knows no AVX-512, so of the C++
kernels the AVX2 ones run here (`csrc/isa.cpp` asks the processor).

Valgrind counts between two markers alone, which leaves the imports cheap. Everything is built before, by the same cases
run without it.
"""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path

import torch

from swift_kernels import cpp
from tests.instructions.cases import CASES

ROOT = Path(__file__).parents[2]
ENVIRONMENT = (
    *("PATH", "LD_LIBRARY_PATH", "HOME", "TMPDIR", "XDG_CACHE_HOME", "CC", "CXX"),
    *("SWIFT_KERNELS_CACHE", "TRITON_CACHE_DIR", "TRITON_HOME"),
)

Counts = dict[str, int]
"""Instructions of one call, by case."""


def measure(names: Sequence[str] = tuple(CASES), csrc: Path | None = None, cache: Path | None = None) -> Counts:
    """Counts the cases.

    Args:
        names: which of `CASES`.
        csrc: sources of the C++ kernels, instead of this tree's.
        cache: where these are built, instead of the user's cache.
    """
    with tempfile.TemporaryDirectory() as scratch:
        markers = str(_build_markers(Path(scratch)))
        options = {"markers": markers, "cases": names, "csrc": csrc and str(csrc)}
        environment = _environment(cache)
        key = _run([], options, environment).strip()
        valgrind = ["valgrind", "--tool=callgrind", "--instr-atstart=no", f"--callgrind-out-file={scratch}/counts"]
        _run(valgrind, {**options, "triton_key": key}, environment)
        totals = dict(map(_total_of, Path(scratch).glob("counts.*")))
    return {name: round(totals[name] / CASES[name].calls) for name in names}


def versions() -> dict[str, str]:
    """Of all that a count depends on, other than this repository."""
    capability = torch.backends.cpu.get_cpu_capability()
    return {
        "valgrind": _first_line("valgrind", "--version").removeprefix("valgrind-"),
        "processor": f"{platform.machine()}, {'AVX2' if capability == 'AVX512' else capability}",
        "libc": " ".join(platform.libc_ver()),
        "python": " ".join(sys.version.split()),
        "torch": torch.__version__,
        "triton": metadata.version("triton") if importlib.util.find_spec("triton") else "none",
        "compiler": _first_line(*cpp.find_compiler(), "--version"),
    }


def _first_line(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.partition("\n")[0]


def _build_markers(folder: Path) -> Path:
    library = folder / "markers.so"
    source = str(Path(__file__).with_name("markers.cpp"))
    subprocess.run([*cpp.find_compiler(), "-O2", "-shared", "-fPIC", source, "-o", str(library)], check=True)
    return library


def _environment(cache: Path | None) -> Mapping[str, str]:
    """What finds compilers and caches, and nothing else: more of it moves the stack, and some has other code run."""
    kept = {name: os.environ[name] for name in ENVIRONMENT if name in os.environ}
    if cache:
        kept["SWIFT_KERNELS_CACHE"] = str(cache)
    return {**kept, "PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def _run(prefix: Sequence[str], options: Mapping[str, object], environment: Mapping[str, str]) -> str:
    command = [*prefix, sys.executable, "-m", "tests.instructions.process", json.dumps(options)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} fails:\n{done.stdout}{done.stderr}")
    return done.stdout


def _total_of(dump: Path) -> tuple[str, int]:
    """The case of a callgrind dump, and its instructions."""
    text = dump.read_text()
    [name] = re.findall(r"^desc: Trigger: Client Request: (.*)$", text, re.MULTILINE)
    [total] = re.findall(r"^totals: (\d+)$", text, re.MULTILINE)
    return name, int(total)
