"""What a stage of `bench.gpu` has printed and made, kept in a folder as it comes."""

from __future__ import annotations

import io
import json
import shlex
import tarfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bench.stages import WORK
from bench.steps import Outcome

LARGEST = 15_000_000
"""Bytes of a log that are kept, from its end."""


class StageLog:
    """The log of a stage, and the folder that it and other files are copied to.

    Where something cannot be written it says so once, and goes on.
    """

    def __init__(self, name: str, output: Path) -> None:
        self.path, self.output = WORK / f"{name}.log", output
        self._begun = 0
        self._complained = False
        with self._going_on():
            WORK.mkdir(parents=True, exist_ok=True)
            self.path.write_text("")

    def begin(self, name: str, command: Sequence[str]) -> None:
        self._append(f"\n== {name}: {shlex.join(command)}\n")

    def printed(self) -> str:
        """Since a step began."""
        try:
            with self.path.open("rb") as log:
                log.seek(self._begun)
                return log.read().decode(errors="replace")
        except OSError:
            return ""

    def end(self, name: str, outcome: Outcome, more: str = "") -> None:
        """Says how a step ended, and shows the end of what it printed."""
        line = f"== {name}: {outcome.text()}{more}"
        print(*(text[:200] for text in self.printed().splitlines()[-12:]), line, sep="\n", flush=True)
        self._append(line + "\n")

    def keep(self, path: Path | None = None, name: str = "") -> None:
        """Copies a file, unless told which the log, complete or not at all."""
        source = path or self.path
        with self._going_on():
            if source.exists():
                content = source.read_bytes()
                self._write(self.output / (name or source.name), content if path else content[-LARGEST:])

    def note(self, path: Path, content: Any) -> None:
        """Writes JSON, and keeps it as well."""
        with self._going_on():
            self._write(path, (json.dumps(content, indent=1) + "\n").encode())
        self.keep(path)

    def keep_folder(self, folder: Path, name: str) -> None:
        """Its JSON, in an archive: files that are replaced whole, some perhaps meanwhile."""
        with self._going_on():
            if folder.is_dir():
                with tarfile.open(WORK / name, "w:gz") as archive:
                    for each in sorted(folder.rglob("*.json")):
                        content = each.read_bytes()
                        member = tarfile.TarInfo(str(each.relative_to(folder)))
                        member.size = len(content)
                        archive.addfile(member, io.BytesIO(content))
                self.keep(WORK / name)

    def _append(self, text: str) -> None:
        with self._going_on():
            with self.path.open("a") as log:
                log.write(text)
            self._begun = self.path.stat().st_size

    def _write(self, path: Path, content: bytes) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.tmp")
        temporary.write_bytes(content)
        temporary.replace(path)

    @contextmanager
    def _going_on(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if not self._complained:
                print(f"cannot keep everything in {self.output} and {WORK}: {error}", flush=True)
            self._complained = True
