"""Rollouts on disk: the answers a model gave to the problems of a task, with their token ids and grades.

JSONL: a header line that says how they were made, then one line a problem, appended as soon as it is whole. A run
that was killed continues where it stopped. Files of the authors' code are read too.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from swift_kernels.evaluation.tasks import parse_object
from swift_kernels.files import AppendedLines, other_content, other_settings, parse_json, whole_lines

FORMAT = "swift_kernels.rollouts"
FORMAT_VERSION = 1


class RolloutError(ValueError):
    """A rollout file that cannot be used; the message names the file and line, and what is wrong."""


@dataclass(frozen=True)
class Confidence:
    """How sure the model was of each sampled token, before temperature and filters; natural logarithms.

    Attributes:
        logprobs: log-probability of the token.
        entropies: of the distribution it was sampled from.
        self_certainties: divergence KL(uniform || distribution) (arXiv 2502.18581).
    """

    logprobs: list[float]
    entropies: list[float]
    self_certainties: list[float]


@dataclass(frozen=True)
class Response:
    """One answer to a problem.

    Attributes:
        token_ids: as sampled, with the end-of-sequence token when there was one, without padding; None in files
            that store text alone.
        text: decoded, without special tokens and without the stop string.
        finished: whether it ended by itself (end-of-sequence or stop string), not by the limit on new tokens.
        correct: the grade.
        answer: the final answer found in the text, which majority voting compares.
        confidence: of each token, or None where it was not recorded.
    """

    token_ids: list[int] | None
    text: str
    finished: bool
    correct: bool
    answer: str | None
    confidence: Confidence | None = None


@dataclass(frozen=True)
class Rollout:
    """One problem and the answers to it; `prompt` is the text the model read."""

    id: str
    key: str
    prompt: str
    answer: str
    prompt_token_ids: list[int] | None
    candidates: list[Response]


@dataclass(frozen=True)
class RolloutFile:
    """The content of a rollout file.

    Attributes:
        header: how the rollouts were made: model, task, split, sampling. Empty for files of the authors' code.
        rollouts: one a problem.
        notes: what a user should know about how the file was read.
    """

    path: Path
    header: dict[str, Any]
    rollouts: list[Rollout]
    notes: list[str] = field(default_factory=list)

    @property
    def task(self) -> str | None:
        return self.header.get("task")


def read(path: str | Path) -> RolloutFile:
    """Reads a rollout file of this package, or a train or test JSON of the authors' code.

    Raises:
        ValueError: with file and line, when it is neither, or when a line other than a torn last one is bad.
    """
    path = Path(path)
    if not path.is_file():
        raise RolloutError(f"{path} does not exist: expected a file written by `swift-kernels rollout`")
    with path.open("rb") as file:
        upstream = file.read(64).lstrip().startswith(b"[")
    result = _read_upstream(path) if upstream else _read_own(path)[0]
    if not result.rollouts:
        raise RolloutError(f"{path} holds no problems")
    return result


class RolloutWriter:
    """Appends rollouts to a file, each line whole or not at all, and knows which problems it already holds.

    A torn last line, left by a killed run, is dropped. A file made with other settings, or of something else, is
    refused. Where several processes may come to one file, `files.alone` keeps all but one off.
    """

    def __init__(self, path: str | Path, header: dict[str, Any]) -> None:
        self.path = Path(path)
        rollouts, end = read_begun(self.path, header)
        header = {"format": FORMAT, "version": FORMAT_VERSION, **header}
        self.done = {rollout.id for rollout in rollouts}
        self._lines = AppendedLines(self.path, end)
        if not end:
            self._lines.write(header)

    def write(self, rollout: Rollout) -> None:
        self._lines.write(to_dict(rollout))
        self.done.add(rollout.id)

    def close(self) -> None:
        self._lines.close()

    def __enter__(self) -> RolloutWriter:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def read_begun(path: Path, header: dict[str, Any]) -> tuple[list[Rollout], int]:
    """The rollouts of a file that may be continued with this header, and where its last whole line ends.

    Raises:
        RolloutError: it was made with other settings, or is no rollout file.
    """
    header = {"format": FORMAT, "version": FORMAT_VERSION, **header}
    if not path.exists():
        return [], 0
    if not whole_lines(path)[1]:
        if refusal := other_content(path, header, "rollout"):
            raise RolloutError(refusal)
        return [], 0
    content, end = _read_own(path)
    if difference := other_settings(path, content.header, header):
        raise RolloutError(difference)
    return content.rollouts, end


def to_dict(rollout: Rollout) -> dict[str, Any]:
    """A line of a rollout file."""
    row = asdict(rollout)
    for candidate in row["candidates"]:
        if candidate["confidence"] is None:
            del candidate["confidence"]
    return row


def _read_own(path: Path) -> tuple[RolloutFile, int]:
    """The content of a file, and where its last whole line ends."""
    lines, end = whole_lines(path)
    notes = [] if end == path.stat().st_size else [f"{path}: the last line is torn and was left out"]
    header: dict[str, Any] = {}
    rollouts: dict[str, Rollout] = {}
    for number, raw in enumerate(lines, start=1):
        place = f"{path}:{number}"
        try:
            row = parse_object(raw, place)
            if number == 1:
                header = _check_header(row, place)
                continue
            rollout = _rollout(row)
        except ValueError as error:
            raise RolloutError(str(error)) from None
        except (KeyError, TypeError) as error:
            what = f"no {error}" if isinstance(error, KeyError) else str(error)
            raise RolloutError(f"{place}: not a problem with its candidates: {what}") from None
        if rollout.id in rollouts:
            raise RolloutError(f"{place}: problem {rollout.id!r} is in the file twice")
        rollouts[rollout.id] = rollout
    if not header:
        raise RolloutError(f"{path} has no whole line: expected a file written by `swift-kernels rollout`")
    return RolloutFile(path, header, list(rollouts.values()), notes), end


def _check_header(row: dict[str, Any], place: str) -> dict[str, Any]:
    if row.get("format") != FORMAT:
        raise RolloutError(f"{place}: no rollout header: expected a file written by `swift-kernels rollout`")
    if row.get("version") != FORMAT_VERSION:
        raise RolloutError(f"{place}: format version {row.get('version')}: this version reads {FORMAT_VERSION}")
    for name, kind in {"task": str, "split": str, "model": dict, "sampling": dict}.items():
        if name in row and not isinstance(row[name], kind):
            raise RolloutError(f"{place}: the header is damaged: {name} is {row[name]!r}: expected {kind.__name__}")
    if not isinstance(row.get("model", {"name": ""}).get("name"), str):
        raise RolloutError(f"{place}: the header is damaged: the model has no name")
    return row


def _rollout(row: dict[str, Any]) -> Rollout:
    for number, candidate in enumerate(_typed(row["candidates"], list, "candidates"), start=1):
        if isinstance(candidate, dict) and candidate.get("correct") is None:
            raise TypeError(f"candidate {number} has no label: expected correct, true or false, as a grader gives it")
    candidates = [
        Response(
            token_ids=_token_ids(_typed(candidate, dict, "a candidate")["token_ids"], "token_ids"),
            text=_typed(candidate["text"], str, "text"),
            finished=_typed(candidate["finished"], bool, "finished"),
            correct=_typed(candidate["correct"], bool, "correct"),
            answer=None if candidate["answer"] is None else _typed(candidate["answer"], str, "answer"),
            confidence=_confidence(candidate.get("confidence"), candidate["token_ids"]),
        )
        for candidate in _typed(row["candidates"], list, "candidates")
    ]
    if not candidates:
        raise TypeError("candidates is empty")
    return Rollout(
        id=_typed(row["id"], str, "id"),
        key=_typed(row["key"], str, "key"),
        prompt=_typed(row["prompt"], str, "prompt"),
        answer=_typed(row["answer"], str, "answer"),
        prompt_token_ids=_token_ids(row["prompt_token_ids"], "prompt_token_ids"),
        candidates=candidates,
    )


def _confidence(value: Any, token_ids: list[int] | None) -> Confidence | None:
    if value is None:
        return None
    lists = {name: _typed(value, dict, "confidence")[name] for name in ("logprobs", "entropies", "self_certainties")}
    for name, numbers in lists.items():
        # JSON as Python reads it has NaN and infinity, which the mean of an answer would be too.
        if not isinstance(numbers, list) or not all(map(_is_finite, numbers)):
            raise TypeError(f"confidence: {name} is not a list of numbers")
        if len(numbers) != len(token_ids or ()):
            raise TypeError(
                f"confidence: {name} has {len(numbers)} numbers for {len(token_ids or ())} token ids: expected one each"
            )
    return Confidence(**lists)


def _is_finite(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) <= sys.float_info.max


def _typed(value: Any, kind: type, name: str) -> Any:
    if not isinstance(value, kind):
        raise TypeError(f"{name} is a {type(value).__name__}: expected {kind.__name__}")
    return value


def _token_ids(value: Any, name: str) -> list[int] | None:
    if value is None:
        return None
    if not isinstance(value, list) or any(type(token) is not int or not 0 <= token < 2**31 for token in value):
        raise TypeError(f"{name} is not a list of token ids")
    return value


def _read_upstream(path: Path) -> RolloutFile:
    """Train files hold a problem an entry with all its completions, test files one completion an entry."""
    try:
        rows = parse_json(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RolloutError(f"{path} is not JSON that can be read, is it truncated? {error}") from None
    problems: dict[str, Rollout] = {}
    for index, row in enumerate(rows):
        try:
            train = "completions" in row
            texts = _typed(row["completions"], list, "completions") if train else [row["response"]]
            grades = row["correctness"] if train else [row["correctness"]]
            if any(type(grade) not in (bool, int) for grade in _typed(grades, list, "correctness")):
                raise TypeError("correctness is not true or false for every answer")
            answers = [None] * len(texts) if train else [row["extracted_output"]]
            if len(texts) != len(grades):
                raise TypeError(f"{len(texts)} completions but {len(grades)} grades")
            identity = str(index if train else row["idx"])
            problem = problems.setdefault(
                identity,
                Rollout(identity, " ".join(row["prompt"].split()), row["prompt"], str(row["reference"]), None, []),
            )
            problem.candidates.extend(
                # Whether an answer ended by itself is not recorded; neither is its end-of-sequence token.
                Response(
                    None, _typed(text, str, "completion"), True, bool(grade), None if answer is None else str(answer)
                )
                for text, grade, answer in zip(texts, grades, answers, strict=True)
            )
        except (KeyError, TypeError, AttributeError) as error:
            what = f"no {error}" if isinstance(error, KeyError) else str(error)
            raise RolloutError(f"{path}: entry {index} is not as the authors' code writes it: {what}") from None
    notes = [f"{path} stores text without token ids (the authors' format): it is tokenised anew"]
    return RolloutFile(path, {}, list(problems.values()), notes)


def tokenized(rollouts: Sequence[Rollout], tokenizer: Any) -> list[Rollout]:
    """Rollouts that all have token ids; text without them is tokenised, the prompt in the chat template."""
    return [rollout if _has_token_ids(rollout) else _tokenize(rollout, tokenizer) for rollout in rollouts]


def _has_token_ids(rollout: Rollout) -> bool:
    return rollout.prompt_token_ids is not None and all(c.token_ids is not None for c in rollout.candidates)


def _tokenize(rollout: Rollout, tokenizer: Any) -> Rollout:
    return replace(
        rollout,
        prompt_token_ids=encode_prompt(tokenizer, rollout.prompt, chat=True),
        candidates=[
            # The end-of-sequence token that ended a finished answer: the span rule then leaves out that token
            # instead of the last one of the text, which was fed.
            replace(
                candidate,
                token_ids=[
                    *tokenizer(candidate.text, add_special_tokens=False)["input_ids"],
                    *([tokenizer.eos_token_id] if candidate.finished else []),
                ],
            )
            for candidate in rollout.candidates
        ],
    )


def encode_prompt(tokenizer: Any, prompt: str, *, chat: bool) -> list[int]:
    """Token ids of a prompt: as a user's message where `chat` is asked for and the tokenizer has a template."""
    if chat and getattr(tokenizer, "chat_template", None):
        message = [{"role": "user", "content": prompt}]
        return list(
            tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=True, return_dict=False)
        )
    return list(tokenizer(prompt)["input_ids"])
