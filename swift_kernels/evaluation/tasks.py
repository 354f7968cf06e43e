"""Tasks: problems with reference answers, the prompt a model gets, and how its answer is found and graded."""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Protocol

from swift_kernels.evaluation.graders import MathGrader

SPLITS = ("train", "test", "all")
TEST_FRACTION = 0.25

COMMUTATIVE = frozenset({"chain_sum", "gcd", "lcm", "products"})
"""Datasets of reasoning-gym whose problems mean the same in another order of their numbers, or nearly so."""


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
    """

    id: str
    key: str
    question: str
    answer: str
    data: Any = field(default=None, compare=False, repr=False)


class Task(Protocol):
    """What rollouts, training and evaluation need of a task.

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

    def extract(self, text: str) -> str | None:
        """The final answer within a response, in the form that majority voting compares, or None."""

    def grade(self, text: str, problem: Problem) -> bool:
        """Whether the response is right."""


def get_task(name: str) -> Task:
    """The task of this name: "sums", "reasoning-gym:<dataset>" or "jsonl:<path>"."""
    kind, _, argument = name.partition(":")
    if name == Sums.name:
        return Sums()
    if kind == "reasoning-gym" and argument:
        return ReasoningGym(argument)
    if kind == "jsonl" and argument:
        return JsonlTask(argument)
    raise TaskError(f"task {name!r} is unknown: expected sums, reasoning-gym:<dataset> or jsonl:<path>")


def split_of(key: str) -> str:
    """The side of the split a key belongs to: fixed by the key alone, so it holds across runs, seeds and counts."""
    digest = hashlib.sha256(key.encode()).digest()
    return "test" if int.from_bytes(digest[:8], "big") < TEST_FRACTION * 2**64 else "train"


class Sums:
    """Sums of two numbers up to 50, few-shot: small models are right about a third of the time.

    The key is the sorted operands: 5 + 12 never tests a head that was trained on 12 + 5.
    """

    name = "sums"
    stop: tuple[str, ...] = ("\n",)
    chat = False
    max_new_tokens = 16

    _LARGEST = 50
    _SHOTS = ((12, 5), (31, 24))

    def problems(self, split: str, count: int | None, seed: int = 0) -> list[Problem]:
        generator = random.Random(seed)
        shots = {tuple(sorted(shot)) for shot in self._SHOTS}
        pairs = [(a, b) for a in range(1, self._LARGEST + 1) for b in range(a, self._LARGEST + 1)]
        pairs = [pair for pair in pairs if pair not in shots]
        generator.shuffle(pairs)
        made = []
        for low, high in pairs:
            a, b = (low, high) if generator.random() < 0.5 else (high, low)
            made.append(Problem(f"{a}+{b}", f"{low}+{high}", f"What is {a} + {b}?", str(a + b)))
        return _take(iter(made), split, count, self.name)

    def prompt(self, question: str) -> str:
        shots = "".join(f"Question: What is {a} + {b}?\nAnswer: {a} + {b} = {a + b}\n" for a, b in self._SHOTS)
        return f"{shots}Question: {question}\nAnswer:"

    def extract(self, text: str) -> str | None:
        numbers = re.findall(r"-?\d+", text.rpartition("=")[2])
        return str(int(numbers[0])) if numbers else None

    def grade(self, text: str, problem: Problem) -> bool:
        return self.extract(text) == problem.answer


