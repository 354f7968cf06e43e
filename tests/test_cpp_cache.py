"""What is loaded from the cache: nothing that another user could have put there, and nothing but what was built."""

from __future__ import annotations

import ctypes
import hashlib
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from swift_kernels import cpp
from tests.test_cpp import fake_compiler, finished, needs_first_use_build, score_once

pytestmark = [
    needs_first_use_build,
    pytest.mark.skipif(os.name == "nt", reason="Windows has no such owners and modes"),
]
needs_root = pytest.mark.skipif(
    os.name == "nt" or os.geteuid() != 0, reason="needs root: only root makes files of another user"
)

NOBODY = 65534
BUILT, PLANTED = b"what was built", b"what was planted"
# `compiler ... -o FILE`
BUILDS = f'while [ "$1" != -o ]; do shift; done; printf \'{BUILT.decode()}\' > "$2"'


class Cache:
    """A cache folder of which `load` loads as the package does, and `loaded` is what came into the process."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.loaded: list[bytes] = []

    @property
    def library(self) -> Path:
        return self.folder / cpp._build_key() / cpp.LIBRARY_NAME

    def load(self) -> bytes:
        self.loaded.clear()
        assert cpp._load_built() == self.library
        [content] = self.loaded
        return content

    def plant(self, *, recorded: bool = True) -> None:
        """A library with its checksum, as anybody can make them."""
        self.library.write_bytes(PLANTED)
        if recorded:
            cpp._checksum_file(self.library, hashlib.sha256(PLANTED).hexdigest()).touch()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cache]:
    made = Cache(tmp_path / "cache")
    monkeypatch.setenv("SWIFT_KERNELS_CACHE", str(made.folder))
    monkeypatch.setenv("CXX", fake_compiler(tmp_path, BUILDS))
    monkeypatch.setattr(ctypes, "CDLL", lambda path: made.loaded.append(Path(path).read_bytes()))
    mask = os.umask(0o022)
    yield made
    os.umask(mask)


@pytest.mark.parametrize("mask", [0o000, 0o002, 0o022, 0o077], ids=oct)
def test_what_is_built_is_loaded_again_whatever_the_umask(cache: Cache, mask: int) -> None:
    os.umask(mask)
    assert cache.load() == BUILT
    before = cache.library.stat().st_mtime_ns
    assert cache.load() == BUILT
    assert cache.library.stat().st_mtime_ns == before, "built again"
    for path in (cache.folder, cache.library.parent, *cache.library.parent.iterdir()):
        assert not path.stat().st_mode & 0o022, path


def swapped(path: Path, other: Path) -> None:
    path.rename(other)
    path.symlink_to(other)


def of_nobody(path: Path) -> None:
    os.chown(path, NOBODY, NOBODY)


DISTRUSTED: dict[str, Callable[[Cache], None]] = {
    "library writable by the group": lambda cache: cache.library.chmod(0o775),
    "library writable by all": lambda cache: cache.library.chmod(0o757),
    "folder writable by the group": lambda cache: cache.library.parent.chmod(0o775),
    "folder writable by all": lambda cache: cache.library.parent.chmod(0o1777),
    "cache writable by all": lambda cache: cache.folder.chmod(0o1777),
    "library a link": lambda cache: swapped(cache.library, cache.folder / "elsewhere.so"),
    "folder a link": lambda cache: swapped(cache.library.parent, cache.folder / "elsewhere"),
    "a folder for a library": lambda cache: (cache.library.unlink(), cache.library.mkdir())[1],
}
FOREIGN: dict[str, Callable[[Cache], None]] = {
    "library": lambda cache: of_nobody(cache.library),
    "folder": lambda cache: of_nobody(cache.library.parent),
    "cache": lambda cache: of_nobody(cache.folder),
}


def assert_not_loaded(cache: Cache) -> None:
    with pytest.raises(cpp.BuildError, match=r"SWIFT_KERNELS_CACHE to a folder of your own|no link .*; delete it") as e:
        cache.load()
    assert str(cache.folder) in str(e.value)
    assert not cache.loaded


@pytest.mark.parametrize("change", DISTRUSTED.values(), ids=DISTRUSTED)
def test_what_others_may_write_is_not_loaded(cache: Cache, change: Callable[[Cache], None]) -> None:
    cache.load()
    cache.plant()
    change(cache)
    assert_not_loaded(cache)


@needs_root
@pytest.mark.parametrize("change", FOREIGN.values(), ids=FOREIGN)
def test_what_is_of_another_user_is_not_loaded(cache: Cache, change: Callable[[Cache], None]) -> None:
    cache.load()
    cache.plant()
    change(cache)
    assert_not_loaded(cache)


def test_a_cache_that_is_a_link_to_a_folder_of_ours_is_used(cache: Cache) -> None:
    cache.folder.with_name("disk").mkdir(mode=0o755)
    cache.folder.symlink_to("disk")
    cache.folder = cache.folder.resolve()
    assert cache.load() == BUILT


@pytest.mark.parametrize(
    "content", [b"", BUILT[:5], BUILT[:5] + b"\0" * 9, PLANTED], ids=["empty", "cut", "holes", "other"]
)
def test_a_damaged_library_is_built_anew(cache: Cache, content: bytes) -> None:
    cache.load()
    cache.library.write_bytes(content)
    assert cache.load() == BUILT
    assert cache.library.read_bytes() == BUILT


def test_a_library_without_a_checksum_is_built_anew(cache: Cache) -> None:
    """As earlier versions left it."""
    cache.load()
    for path in cache.library.parent.iterdir():
        path.unlink()
    cache.plant(recorded=False)
    assert cache.load() == BUILT


def test_what_is_checked_is_what_is_loaded(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another library takes the name between the check and the load."""
    cache.load()
    trusted = cpp._check_trusted

    def check_then_swap(path: Path, *arguments: object) -> None:
        trusted(path, *arguments)  # type: ignore[arg-type]
        if path == cache.library:
            path.rename(path.with_name("moved"))
            cache.plant()

    monkeypatch.setattr(cpp, "_check_trusted", check_then_swap)
    if Path("/proc/self/fd").exists():
        assert cache.load() == BUILT
    else:
        pytest.skip("without /proc a file is loaded by its name")


