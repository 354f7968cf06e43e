"""Tasks whose problems are rows: of a data set on the Hub, or of a local file in the same format."""

from __future__ import annotations

import random
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from swift_kernels.evaluation.tasks.base import Problem, TaskError, check_request, of_split, take
from swift_kernels.evaluation.tasks.rows import Row, read_jsonl
from swift_kernels.evaluation.worker import Worker
from swift_kernels.hub import HubError, first_line


@dataclass(frozen=True)
class Source:
    """A split on the Hub, as `datasets.load_dataset(id, config, split=split)` takes it."""

    id: str
    split: str
    config: str | None = None

    def __str__(self) -> str:
        return f"{self.id} ({self.split if self.config is None else f'{self.config}, {self.split}'})"


class RowsTask(ABC):
    """A task of questions for a chat, one a row.

    From the Hub, train and test are what the data set calls so, and a training problem whose key is that of a test
    problem is left out. Where it has but one split, `split_of` the key decides, as it does within a local file, of
    which "all" is every row. Rows of the Hub that a task cannot use are left out with a warning; in a local file,
    which its owner can mend, they are errors.

    Attributes:
        kind: the name without a file.
        hub: the data set's id on the Hub.
        train, test: the splits there; without `test`, both sides are parts of `train`.
    """

    kind: str
    hub: str
    train: tuple[Source, ...]
    test: tuple[Source, ...] = ()
    stop: tuple[str, ...] = ()
    chat = True
    max_new_tokens = 1024

    def __init__(self, path: str | None = None) -> None:
        self.name = self.kind if path is None else f"{self.kind}:{path}"
        self._path = None if path is None else Path(path)
        if self._path is not None and not self._path.is_file():
            what = "is no file" if self._path.exists() else "does not exist"
            raise TaskError(f"{path} {what}: expected a JSONL file of problems and answers")

    @property
    def timeouts(self) -> int:
        """How many times the task's grader, where it has one, took too long."""
        return sum(part.timeouts for part in vars(self).values() if isinstance(part, Worker))

    @abstractmethod
    def read(self, row: Row, identity: str) -> Problem:
        """The problem of a row; raises ValueError, without the row's place, where it is not as expected."""

    @abstractmethod
    def prompt(self, question: str) -> str: ...

    @abstractmethod
    def extract(self, text: str, problem: Problem | None = None) -> str | None: ...

    @abstractmethod
    def grade(self, text: str, problem: Problem) -> bool: ...

    def identity(self, row: Row, line: str) -> str:
        """The id of a problem of a local file."""
        return line

    def problems(self, split: str, count: int | None, seed: int = 0) -> list[Problem]:
        check_request(split, count)
        has_own_splits = self._path is None and bool(self.test)
        if has_own_splits:
            made = self._of_own_split(split)
        else:
            made = list(self._from_hub(self.train) if self._path is None else self._from_file(self._path))
        if not made and self._path is not None:
            raise TaskError(f"{self._path} is empty: expected a problem with its answer a line")
        random.Random(seed).shuffle(made)
        return take(made if has_own_splits else of_split(made, split), split, count, self.name)

    def _of_own_split(self, split: str) -> list[Problem]:
        test = self._from_hub(self.test)
        if split == "test":
            return test
        tested = {problem.key for problem in test}
        train = [problem for problem in self._from_hub(self.train) if problem.key not in tested]
        return train if split == "train" else train + test

    def _from_hub(self, sources: Sequence[Source]) -> list[Problem]:
        made = []
        unusable = []
        for source in sources:
            for index, row in enumerate(self._load(source)):
                place = f"row {index} of {source}"
                try:
                    parts = [part for part in (source.split, source.config, str(index)) if part is not None]
                    made.append(replace(self.read(row, "/".join(parts)), place=place))
                except ValueError as error:
                    unusable.append(f"{place}: {error}")
        if unusable and not made:
            raise TaskError(f"{self.name}: no row of the Hub is as expected, such as {unusable[0]}")
        if unusable:
            total = len(made) + len(unusable)
            warnings.warn(
                f"{self.name}: {len(unusable)} of {total} rows are left out, such as {unusable[0]}", stacklevel=2
            )
        return made

    def _load(self, source: Source) -> Any:
        instead = f"a local file in its format works too: {self.kind}:FILE (JSONL)"
        try:
            import datasets
        except ImportError as error:
            raise ImportError(
                f"{source} on the Hub is read by datasets: pip install 'swift_kernels[tasks]'; {instead}"
            ) from error
        try:
            return datasets.load_dataset(source.id, source.config, split=source.split)
        except Exception as error:  # each version of the library has its own for a network that is down
            raise HubError(
                f"{source} cannot be loaded from the Hub: {type(error).__name__}: {first_line(error)}; {instead}"
            ) from error

    def _from_file(self, path: Path) -> Iterator[Problem]:
        seen: dict[str, str] = {}
        for place, row in read_jsonl(path):
            identity = self.identity(row, place.rpartition(":")[2])
            if identity in seen:
                raise TaskError(
                    f"{place}: id {identity!r} is that of {seen[identity]}: expected a different one a line"
                )
            seen[identity] = place
            try:
                yield replace(self.read(row, identity), place=place)
            except ValueError as error:
                raise TaskError(f"{place}: {error}") from None
