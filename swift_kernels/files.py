"""Writing files so that an interruption leaves the old content intact."""

from __future__ import annotations

import glob
import json
import os
import re
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

PATIENCE = 1.0
"""Seconds that a writer waits for who removes leftovers."""

_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


class BusyError(ValueError):
    """A file or folder that another process is writing."""


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields a temporary path beside `path`; renames it over `path` on success, removes it on any exception.

    What killed processes left of the same file is removed first. A symbolic link is followed; what is no regular file
    (a device, a pipe) is refused, as renaming would destroy it.
    """
    target = check_replaceable(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(target)
    with _locked(target.parent):
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


def check_replaceable(path: str | os.PathLike[str], *sources: str | os.PathLike[str]) -> Path:
    """Raises where `replacing` would refuse a path or destroy a source, before the work is done; the path, resolved."""
    target = Path(path).resolve()
    for source in sources:
        if target == Path(source).resolve():
            raise ValueError(f"{path} is what is read: expected another file for what is written")
    if target.is_dir():
        raise ValueError(f"{path} is a folder: expected a file")
    if target.exists() and not target.is_file():
        raise ValueError(f"{path} is no regular file: expected a path that may be replaced")
    for folder in target.parents:
        if folder.exists():
            if not folder.is_dir():
                raise ValueError(f"{path} lies in {folder}, which is a file: expected a folder")
            break
    return target


def remove_leftovers(path: str | os.PathLike[str]) -> None:
    """Removes the temporary files of `path` that killed processes left behind, unless anything is written there."""
    target = Path(path).resolve()
    # mkstemp adds eight characters.
    remove_abandoned(target.parent, f".{glob.escape(target.name)}.????????.tmp")


def remove_abandoned(folder: Path, *patterns: str) -> None:
    """Removes files of such names from a folder, unless one is being written there; nothing without locks.

    The system unlocks the folder when a process ends, however it does.
    """
    with _locked(folder, alone=True) as locked:
        for file in [file for pattern in patterns for file in folder.glob(pattern)] if locked else []:
            with suppress(OSError):  # another user's, or no file
                file.unlink()


@contextmanager
def _locked(folder: Path, alone: bool = False) -> Iterator[bool]:
    """Locks a folder, with others who write there or alone at once; False where that cannot be.

    The folder and not the temporary file, as libraries may replace that by one of their own. Nobody waits for long: who
    runs this may have locked the folder, and waits for us. Who removes leftovers has it for a moment.
    """
    descriptor = None
    locked = False
    give_up = time.monotonic() + (0 if alone else PATIENCE)
    try:
        import fcntl  # Windows has none

        descriptor = os.open(folder, os.O_RDONLY)
        while not locked:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_NB | (fcntl.LOCK_EX if alone else fcntl.LOCK_SH))
                locked = True
            except BlockingIOError:
                if time.monotonic() > give_up:
                    break
                time.sleep(0.001)
    except (ImportError, OSError):
        pass
    try:
        yield locked
    finally:
        if descriptor is not None:
            os.close(descriptor)


@contextmanager
def alone(path: str | os.PathLike[str], *, folder: bool = False) -> Iterator[None]:
    """Keeps other processes off a file, or a folder, that is written bit by bit; raises where one has it.

    The lock is on a file of its own, as the output may be replaced: in the folder, which is made where there is none,
    or beside the file. The system unlocks it when a process ends, however it does. Where the system has no locks, or
    the place of the lock may not be written, nobody is kept off.

    Raises:
        BusyError: another process is writing it.
    """
    target = Path(path).resolve()
    home = target if folder else target.parent
    lock = home / (".swift-kernels.lock" if folder else f".{target.name}.swift-kernels.lock")
    made = not home.exists()
    descriptor = _lock_file(lock, path)
    try:
        yield
    finally:
        if descriptor is not None:
            # While it is locked: who opened it meanwhile sees that it is not the one in the folder, and tries again.
            with suppress(OSError):
                lock.unlink()
            os.close(descriptor)
            if made:
                with suppress(OSError):  # it holds something now
                    home.rmdir()


def _lock_file(lock: Path, path: str | os.PathLike[str]) -> int | None:
    try:
        import fcntl  # Windows has none
    except ImportError:
        return None
    while True:
        try:
            lock.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        except FileNotFoundError:  # the folder was removed by who had it
            continue
        except OSError:
            return None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(descriptor), os.stat(lock)):
                return descriptor
        except BlockingIOError:
            os.close(descriptor)
            raise BusyError(
                f"{path} is being written by another process: wait until that has ended, or give another --output or "
                "--store"
            ) from None
        except FileNotFoundError:  # it was removed after it was opened
            pass
        except OSError:  # no locks here
            with suppress(OSError):
                lock.unlink()
            os.close(descriptor)
            return None
        os.close(descriptor)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Replaces the content of `path` by `text`, or leaves it as it was."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_tensors(
    path: str | os.PathLike[str], tensors: Mapping[str, Tensor], header: dict[str, str] | None = None
) -> None:
    """Replaces `path` by a safetensors file of these tensors, or leaves it as it was.

    safetensors' own `save_file` writes to a temporary file of a name that nobody could clean up after a kill.
    """
    from safetensors.torch import save

    content = save({name: value.detach().cpu().contiguous() for name, value in tensors.items()}, header)
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def whole_lines(path: Path) -> tuple[list[bytes], int]:
    """The lines of a file that end, and where the last of them does: what follows was torn by a killed process."""
    data = path.read_bytes()
    end = data.rfind(b"\n") + 1
    return data[:end].split(b"\n")[:-1], end


def parse_json(text: str) -> Any:
    """What JSON text says, of whole characters.

    Raises:
        ValueError: what is wrong with it; the caller says where it stands.
    """
    try:
        value = json.loads(text)
        if _SURROGATE.search(text):  # halves of one character are put together by now
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(error.object[error.start]):04x}"
        raise ValueError(f"it holds {half}, half a character (a lone surrogate): expected whole characters") from None
    except (ValueError, RecursionError) as error:  # not only its own: Python refuses integers of 4,301 digits
        raise ValueError(f"not JSON ({' '.join(str(error).split())})") from None
    return value


def whole_characters(text: str) -> str:
    """The text with U+FFFD for every half of a character, which no file and no tokenizer takes."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _line(row: dict[str, Any]) -> bytes:
    return whole_characters(json.dumps(row, ensure_ascii=False, separators=(",", ":"))).encode() + b"\n"


