"""Loads the C++ kernels of `csrc/`: the library shipped in the wheel, or one built on first use.

The sources are compiled by a plain call of the C++ compiler. They see nothing of Python and little of torch, so
neither ninja nor Python's headers are needed, and no lock is left behind by a build that was killed.

What is loaded runs with all rights of this process. So a library of the cache is loaded only where nobody but this user
and root could have put it there, and only as it was built: its checksum is the name of a file beside it.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shlex
import shutil
import stat
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from swift_kernels.files import cache_folder, make_private

LIBRARY_NAME = "libswift_kernels.so"

# -ffp-contract=off: a compiler free to fuse a multiply and an add may do so in one copy of the code and not in another,
# and a row's score would depend on which copy its position selects.
COMPILE_FLAGS = ("-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off")

_PACKAGE = Path(__file__).resolve().parent
_logger = logging.getLogger(__name__)
_lock = threading.Lock()
_loaded: Path | None = None


class BuildError(RuntimeError):
    """The C++ kernels cannot be built or loaded here; the message says why, and what to do."""


def load() -> Path:
    """Registers the C++ kernels with the dispatcher, building them first if need be; returns the library's path."""
    global _loaded
    with _lock:
        if _loaded is None:
            _loaded = _load_shipped() or _load_built()
        return _loaded


def find_compiler() -> list[str]:
    """The command of the C++ compiler: `$CXX`, or the first of the usual names on the PATH."""
    for command in (shlex.split(os.environ.get("CXX", "")), ["c++"], ["g++"], ["clang++"]):
        if command and shutil.which(command[0]):
            return command
    raise BuildError("there is no C++ compiler; install g++ or clang++ (or name one in CXX), or a wheel with binaries")


def compile_library(output: Path, *, record: bool = False) -> None:
    """Compiles `csrc/` into the shared library `output`, which appears complete or not at all.

    With `record` its checksum is kept beside it.
    """
    compiler = find_compiler()
    torch_root = Path(torch.__file__).parent
    sources = [source for source in _sources() if source.suffix == ".cpp"]
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=output.parent, prefix="build-") as scratch:
            objects = [Path(scratch, source.stem + ".o") for source in sources]
            include = f"-I{torch_root / 'include'}"
            _run_all(
                [*compiler, *COMPILE_FLAGS, include, "-c", str(source), "-o", str(object_file)]
                for source, object_file in zip(sources, objects, strict=True)
            )
            library = Path(scratch, LIBRARY_NAME)
            link = ["-shared", *map(str, objects), f"-L{torch_root / 'lib'}", "-ltorch_cpu", "-o", str(library)]
            _run_all([[*compiler, *link]])
            library.chmod(library.stat().st_mode & ~0o022)  # whatever the umask is
            if record:
                # First, so that a library never lies there without: of two builds at once either checksum is right.
                _checksum_file(output, _sha256(library.read_bytes())).touch(mode=0o644)
            # Processes that build at the same time replace one whole library by another.
            os.replace(library, output)
    except OSError as error:
        raise BuildError(f"cannot build in {output.parent} ({error}); set SWIFT_KERNELS_CACHE to a folder") from error


def shipped_library() -> Path:
    """Where a wheel with binaries has its library."""
    return _PACKAGE / LIBRARY_NAME


def _load_shipped() -> Path | None:
    library = shipped_library()
    if not library.exists():
        return None
    try:
        torch.ops.load_library(str(library))
    except OSError as error:
        _logger.info("%s does not load (%s): building from source", library, error)
        return None
    return library


def _load_built() -> Path:
    library = cache_folder().resolve() / _build_key() / LIBRARY_NAME
    try:
        make_private(library.parent)
    except OSError as error:
        raise BuildError(f"{library.parent} cannot be made ({error}); set SWIFT_KERNELS_CACHE to a folder") from error
    for folder in (library.parent.parent, library.parent):
        _check_trusted(folder, os.lstat(folder), stat.S_ISDIR)
    if not _load_as_built(library):
        _logger.info("building the C++ kernels into %s; this happens once", library)
        compile_library(library, record=True)
        if not _load_as_built(library):
            raise BuildError(f"{library} is not as it was built; set SWIFT_KERNELS_CACHE to another folder")
    return library


def _load_as_built(library: Path) -> bool:
    """Loads the library, and no other that may lie there later; False where there is none or it is damaged.

    A library that is shorter than it says ends a process that reads what it lacks.
    """
    try:
        flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
        descriptor = os.open(library, flags)
    except FileNotFoundError:
        return False
    except OSError as error:
        raise BuildError(f"{library} is not loaded: expected a file, no link ({error.strerror}); delete it") from None
    try:
        _check_trusted(library, os.fstat(descriptor), stat.S_ISREG)
        with open(descriptor, "rb", closefd=False) as file:
            if not _checksum_file(library, _sha256(file.read())).exists():
                return False
        opened = Path(f"/proc/self/fd/{descriptor}")
        # Not by torch.ops.load_library, which looks for the name again.
        ctypes.CDLL(str(opened if opened.exists() else library))
    except OSError as error:
        raise BuildError(f"{library} does not load ({error}); delete it to build it again") from error
    finally:
        os.close(descriptor)
    return True


def _check_trusted(path: Path, found: os.stat_result, kind: Callable[[int], bool]) -> None:
    """Raises where others than this user and root own a file or folder, or may write to it, or it is another kind."""
    if os.name == "nt":  # which has no such owners and modes
        return
    user, mode = os.geteuid(), stat.filemode(found.st_mode)
    if kind(found.st_mode) and found.st_uid in (user, 0) and not found.st_mode & 0o022:
        return
    raise BuildError(
        f"{path} is not trusted: it is {mode} of user {found.st_uid}, and what is loaded from the cache must belong to "
        f"user {user} or root, be no link, and be writable for nobody else; delete it, `chmod go-w` it, or set "
        "SWIFT_KERNELS_CACHE to a folder of your own"
    )


def _checksum_file(library: Path, sha256: str) -> Path:
    return library.with_name(f"{library.name}.{sha256}")


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _build_key() -> str:
    key = hashlib.sha256(repr((torch.__version__, platform.machine(), COMPILE_FLAGS)).encode())
    for source in _sources():
        key.update(source.read_bytes())
    return key.hexdigest()[:16]


def _sources() -> list[Path]:
    # Inside an installed package, beside it in a source tree.
    for folder in (_PACKAGE / "csrc", _PACKAGE.parent / "csrc"):
        if sources := sorted(path for path in folder.glob("*") if path.suffix in (".cpp", ".h")):
            return sources
    raise BuildError(f"the C++ sources are missing from {_PACKAGE / 'csrc'}; install the package again")


def _run_all(commands: Iterable[list[str]]) -> None:
    processes = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
        for command in commands
    ]
    outputs = [process.communicate()[0] for process in processes]
    for process, output in zip(processes, outputs, strict=True):
        if process.returncode != 0:
            lines = output.strip().splitlines() or [f"exit status {process.returncode}"]
            raise BuildError(f"the C++ compiler fails: {next((line for line in lines if 'error' in line), lines[-1])}")
