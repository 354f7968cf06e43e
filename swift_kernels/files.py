"""Writing files so that an interruption leaves the old content intact."""

from __future__ import annotations

import glob
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields a temporary path beside `path`; renames it over `path` on success, removes it on any exception.

    A symbolic link is followed; what is no regular file (a device, a pipe) is refused, as renaming would destroy it.
    """
    target = Path(path).resolve()
    if target.exists() and not target.is_file():
        raise ValueError(f"{path} is no regular file: expected a path that may be replaced")
    target.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent)
    os.close(descriptor)
    temporary = Path(name)
    try:
        yield temporary
        with open(temporary, "rb") as written:
            os.fsync(written.fileno())
        # mkstemp makes private files; the result gets the permissions any new file would.
        mask = os.umask(0)
        os.umask(mask)
        temporary.chmod(0o666 & ~mask)
        temporary.replace(target)
    except BaseException:
        with suppress(FileNotFoundError):
            temporary.unlink()
        raise


def leftovers(path: str | os.PathLike[str]) -> list[Path]:
    """The temporary files of `path` that killed processes left behind, and those that are being written."""
    target = Path(path).resolve()
    return list(target.parent.glob(f".{glob.escape(target.name)}.*.tmp"))


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Replaces the content of `path` by `text`, or leaves it as it was."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def cache_folder() -> Path:
    """Where built kernels and converted models are kept: `$SWIFT_KERNELS_CACHE`, or a folder in the user's cache."""
    if folder := os.environ.get("SWIFT_KERNELS_CACHE"):
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "swift_kernels"
