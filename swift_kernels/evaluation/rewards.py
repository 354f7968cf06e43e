"""Rewards on disk: what a reward model, or anything else that scores answers, says of the answers in rollouts.

JSONL: a line a problem with one number a candidate. `swift-kernels reward` writes a header line before them that says
how they were made, and with each problem what it cost; lines of others need neither.
"""

from __future__ import annotations

import hashlib
import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from swift_kernels.evaluation.tasks import parse_object, read_jsonl
from swift_kernels.files import AppendedLines, other_content, other_settings, whole_lines
from swift_kernels.training.rollouts import Rollout

FORMAT = "swift_kernels.rewards"
FORMAT_VERSION = 1
COLUMN = "rewards"


class RewardFileError(ValueError):
    """A file of rewards that cannot be used; the message names the file and line, and what is wrong."""


@dataclass(frozen=True)
class ProblemRewards:
    """What a reward model says of the answers to one problem, and what that took.

    Attributes:
        rewards: one a candidate; NaN where there is none.
        answers: how many the model read: equal ones once, and none that is too long for it or unreadable.
        too_long: candidates that do not fit the model's context.
        tokens: that it was fed, prompts included and padding left out.
        seconds: from texts to rewards.
        flops: of its forwards, padding included.
        unreadable: candidates of which the model's tokenizer makes nothing that it could read.
        why: what was wrong with the first of these.
    """

    rewards: list[float]
    answers: int
    too_long: int
    tokens: int
    seconds: float
    flops: int
    unreadable: int = 0
    why: str | None = None


@dataclass(frozen=True)
class RewardCost:
    """What rewards cost, summed over problems; `answers`, `tokens`, `seconds` and `flops` as in `ProblemRewards`."""

    parameters: int
    seconds: float
    tokens: int
    flops: int
    device: str
    answers: int


@dataclass(frozen=True)
class Rewards:
    """The content of a file of rewards, in the order of the rollouts.

    Attributes:
        name: of the reward model where a header says it, otherwise of the file.
        values: a list a problem, a number a candidate; NaN where there is none.
        notes: what a user should know about what is missing.
        cost: of these problems, or None where the file does not say.
    """

    name: str
    values: list[list[float]]
    notes: list[str]
    cost: RewardCost | None


def read_rewards(path: str | Path, rollouts: Sequence[Rollout], column: str = COLUMN) -> Rewards:
    """Reads the rewards of the answers in `rollouts`: `{"id": problem, "<column>": [a number a candidate]}` a line.

    Lines of other problems are left out, and problems without a line have NaN; both are noted.

    Raises:
        ValueError: with file and line, when a line is bad or is of other answers, or no line is of these problems.
    """
    path = Path(path)
    if not path.is_file():
        raise RewardFileError(f"{path} does not exist: expected a file written by `swift-kernels reward`, or like it")
    by_id = {rollout.id: rollout for rollout in rollouts}
    header: dict[str, Any] = {}
    values: dict[str, list[float]] = {}
    costs: list[dict[str, Any]] = []
    places: dict[str, str] = {}
    for place, row in read_jsonl(path):
        if not header and not places and "format" in row and "id" not in row:
            header = _check_header(row, place)
            continue
        identity = _identity(row, place, places)
        if identity in by_id:
            values[identity] = _values(row, column, by_id[identity], place)
            if header:
                costs.append(_cost(row, place))
    if not values:
        raise RewardFileError(
            f"{path}: none of its {len(places)} problems is in the rollouts, whose first is {rollouts[0].id!r}: "
            "expected the rewards of these rollouts, with the ids of their problems"
        )
    table = [values.get(rollout.id, [math.nan] * len(rollout.candidates)) for rollout in rollouts]
    cost = None
    if header:
        totals = {key: sum(row[key] for row in costs) for key in ("seconds", "tokens", "flops", "answers")}
        cost = RewardCost(parameters=header["reward_model"]["parameters"], device=header["device"], **totals)
    name = header["reward_model"]["name"] if header else path.stem
    return Rewards(name, table, _notes(path, values, places, rollouts, costs), cost)


class RewardWriter:
    """Appends the rewards of rollouts to a file, each line whole or not at all.

    A torn last line, left by a killed run, is dropped. A file made with other settings, of other answers or of
    something else is refused. Where several processes may come to one file, `files.alone` keeps all but one off.
    """

    def __init__(self, path: str | Path, header: dict[str, Any], rollouts: Sequence[Rollout]) -> None:
        self.path = Path(path)
        header = {"format": FORMAT, "version": FORMAT_VERSION, **header}
        by_id = {rollout.id: rollout for rollout in rollouts}
        places: dict[str, str] = {}
        lines, end = whole_lines(self.path) if self.path.exists() else ([], 0)
        if not end and self.path.exists() and (refusal := other_content(self.path, header, "reward")):
            raise RewardFileError(refusal)
        for number, line in enumerate(lines, start=1):
            place = f"{path}:{number}"
            row = parse_object(line, place)
            if number == 1:
                if difference := other_settings(self.path, _check_header(row, place), header):
                    raise RewardFileError(difference)
                continue
            identity = _identity(row, place, places)
            if identity not in by_id:
                raise RewardFileError(
                    f"{place}: problem {identity!r} is not in these rollouts: continue with those that the file was "
                    "made from, or take another file"
                )
            _values(row, COLUMN, by_id[identity], place)
            _cost(row, place)
        self.done = set(places)
        self._lines = AppendedLines(self.path, end)
        if not end:
            self._lines.write(header)

    def write(self, rollout: Rollout, found: ProblemRewards) -> None:
        rewards = [reward if math.isfinite(reward) else None for reward in found.rewards]
        self._lines.write({"id": rollout.id, "digest": digest(rollout), **asdict(found), "rewards": rewards})
        self.done.add(rollout.id)

    def close(self) -> None:
        self._lines.close()

    def __enter__(self) -> RewardWriter:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def digest(rollout: Rollout) -> str:
    """Of what a reward model reads of a problem: the prompt and the answers."""
    texts = [rollout.prompt, *(candidate.text for candidate in rollout.candidates)]
    return hashlib.sha256(json.dumps(texts).encode()).hexdigest()[:16]


