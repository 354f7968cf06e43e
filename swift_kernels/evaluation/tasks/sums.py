"""Sums of two small numbers: a task that needs no data and no grader, for small models."""

from __future__ import annotations

import random
import re

from swift_kernels.evaluation.tasks.base import Problem, check_request, of_split, take


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
        check_request(split, count)
        generator = random.Random(seed)
        shots = {tuple(sorted(shot)) for shot in self._SHOTS}
        pairs = [(a, b) for a in range(1, self._LARGEST + 1) for b in range(a, self._LARGEST + 1)]
        pairs = [pair for pair in pairs if pair not in shots]
        generator.shuffle(pairs)
        made = []
        for low, high in pairs:
            a, b = (low, high) if generator.random() < 0.5 else (high, low)
            made.append(Problem(f"{a}+{b}", f"{low}+{high}", f"What is {a} + {b}?", str(a + b)))
        return take(of_split(made, split), split, count, self.name)

    def prompt(self, question: str) -> str:
        shots = "".join(f"Question: What is {a} + {b}?\nAnswer: {a} + {b} = {a + b}\n" for a, b in self._SHOTS)
        return f"{shots}Question: {question}\nAnswer:"

    def extract(self, text: str, problem: Problem | None = None) -> str | None:
        numbers = re.findall(r"-?\d+", text.rpartition("=")[2])
        return str(int(numbers[0])) if numbers else None

    def grade(self, text: str, problem: Problem) -> bool:
        return self.extract(text) == problem.answer