class ReasoningGym:
    """Any dataset of reasoning-gym, graded by its own scorer, such as "gcd,shots=4,max_value=99".

    Options are those of the dataset's configuration, and `shots`: so many solved problems stand before each question,
    for base models and small ones, instead of an instruction in a chat. Problems with the same words and numbers in
    another order share a key where the dataset is one of arithmetic: 5 + 12 gives 12 + 5 away.
    """

    _INSTRUCTION = "Give the final answer, and nothing else, between <answer> and </answer>."
    _TRIES_PER_PROBLEM = 50
    _SHOTS_SEED = 2**31 - 1

    def __init__(self, dataset: str) -> None:
        try:
            import reasoning_gym
            from reasoning_gym.factory import DATASETS
        except ImportError as error:
            raise ImportError("this task needs reasoning-gym: pip install 'swift_kernels[cli]'") from error
        self.name = f"reasoning-gym:{dataset}"
        self._dataset, *options = re.split(r",(?![^\[]*\])", dataset)  # a list keeps its commas
        if self._dataset not in DATASETS:
            raise TaskError(
                f"reasoning-gym has no dataset {self._dataset!r}: expected one of {', '.join(sorted(DATASETS))}"
            )
        self._config = _options(options, self.name)
        shots = self._config.pop("shots", 0)
        if type(shots) is not int or shots < 0:
            raise TaskError(f"{self.name}: shots is {shots!r}: expected how many solved problems to show")
        known = [field.name for field in fields(DATASETS[self._dataset][1])]
        known = [name for name in known if name not in ("seed", "size")]
        if unknown := sorted(set(self._config).difference(known)):
            raise TaskError(f"{self.name}: option {unknown[0]!r} is unknown: expected shots, {', '.join(known)}")
        self._create = reasoning_gym.create_dataset
        self._scorer = self._entries(1, 0)
        self._shots = [
            (str(entry["question"]), str(entry["answer"])) for entry in self._entries(max(1, shots), self._SHOTS_SEED)
        ][:shots]
        self.chat = not shots
        self.stop: tuple[str, ...] = ("\n\n",) if shots else ()
        self.max_new_tokens = 64 if shots else 512

    def problems(self, split: str, count: int | None, seed: int = 0) -> list[Problem]:
        if count is None:
            raise TaskError(f"{self.name} makes as many problems as it is asked for: give a count")
        return _take(self._generate(count * self._TRIES_PER_PROBLEM, seed), split, count, self.name)

    def _entries(self, size: int, seed: int) -> Any:
        try:
            made = self._create(self._dataset, size=size, seed=seed, **self._config)
            made[0]  # some options are refused only when the first problem is made
            return made
        except Exception as error:  # each dataset checks its options in its own way
            raise TaskError(f"{self.name}: the dataset refuses its options: {error}") from None

    def _generate(self, size: int, seed: int) -> Iterator[Problem]:
        shown = {self._key(question) for question, _ in self._shots}
        for index, entry in enumerate(self._entries(size, seed)):
            question, answer = str(entry["question"]), str(entry["answer"])
            if (key := self._key(question)) not in shown:
                yield Problem(f"{seed}/{index}", key, question, answer, entry)

    def _key(self, question: str) -> str:
        key = _normalised(question)
        return " ".join(sorted(re.findall(r"\w+", key))) if self._dataset in COMMUTATIVE else key

    def prompt(self, question: str) -> str:
        if not self._shots:
            return f"{question}\n\n{self._INSTRUCTION}"
        shots = "".join(f"Question: {asked}\nAnswer: {answer}\n\n" for asked, answer in self._shots)
        return f"{shots}Question: {question}\nAnswer:"

    def extract(self, text: str) -> str | None:
        if self._shots:
            return text.strip() or None
        tagged = re.findall(r"<answer>(.*?)(?:</answer>|$)", text, flags=re.DOTALL)
        lines = [line.strip() for line in (tagged[-1:] or text.strip().splitlines()[-1:]) if line.strip()]
        return lines[0] if lines else None

    def grade(self, text: str, problem: Problem) -> bool:
        answer = self.extract(text)
        if answer is None:
            return False
        try:
            return float(self._scorer.score_answer(answer, problem.data)) >= 1.0
        except Exception:  # scorers evaluate the answer, and an answer may be anything
            return False


def _options(parts: Sequence[str], name: str) -> dict[str, Any]:
    """ "a=1" and the like; values are JSON where they can be."""
    options: dict[str, Any] = {}
    for part in parts:
        option, equals, value = part.partition("=")
        if not option or not equals or not value:
            raise TaskError(f"{name}: {part!r} is no option: expected name=value")
        try:
            options[option] = json.loads(value)
        except json.JSONDecodeError:
            options[option] = value
    return options


