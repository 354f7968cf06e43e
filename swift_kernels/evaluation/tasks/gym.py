"""Datasets of reasoning-gym."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import fields
from typing import Any

from swift_kernels.evaluation.tasks.base import Problem, TaskError, check_request, normalised, of_split, take
from swift_kernels.evaluation.tasks.gym_scorer import SCORER

COMMUTATIVE = frozenset({"chain_sum", "gcd", "lcm", "products"})
"""Datasets of reasoning-gym whose problems mean the same in another order of their numbers, or nearly so."""


class ReasoningGym:
    """Any dataset of reasoning-gym, graded by its own scorer, such as "gcd,shots=4,max_value=99".

    Options are those of the dataset's configuration, and `shots`: so many solved problems stand before each question,
    for base models and small ones, instead of an instruction in a chat. Problems with the same words and numbers in
    another order share a key where the dataset is one of arithmetic: 5 + 12 gives 12 + 5 away.

    What a model wrote is data. Scorers that would evaluate it are fed only literals and arithmetic, whatever else it
    is counts as wrong; all run in a process of their own, without rights and under a time limit.
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
        self._shots = [
            (str(entry["question"]), str(entry["answer"])) for entry in self._entries(max(1, shots), self._SHOTS_SEED)
        ][:shots]
        self.chat = not shots
        self.stop: tuple[str, ...] = ("\n\n",) if shots else ()
        self.max_new_tokens = 64 if shots else 512

    @property
    def timeouts(self) -> int:
        """Answers whose scorer took too long, of all tasks of this kind."""
        return SCORER.timeouts

    def problems(self, split: str, count: int | None, seed: int = 0) -> list[Problem]:
        check_request(split, count)
        if count is None:
            raise TaskError(f"{self.name} makes as many problems as it is asked for: give a count")
        made = self._generate(count * self._TRIES_PER_PROBLEM, seed)
        return take(of_split(made, split), split, count, self.name)

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
        key = normalised(question)
        return " ".join(sorted(re.findall(r"\w+", key))) if self._dataset in COMMUTATIVE else key

    def prompt(self, question: str) -> str:
        if not self._shots:
            return f"{question}\n\n{self._INSTRUCTION}"
        shots = "".join(f"Question: {asked}\nAnswer: {answer}\n\n" for asked, answer in self._shots)
        return f"{shots}Question: {question}\nAnswer:"

    def extract(self, text: str, problem: Problem | None = None) -> str | None:
        if self._shots:
            return text.strip() or None
        tagged = re.findall(r"<answer>(.*?)(?:</answer>|$)", text, flags=re.DOTALL)
        lines = [line.strip() for line in (tagged[-1:] or text.strip().splitlines()[-1:]) if line.strip()]
        return lines[0] if lines else None

    def grade(self, text: str, problem: Problem) -> bool:
        answer = self.extract(text)
        if answer is None:
            return False
        return SCORER.score(self._dataset, self._config, answer, problem.data) >= 1.0


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
