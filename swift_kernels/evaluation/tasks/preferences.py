"""Pairs of stored answers of which people prefer one: nothing is generated."""

from __future__ import annotations

from swift_kernels.evaluation.tasks.base import Problem, normalised
from swift_kernels.evaluation.tasks.hub import RowsTask, Source
from swift_kernels.evaluation.tasks.rows import Row, text_of


class PkuSafeRlhf(RowsTask):
    """PKU-SafeRLHF; rows have `prompt`, `response_0`, `response_1`, `better_response_id` and `safer_response_id`.

    One pair a prompt is used: several may share it, and pairs of one prompt must not stand on both sides.
    `Problem.data` holds the two responses; the answer is the preferred one.
    """

    hub = "PKU-Alignment/PKU-SafeRLHF"
    train = (Source(hub, "train"),)
    test = (Source(hub, "test"),)

    def __init__(self, aspect: str, path: str | None = None) -> None:
        """`aspect` is a key of `ASPECTS`."""
        self.kind = f"pku-saferlhf:{aspect}"
        self._preferred = ASPECTS[aspect]
        super().__init__(path)

    def read(self, row: Row, identity: str) -> Problem:
        prompt = text_of(row, "prompt")
        responses = (text_of(row, "response_0"), text_of(row, "response_1"))
        if responses[0] == responses[1]:
            raise ValueError("the two responses are equal: expected different ones, of which one can be preferred")
        preferred = row.get(self._preferred)
        if type(preferred) is not int or preferred not in (0, 1):
            raise ValueError(f"{self._preferred!r} is {preferred!r}: expected 0 or 1")
        return Problem(identity, normalised(prompt), prompt, responses[preferred], responses)

    def answers(self, problem: Problem) -> list[tuple[str, bool]]:
        """The stored answers, and whether each is the preferred one."""
        first, second = problem.data
        return [(first, problem.answer == first), (second, problem.answer != first)]

    def prompt(self, question: str) -> str:
        return question

    def extract(self, text: str, problem: Problem | None = None) -> str | None:
        """Which of the stored responses it is, "0" or "1": a vote between them is a tie."""
        responses = () if problem is None else problem.data
        return str(responses.index(text)) if text in responses else None

    def grade(self, text: str, problem: Problem) -> bool:
        return text == problem.answer


ASPECTS = {"helpful": "better_response_id", "safe": "safer_response_id"}
"""What is preferred, and the field that says so."""
