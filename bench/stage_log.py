"""What a stage of `bench.gpu` has printed and made, kept in a folder as it comes."""

from __future__ import annotations

import json
import shlex
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.stages import WORK
from bench.steps import Outcome

LARGEST = 15_000_000
"""Bytes of a file that is kept; of a longer log its end."""


class StageLog:
    """The log of a stage, and the folder that it and other files are copied to; a full one is told once."""

    def __init__(self, name: str, output: Path) -> None:
        WORK.mkdir(parents=True, exist_ok=True)
        self.path, self.output = WORK / f"{name}.log", output
        self.path.write_text("")
        self._begun = 0
        self._complained = False

    def begin(self, name: str, command: Sequence[str]) -> None:
        self._append(f"\n== {name}: {shlex.join(command)}\n")
        self._begun = self.path.stat().st_size

    def printed(self) -> str:
        """By the step that began last."""
        with self.path.open("rb") as log:
            log.seek(self._begun)
            return log.read().decode(errors="replace")

    def end(self, name: str, outcome: Outcome, more: str = "") -> None:
        """Says how a step ended, and shows the end of what it printed."""
        line = f"== {name}: {outcome.text()}{more}"
        print(*(text[:200] for text in self.printed().splitlines()[-12:]), line, sep="\n", flush=True)
        self._append(line + "\n")
        self._begun = self.path.stat().st_size

    def keep(self, path: Path | None = None, name: str = "") -> None:
        """Copies a file, unless told which the log, complete or not at all."""
        path, name = (self.path, "log.txt") if path is None else (path, name or path.name)
        if path.exists():
            with path.open("rb") as source:
                source.seek(max(0, path.stat().st_size - LARGEST))
                self._write(name, source.read())

    def keep_json(self, name: str, content: Any) -> None:
        self._write(name, (json.dumps(content, indent=1) + "\n").encode())

    def keep_folder(self, folder: Path, name: str) -> None:
        """As an archive."""
        if folder.is_dir():
            with tarfile.open(WORK / name, "w:gz") as archive:
                archive.add(folder, folder.name)
            self.keep(WORK / name)

    def _append(self, text: str) -> None:
        with self.path.open("a") as log:
            log.write(text)

    def _write(self, name: str, content: bytes) -> None:
        temporary = self.output / f".{name}.tmp"
        try:
            self.output.mkdir(parents=True, exist_ok=True)
            temporary.write_bytes(content)
            temporary.replace(self.output / name)
        except OSError as error:
            if not self._complained:
                print(f"cannot keep {name} in {self.output}: {error.strerror}; it stays in {WORK}", flush=True)
            self._complained = True
