"""Mathematics, graded by math-verify: MATH, GSM8K, and any JSONL file of problems and answers."""

from __future__ import annotations

from swift_kernels.evaluation.graders import MathGrader
from swift_kernels.evaluation.math_answers import boxed
from swift_kernels.evaluation.tasks.base import Problem, normalised
from swift_kernels.evaluation.tasks.hub import RowsTask, Source
from swift_kernels.evaluation.tasks.rows import Row, text_of


class _Mathematics(RowsTask):
    # The instruction of the authors' experiments on MATH.
    _INSTRUCTION = (
        "Solve the following math problem step-by-step.\n"
        "Simplify your answer as much as possible. Present your final answer as \\boxed{Your Answer}.\n"
    )

    def __init__(self, path: str | None = None) -> None:
        super().__init__(path)
        self._grader = MathGrader()

    def prompt(self, question: str) -> str:
        return self._INSTRUCTION + question

    def extract(self, text: str, problem: Problem | None = None) -> str | None:
        return self._grader.extract(text)

    def grade(self, text: str, problem: Problem) -> bool:
        return self._grader.equal(text, problem.answer)


class Math(_Mathematics):
    """MATH: trained on its own training problems, tested on MATH-500.

    Rows have `problem`, and `answer` or a `solution` with a box.
    """

    kind = "math"
    hub = "EleutherAI/hendrycks_math"
    _SUBJECTS = (
        "algebra",
        "counting_and_probability",
        "geometry",
        "intermediate_algebra",
        "number_theory",
        "prealgebra",
        "precalculus",
    )
    train = tuple(Source("EleutherAI/hendrycks_math", "train", subject) for subject in _SUBJECTS)
    test = (Source("HuggingFaceH4/MATH-500", "test"),)

    def read(self, row: Row, identity: str) -> Problem:
        question = text_of(row, "problem")
        answer = text_of(row, "answer") if "answer" in row else boxed(text_of(row, "solution"))
        if not answer:
            raise ValueError("no 'answer', and nothing in \\boxed{} in 'solution'")
        return Problem(identity, normalised(question), question, answer)


class Gsm8k(_Mathematics):
    """GSM8K; rows have `question`, and an `answer` that ends in `#### 18`."""

    kind = "gsm8k"
    hub = "openai/gsm8k"
    train = (Source(hub, "train", "main"),)
    test = (Source(hub, "test", "main"),)

    def read(self, row: Row, identity: str) -> Problem:
        question = text_of(row, "question")
        _, mark, answer = text_of(row, "answer").rpartition("####")
        if not mark or not answer.strip():
            raise ValueError("no '####' with a number after it in 'answer'")
        # Between thousands, where it might be taken for a list.
        return Problem(identity, normalised(question), question, answer.strip().replace(",", ""))


class JsonlTask(_Mathematics):
    """Problems of a JSONL file (`problem` or `question`, and `answer`).

    Of an answer in GSM8K's form, what follows `####` counts, and of one with a box its content. `id` or
    `unique_id` are used where present.
    """

    kind = "jsonl"

    def __init__(self, path: str) -> None:
        super().__init__(path)

    def read(self, row: Row, identity: str) -> Problem:
        question = text_of(row, "problem", "question")
        text = text_of(row, "answer")
        answer = boxed(text) or text.rpartition("####")[2].strip()
        if not answer:
            raise ValueError("nothing after '####' in 'answer'")
        if answer.casefold() == "nan":
            raise ValueError(f"'answer' is {answer}: expected a number or text")
        return Problem(identity, normalised(question), question, answer)

    def identity(self, row: Row, line: str) -> str:
        return str(row.get("unique_id", row.get("id", line)))
