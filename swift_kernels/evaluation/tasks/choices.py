"""Questions with options, of which one is right: AQuA-RAT, HellaSwag, Imbue's code comprehension, coin flips."""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Sequence
from string import ascii_uppercase

from swift_kernels.evaluation.tasks.answers import choice, yes_or_no
from swift_kernels.evaluation.tasks.base import Problem, normalised
from swift_kernels.evaluation.tasks.hub import RowsTask, Source
from swift_kernels.evaluation.tasks.rows import Row, text_of, texts_of


class _Choices(RowsTask):
    """`Problem.data` holds the texts of the options; the answer is a letter."""

    _INSTRUCTION: str

    def prompt(self, question: str) -> str:
        return (
            f"{self._INSTRUCTION} Think it through step by step, and end with the letter of your choice as "
            f"\\boxed{{Letter}}.\n\n{question}"
        )

    def extract(self, text: str, problem: Problem | None = None) -> str | None:
        return choice(text, None if problem is None else problem.data)

    def grade(self, text: str, problem: Problem) -> bool:
        return self.extract(text, problem) == problem.answer


def _problem(identity: str, question: str, options: Sequence[str], right: int) -> Problem:
    lines = [f"{letter}) {option}" for letter, option in zip(ascii_uppercase, options, strict=False)]
    asked = "\n".join([question.strip(), *lines])
    return Problem(identity, normalised(question), asked, ascii_uppercase[right], tuple(options))


class AquaRat(_Choices):
    """AQuA-RAT; rows have `question`, `options` such as "A)21", and the letter `correct`.

    The test side is validation and test together, from which the paper takes its 500 problems.
    """

    kind = "aqua"
    hub = "deepmind/aqua_rat"
    train = (Source(hub, "train", "raw"),)
    test = (Source(hub, "validation", "raw"), Source(hub, "test", "raw"))
    _INSTRUCTION = "Solve this problem and choose the right one of its options."

    def read(self, row: Row, identity: str) -> Problem:
        options = [
            re.sub(rf"^\(?{letter}\s*\)\s*", "", option)
            for letter, option in zip(ascii_uppercase, texts_of(row, "options"), strict=False)
        ]
        correct = text_of(row, "correct").strip()
        letters = ascii_uppercase[: len(options)]
        if len(correct) != 1 or correct not in letters:
            raise ValueError(f"'correct' is {correct!r}: expected one of {', '.join(letters)}")
        return _problem(identity, text_of(row, "question"), options, letters.index(correct))


class HellaSwag(_Choices):
    """HellaSwag; rows have `ctx`, four `endings` and `label`, the place of the right one.

    The test side is its validation split: the labels of its test split are not public.
    """

    kind = "hellaswag"
    hub = "Rowan/hellaswag"
    train = (Source(hub, "train"),)
    test = (Source(hub, "validation"),)
    _INSTRUCTION = "Choose the ending that continues this text best."

    def read(self, row: Row, identity: str) -> Problem:
        endings = texts_of(row, "endings")
        label = str(row.get("label")).strip()
        if label not in map(str, range(len(endings))):
            raise ValueError(
                f"'label' is {row.get('label')!r}: expected the place of an ending, 0 to {len(endings) - 1}"
            )
        return _problem(identity, text_of(row, "ctx"), endings, int(label))


class ImbueCode(_Choices):
    """Imbue's code comprehension; rows have `question`, `choices` and `correct_answer`, one of them.

    The data set has one split. Its choices have no letters, and may not be in random order: they are shuffled, always
    in the same way for the same question.
    """

    kind = "imbue-code"
    hub = "imbue/code-comprehension"
    train = (Source(hub, "train"),)
    _INSTRUCTION = "Work out what this code does and choose the right option."

    def read(self, row: Row, identity: str) -> Problem:
        question = text_of(row, "question")
        options = list(dict.fromkeys(texts_of(row, "choices")))
        correct = text_of(row, "correct_answer").strip()
        if correct not in options or len(options) > len(ascii_uppercase):
            raise ValueError(
                f"'correct_answer' is {correct!r}: expected one of 'choices', at most 26 of them: {options}"
            )
        random.Random(hashlib.sha256(question.encode()).digest()).shuffle(options)
        return _problem(identity, question, options, options.index(correct))


class CoinFlip(RowsTask):
    """Whether a coin is still heads up; rows have `inputs`, "Q: A coin is heads up. ...", and `targets`, yes or no.

    The test side is its validation split, as in the paper.
    """

    kind = "coinflip"
    hub = "skrishna/coin_flip"
    train = (Source(hub, "train"),)
    test = (Source(hub, "validation"),)

    def read(self, row: Row, identity: str) -> Problem:
        question = text_of(row, "inputs").strip().removeprefix("Q:").strip()
        answer = text_of(row, "targets").strip().lower()
        if answer not in ("yes", "no"):
            raise ValueError(f"'targets' is {answer!r}: expected yes or no")
        return Problem(identity, normalised(question), question, answer)

    def prompt(self, question: str) -> str:
        return (
            "Answer this question with yes or no. Follow the coin step by step, and end with \\boxed{Yes} or "
            f"\\boxed{{No}}.\n\n{question}"
        )

    def extract(self, text: str, problem: Problem | None = None) -> str | None:
        return yes_or_no(text)

    def grade(self, text: str, problem: Problem) -> bool:
        return self.extract(text) == problem.answer