@pytest.mark.parametrize("size", [0, 4096], ids=["empty", "truncated"])
def test_a_process_scores_although_its_cache_was_damaged(tmp_path: Path, size: int) -> None:
    copies = f'while [ "$1" != -o ]; do shift; done; cat "{cpp.load()}" > "$2"'
    environment = {"CXX": fake_compiler(tmp_path, copies), "SWIFT_KERNELS_CACHE": str(tmp_path / "cache")}
    assert finished(score_once(**environment)) == ["cpp 3.0 2"]
    [library] = (tmp_path / "cache").rglob("*.so")
    os.truncate(library, size)
    assert finished(score_once(**environment)) == ["cpp 3.0 2"]
    assert library.read_bytes() == cpp.load().read_bytes()


@needs_root
def test_planted_code_does_not_run(tmp_path: Path) -> None:
    """A user fills a cache folder that anybody may write to before its owner comes."""
    source, planted, ran = tmp_path / "planted.cpp", tmp_path / "planted.so", tmp_path / "ran"
    source.write_text(f'#include <fstream>\nstatic int ran = (std::ofstream("{ran}") << 1, 0);\n')
    subprocess.run([*cpp.find_compiler(), "-shared", "-fPIC", source, "-o", planted], check=True)
    ctypes.CDLL(str(planted))
    assert ran.exists(), "the planted library does what it should"
    ran.unlink()
    for folder in (tmp_path, *tmp_path.parents):  # the other user has to come there
        if folder.stat().st_uid == os.geteuid() and not folder.stat().st_mode & 0o001:
            folder.chmod(folder.stat().st_mode | 0o011)
    cache = tmp_path / "cache"
    cache.mkdir()
    cache.chmod(0o777)
    library = cache / cpp._build_key() / cpp.LIBRARY_NAME
    digest = hashlib.sha256(planted.read_bytes()).hexdigest()
    script = 'mkdir -m 755 "$1" && cat > "$1/$2" && touch "$1/$2.$3"'
    plant = ["sh", "-c", script, "sh", str(library.parent), library.name, digest]
    subprocess.run(plant, input=planted.read_bytes(), check=True, user=NOBODY, group=NOBODY, extra_groups=[])
    for mode in (0o777, 0o755):
        cache.chmod(mode)
        warning, result = finished(score_once(SWIFT_KERNELS_CACHE=str(cache)))
        assert warning.startswith("RuntimeWarning swift_kernels scores on cpu with its plain PyTorch reference")
        assert "is not trusted" in warning
        assert result == "reference 3.0 2"
        assert not ran.exists()
