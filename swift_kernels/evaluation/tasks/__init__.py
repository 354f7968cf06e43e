"""Tasks: problems with reference answers, the prompt a model gets, and how its answer is found and graded."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from swift_kernels.evaluation.tasks.base import SPLITS, TEST_FRACTION, Problem, Task, TaskError, split_of, timeouts
from swift_kernels.evaluation.tasks.choices import AquaRat, CoinFlip, HellaSwag, ImbueCode
from swift_kernels.evaluation.tasks.gym import COMMUTATIVE, ReasoningGym
from swift_kernels.evaluation.tasks.hub import RowsTask, Source
from swift_kernels.evaluation.tasks.mathematics import Gsm8k, JsonlTask, Math
from swift_kernels.evaluation.tasks.preferences import ASPECTS, PkuSafeRlhf
from swift_kernels.evaluation.tasks.rows import parse_object, read_jsonl
from swift_kernels.evaluation.tasks.sums import Sums

__all__ = [
    "COMMUTATIVE",
    "HUB_TASKS",
    "SPLITS",
    "TEST_FRACTION",
    "AquaRat",
    "CoinFlip",
    "Gsm8k",
    "HellaSwag",
    "ImbueCode",
    "JsonlTask",
    "Math",
    "PkuSafeRlhf",
    "Problem",
    "ReasoningGym",
    "RowsTask",
    "Source",
    "Sums",
    "Task",
    "TaskError",
    "check_generates",
    "get_pairs",
    "get_task",
    "parse_object",
    "read_jsonl",
    "split_of",
    "timeouts",
]

HUB_TASKS: dict[str, Callable[[str | None], RowsTask]] = {
    **{task.kind: task for task in (Math, Gsm8k, AquaRat, ImbueCode, HellaSwag, CoinFlip)},
    **{f"pku-saferlhf:{aspect}": partial(PkuSafeRlhf, aspect) for aspect in ASPECTS},
}
"""Tasks of data sets on the Hub, by name; each is made from a local file, or None for the Hub."""


def get_task(name: str) -> Task:
    """The task of this name, which the error for an unknown one lists."""
    kind, _, argument = name.partition(":")
    if name == Sums.name:
        return Sums()
    if kind == "reasoning-gym" and argument:
        return ReasoningGym(argument)
    if kind == "jsonl" and argument:
        return JsonlTask(argument)
    for known, make in HUB_TASKS.items():
        if name == known:
            return make(None)
        if name.startswith(f"{known}:") and name != f"{known}:":
            return make(name.removeprefix(f"{known}:"))
    raise TaskError(
        f"task {name!r} is unknown: expected sums, reasoning-gym:<dataset>, jsonl:<path>, or {', '.join(HUB_TASKS)}, "
        "each of these also with :<path> of a JSONL file in the Hub's format"
    )


def check_generates(task: Task) -> Task:
    """The task itself; raises for one whose answers are stored already."""
    if isinstance(task, PkuSafeRlhf):
        raise TaskError(
            f"{task.name} has stored answers, none are generated: write them to a rollout file with "
            f"`swift-kernels pairs --task {task.name}`"
        )
    return task


def get_pairs(name: str) -> PkuSafeRlhf:
    """The task of this name; raises for one whose answers have to be generated."""
    task = get_task(name)
    if not isinstance(task, PkuSafeRlhf):
        kinds = ", ".join(f"pku-saferlhf:{aspect}" for aspect in ASPECTS)
        raise TaskError(
            f"{name} has no stored answers: expected one of {kinds}; let a model answer it with `swift-kernels rollout`"
        )
    return task