def _check_header(row: dict[str, Any], place: str) -> dict[str, Any]:
    if row.get("format") != FORMAT:
        raise RewardFileError(
            f"{place}: format {row.get('format')!r}: expected {FORMAT!r}, which `swift-kernels reward` writes"
        )
    if row.get("version") != FORMAT_VERSION:
        raise RewardFileError(f"{place}: format version {row.get('version')}: this version reads {FORMAT_VERSION}")
    model = row.get("reward_model")
    if (
        not isinstance(model, dict)
        or not isinstance(model.get("name"), str)
        or type(model.get("parameters")) is not int
        or not 0 <= model["parameters"] <= sys.float_info.max
        or not isinstance(row.get("device"), str)
    ):
        raise RewardFileError(f"{place}: the header is damaged: expected reward_model with name, parameters; device")
    return row


def _identity(row: dict[str, Any], place: str, places: dict[str, str]) -> str:
    """The problem's id, which is then among `places`."""
    identity = row.get("id")
    if isinstance(identity, bool) or not isinstance(identity, str | int):
        raise RewardFileError(f"{place}: id is {identity!r}: expected the id of a problem in the rollouts")
    identity = str(identity)
    if identity in places:
        raise RewardFileError(f"{place}: problem {identity!r} is in {places[identity]} already: expected it once")
    places[identity] = place
    return identity


def _values(row: dict[str, Any], column: str, rollout: Rollout, place: str) -> list[float]:
    """The rewards of a line, which is that of this problem; NaN for null."""
    if column not in row:
        raise RewardFileError(f"{place}: no {column!r}: the object has {sorted(row)}")
    values = row[column]
    if not isinstance(values, list):
        raise RewardFileError(f"{place}: {column} is {values!r}: expected a list of numbers, one a candidate")
    if len(values) != len(rollout.candidates):
        raise RewardFileError(
            f"{place}: {len(values)} numbers in {column!r}, but problem {rollout.id!r} has {len(rollout.candidates)} "
            "candidates: expected one each"
        )
    for number, value in enumerate(values):
        if value is not None and type(value) not in (int, float):
            raise RewardFileError(f"{place}: {column}[{number}] is {value!r}: expected a number, or null for none")
    if "digest" in row and row["digest"] != digest(rollout):
        raise RewardFileError(
            f"{place}: these are rewards of other answers to problem {rollout.id!r}: expected those of these rollouts, "
            "make them anew with `swift-kernels reward`"
        )
    try:
        return [math.nan if value is None else float(value) for value in values]
    except OverflowError:
        raise RewardFileError(f"{place}: {column} holds an integer that no float64 holds: expected numbers") from None


def _cost(row: dict[str, Any], place: str) -> dict[str, Any]:
    row = {"unreadable": 0, **row}  # which earlier versions did not write: they stopped there
    for key in ("seconds", "tokens", "flops", "answers", "too_long", "unreadable"):
        kinds = (int, float) if key == "seconds" else (int,)
        if type(row.get(key)) not in kinds or not 0 <= row[key] <= sys.float_info.max:
            raise RewardFileError(f"{place}: {key} is {row.get(key)!r}: expected a number of at least 0")
    return row


def _notes(
    path: Path,
    values: Mapping[str, Sequence[float]],
    places: Mapping[str, str],
    rollouts: Sequence[Rollout],
    costs: Sequence[Mapping[str, Any]],
) -> list[str]:
    notes = []
    if unknown := [identity for identity in places if identity not in values]:
        notes.append(
            f"{path}: {len(unknown)} of {len(places)} lines are of problems that are not in the rollouts, such as "
            f"{unknown[0]!r}, and were left out"
        )
    if missing := [rollout.id for rollout in rollouts if rollout.id not in values]:
        notes.append(f"{path}: {len(missing)} of {len(rollouts)} problems have no rewards, such as {missing[0]!r}")
    if without := sum(math.isnan(value) for row in values.values() for value in row):
        total = sum(map(len, values.values()))
        too_long, unreadable = (sum(row[key] for row in costs) for key in ("too_long", "unreadable"))
        reasons = [f"{too_long} of them as they are too long for the reward model"] if too_long else []
        if unreadable:
            first = next(row for row in costs if row["unreadable"])
            reasons.append(f"{unreadable} as it cannot read them (problem {first['id']!r}: {first.get('why')})")
        why = f", {', '.join(reasons)}," if reasons else ""
        notes.append(f"{path}: {without} of {total} answers have no reward{why} and are never picked by it")
    return notes