class JsonlTask:
    """Problems of a JSONL file (`problem` or `question`, and `answer`), graded by math-verify.

    Of an answer in GSM8K's form, what follows `####` counts. `id` or `unique_id` are used where present.
    """

    stop: tuple[str, ...] = ()
    chat = True
    max_new_tokens = 1024

    # The instruction of the authors' experiments on MATH.
    _INSTRUCTION = (
        "Solve the following math problem step-by-step.\n"
        "Simplify your answer as much as possible. Present your final answer as \\boxed{Your Answer}.\n"
    )

    def __init__(self, path: str) -> None:
        self.name = f"jsonl:{path}"
        self._path = Path(path)
        self._grader = MathGrader()
        if not self._path.is_file():
            raise TaskError(f"{path} does not exist: expected a JSONL file of problems and answers")

    def problems(self, split: str, count: int | None, seed: int = 0) -> list[Problem]:
        made = list(self._read())
        random.Random(seed).shuffle(made)
        return _take(iter(made), split, count, self.name)

    def _read(self) -> Iterator[Problem]:
        seen: dict[str, str] = {}
        for place, row in read_jsonl(self._path):
            question = _string(row, ("problem", "question"), place)
            answer = _string(row, ("answer",), place).rpartition("####")[2].strip()
            identity = str(row.get("unique_id", row.get("id", place.rpartition(":")[2])))
            if identity in seen:
                raise TaskError(
                    f"{place}: id {identity!r} is that of {seen[identity]}: expected a different one a line"
                )
            seen[identity] = place
            yield Problem(identity, _normalised(question), question, answer)

    def prompt(self, question: str) -> str:
        return self._INSTRUCTION + question

    def extract(self, text: str) -> str | None:
        return self._grader.extract(text)

    def grade(self, text: str, problem: Problem) -> bool:
        return self._grader.equal(text, problem.answer)


def read_jsonl(path: str | Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields each object of a JSONL file with its place, `file:line`; blank lines are skipped."""
    with open(path, encoding="utf-8") as lines:
        number = 0
        try:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield f"{path}:{number}", parse_object(line, f"{path}:{number}")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}:{number + 1}: not UTF-8 text ({error.reason})") from None


def parse_object(line: str, place: str) -> dict[str, Any]:
    """One JSON object, or an error that names the place it was read from."""
    try:
        row = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{place}: not JSON ({error}): expected one object a line") from None
    if not isinstance(row, dict):
        raise ValueError(f"{place}: a {type(row).__name__}: expected an object")
    return row


def _string(row: dict[str, Any], names: tuple[str, ...], place: str) -> str:
    for name in names:
        value = row.get(name)
        if isinstance(value, int | float) and not isinstance(value, bool):
            value = str(value)
        if isinstance(value, str) and value.strip():
            return value
    raise ValueError(f"{place}: no {' or '.join(map(repr, names))} that is text: the object has {sorted(row)}")


def _normalised(question: str) -> str:
    return " ".join(question.split()).casefold()


def _take(problems: Iterator[Problem], split: str, count: int | None, name: str) -> list[Problem]:
    if split not in SPLITS:
        raise TaskError(f"split is {split!r}: expected one of {', '.join(SPLITS)}")
    if count is not None and count < 1:
        raise TaskError(f"the number of problems is {count}: expected at least 1")
    chosen: dict[str, Problem] = {}
    for problem in problems:
        if split in ("all", split_of(problem.key)):
            chosen.setdefault(problem.key, problem)
        if len(chosen) == count:
            break
    if not chosen or (count is not None and len(chosen) < count):
        raise TaskError(
            f"{name} has {len(chosen)} distinct problems in split {split!r}, {count or 'some'} are asked for"
        )
    return list(chosen.values())
