"""Kernels that were compiled where no GPU is, packed to be used where one is."""

from __future__ import annotations

import json
import os
import tarfile
import zlib
from pathlib import Path
from typing import Any

ARCHIVE = Path(__file__).resolve().parents[1] / "build" / "gpu" / "kernels.tar.gz"
FACTS = "facts.json"
UNREADABLE = (OSError, tarfile.TarError, zlib.error, EOFError, LookupError, ValueError, TypeError, AttributeError)
"""What reading an archive raises that is cut short or something else."""
PACKED = (".cubin", ".json", ".so")
"""What a launch needs. The steps on the way to it stay where they are, and so does the stand-in for libcuda.so.1."""


def pack(folder: Path, archive: Path, facts: dict[str, Any]) -> None:
    """Packs a Triton cache with facts about it, complete or not at all."""
    (folder / FACTS).write_text(json.dumps(facts, indent=1) + "\n")
    archive.parent.mkdir(parents=True, exist_ok=True)
    temporary = archive.with_suffix(f".{os.getpid()}.tmp")
    with tarfile.open(temporary, "w:gz") as packed:
        for path in sorted(folder.rglob("*")):
            if path.suffix in PACKED:
                packed.add(path, path.relative_to(folder))
    temporary.replace(archive)


def unpack(archive: Path, folder: Path) -> dict[str, Any]:
    """Unpacks it into any folder, and returns the facts.

    Triton notes in each group of files where they lie, as absolute paths: those are changed to where they lie now, and
    what was not packed is not missed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tarfile.open(archive) as packed:
        packed.extractall(folder, filter="data")
    for group in folder.glob("*/__grp__*.json"):
        content = json.loads(group.read_text())
        paths = {name: group.parent / name for name in content["child_paths"]}
        content["child_paths"] = {name: str(path) for name, path in paths.items() if path.exists()}
        temporary = group.with_suffix(".tmp")
        temporary.write_text(json.dumps(content))
        temporary.replace(group)
    return facts_of(archive)


def facts_of(archive: Path) -> dict[str, Any]:
    with tarfile.open(archive) as packed:
        found = packed.extractfile(FACTS)
        assert found is not None
        return json.load(found)


def builds_in(folder: Path) -> int:
    """How many compiled kernels a cache holds."""
    return len(list(folder.glob("*/*.cubin")))
