"""Builds the C++ kernels for ThreadSanitizer and runs steps under it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from swift_kernels import cpp

FOUND_A_RACE = 66
FOLDER = Path(__file__).parent


def missing() -> str | None:
    """Why ThreadSanitizer cannot run here, or None."""
    if sys.platform != "linux" or shutil.which("setarch") is None:
        return "ThreadSanitizer is preloaded into Python at addresses that setarch (Linux) fixes"
    try:
        library = sanitizer()
    except cpp.BuildError as error:
        return str(error)
    return None if library.is_file() else "the C++ compiler comes without libtsan"


def sanitizer() -> Path:
    command = [*cpp.find_compiler(), "-print-file-name=libtsan.so"]
    return Path(subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip())


def build(folder: Path, csrc: Path | None = None) -> Path:
    """The kernels, of the sources in `csrc` where it is given, and the thread that rewrites their slots.

    Objects that are in the folder already are taken as they are.
    """
    sources = cpp._sources() if csrc is None else sorted(csrc.iterdir())
    torch_root = Path(torch.__file__).parent
    flags = (*cpp.COMPILE_FLAGS, "-O1", "-g", "-fsanitize=thread", f"-I{torch_root / 'include'}")
    objects = []
    # One after the other: a test has a core.
    for source in [*(path for path in sources if path.suffix == ".cpp"), FOLDER / "writer.cpp"]:
        objects.append(folder / f"{source.stem}.o")
        if not objects[-1].exists():
            cpp._run_all([[*cpp.find_compiler(), *flags, "-c", str(source), "-o", str(objects[-1])]])
    library = folder / "instrumented.so"
    link = ["-shared", "-fsanitize=thread", *map(str, objects), f"-L{torch_root / 'lib'}", "-ltorch_cpu"]
    cpp._run_all([[*cpp.find_compiler(), *link, "-o", str(library)]])
    return library


def run(library: Path, **limit: float) -> tuple[int, dict[str, Any] | None, str]:
    """Runs for so many `steps` or `seconds`: the exit code, what the process printed, and what the sanitizer said."""
    options = [f"--{name}={value}" for name, value in limit.items()]
    done = subprocess.run(
        ["setarch", "-R", sys.executable, str(FOLDER / "process.py"), str(library), *options],
        env={
            **os.environ,
            "LD_PRELOAD": str(sanitizer()),
            "TSAN_OPTIONS": f"halt_on_error=1 exitcode={FOUND_A_RACE}",
            "PYTHONPATH": str(FOLDER.parents[1]),
        },
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, json.loads(done.stdout) if done.returncode == 0 else None, done.stderr
