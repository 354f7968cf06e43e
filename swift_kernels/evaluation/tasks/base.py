"""What every task is: its problems, how they are split, and what rollouts, training and evaluation ask of it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

SPLITS = ("train", "test", "all")
TEST_FRACTION = 0.25


class TaskError(ValueError):
    """A task that does not exist or cannot give what is asked of it; the message says what would do."""


@dataclass(frozen=True)
class Problem:
    """One problem of a task.

    Attributes:
        id: unique within the task.
        key: what must not stand on both sides of a split: equal for problems that give each other away.
        question: the problem alone; `Task.prompt` makes of it what the model reads.
        answer: the reference answer.
        data: whatever else the task's grader needs.
        place: where it was read, such as `file:line`, for messages; empty where it was made.
    """

    id: str
    key: str
    question: str
    answer: str
    data: Any = field(default=None, compare=False, repr=False)
    place: str = field(default="", compare=False, repr=False)


class Task(Protocol):
    """What rollouts, training and evaluation need of a task.

    A grader keeps its own time limit: `grade` and `extract` may raise, but should not run for ever. A task may count in
    an attribute `timeouts` what it gave up for that.

    Attributes:
        name: as `get_task` takes it.
        stop: strings that end an answer, besides the model's end-of-sequence token.
        chat: whether the prompt is a user's message for the model's chat template, where it has one.
        max_new_tokens: how long an answer may usefully be.
    """

    name: str
    stop: tuple[str, ...]
    chat: bool
    max_new_tokens: int

    def problems(self, split: str, count: int | None, seed: int = 0) -> list[Problem]:
        """`count` problems of distinct keys (None: all there are); "train" and "test" never share a key."""

    def prompt(self, question: str) -> str:
        """What the model reads."""

    def extract(self, text: str, problem: Problem | None = None) -> str | None:
        """The final answer within a response, in the form that majority voting compares, or None.

        Where `problem` has options, an answer may also name one of them by its text.
        """

    def grade(self, text: str, problem: Problem) -> bool:
        """Whether the response is right."""


def timeouts(task: Task) -> int:
    """How many times a grader was given up for its time limit, so far; 0 for a task that has none."""
    return int(getattr(task, "timeouts", 0))


def split_of(key: str) -> str:
    """The side of the split a key belongs to: fixed by the key alone, so it holds across runs, seeds and counts."""
    digest = hashlib.sha256(key.encode()).digest()
    return "test" if int.from_bytes(digest[:8], "big") < TEST_FRACTION * 2**64 else "train"


def of_split(problems: Iterable[Problem], split: str) -> Iterator[Problem]:
    """Those on one side of `split_of`, or all."""
    return (problem for problem in problems if split in ("all", split_of(problem.key)))


def check_request(split: str, count: int | None) -> None:
    if split not in SPLITS:
        raise TaskError(f"split is {split!r}: expected one of {', '.join(SPLITS)}")
    if count is not None and count < 1:
        raise TaskError(f"the number of problems is {count}: expected at least 1")


def take(problems: Iterable[Problem], split: str, count: int | None, name: str) -> list[Problem]:
    """The first `count` problems of distinct keys; raises where there are fewer, or none.

    `split` and `name` are for the message.
    """
    chosen: dict[str, Problem] = {}
    for problem in problems:
        chosen.setdefault(problem.key, problem)
        if len(chosen) == count:
            break
    if not chosen or (count is not None and len(chosen) < count):
        raise TaskError(
            f"{name} has {len(chosen)} distinct problems in split {split!r}, {count or 'some'} are asked for"
        )
    return list(chosen.values())


def normalised(question: str) -> str:
    """A key: the question without regard to case and white space."""
    return " ".join(question.split()).casefold()