def other_content(path: Path, header: dict[str, Any], command: str) -> str | None:
    """None where a file without a whole line is empty or begins as the header; otherwise why it is not written over."""
    data, line = path.read_bytes(), _line(header)
    torn = line.startswith(data)
    # A header of other settings is ours too, but not what follows one that has lost its end of line.
    if not torn and data.startswith(line[: line.index(b",")]):
        try:
            json.JSONDecoder().raw_decode(data.decode(errors="replace"))
        except (ValueError, RecursionError):
            torn = True
    if torn:
        return None
    return (
        f"{path} holds {len(data):,} bytes of something else: expected a file of `swift-kernels {command}`, which is "
        "continued, or none; it was left as it is, give another --output"
    )


class AppendedLines:
    """Appends JSON lines to a file, each whole or not at all; of what was there it keeps the first `end` bytes.

    What of a line are halves of characters, which a model's tokenizer may make, is written as U+FFFD.
    """

    def __init__(self, path: Path, end: int = 0) -> None:
        self._end = end
        path.parent.mkdir(parents=True, exist_ok=True)
        # Unbuffered, so that what a full disk refused is not tried again on close.
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        os.ftruncate(self._descriptor, end)

    def write(self, row: dict[str, Any]) -> None:
        line = _line(row)
        os.lseek(self._descriptor, self._end, os.SEEK_SET)
        try:
            written = 0
            while written < len(line):
                written += os.write(self._descriptor, line[written:])
        except BaseException:  # a full disk or Ctrl-C half-way through the line
            os.ftruncate(self._descriptor, self._end)
            raise
        self._end += len(line)

    def close(self) -> None:
        os.close(self._descriptor)


def other_settings(path: Path, there: dict[str, Any], here: dict[str, Any], kind: str = "file") -> str | None:
    """None, or how the settings that a file was made with differ from those of now; compared as JSON reads them."""
    different = _first_difference(there, json.loads(json.dumps(here)))
    if different is None:
        return None
    key, old, new = different
    return (
        f"{path} was made with other settings: {key} is {_short(old)} there and {_short(new)} here; use the same "
        f"settings to continue it, or another {kind}"
    )


def _first_difference(there: dict[str, Any], here: dict[str, Any]) -> tuple[str, Any, Any] | None:
    for key in dict.fromkeys([*here, *there]):
        old, new = there.get(key), here.get(key)
        if old == new:
            continue
        # What has a name is told apart by it, and by what was written of it: later versions may write more.
        if isinstance(old, dict) and isinstance(new, dict) and old.get("name") == new.get("name"):
            inner = _first_difference(old, {each: value for each, value in new.items() if each in old})
            if inner is None:
                continue
            return f"{key}.{inner[0]}", *inner[1:]
        return key, old, new
    return None


def _short(value: Any) -> str:
    if isinstance(value, dict) and "name" in value:
        return str(value["name"])
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."


def cache_folder() -> Path:
    """Where built kernels and converted models are kept: `$SWIFT_KERNELS_CACHE`, or a folder in the user's cache.

    It is made where there is none, so that only this user may write there, whatever the umask is.
    """
    named = os.environ.get("SWIFT_KERNELS_CACHE")
    folder = (
        Path(named) if named else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "swift_kernels"
    )
    with suppress(OSError):  # said by who writes there
        make_private(folder)
    return folder


def make_private(folder: Path) -> None:
    """Makes a folder, where there is none, in which nobody else may write."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    folder.mkdir(mode=0o755, exist_ok=True)
