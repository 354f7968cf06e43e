"""Grading mathematical answers with math-verify, each under a time limit and none able to raise.

math-verify guards itself with an alarm signal, which works in the main thread alone and waits for a long operation in C
to end. Grading therefore runs in a process of its own, which has no rights to do harm either.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from swift_kernels.evaluation.worker import TIME_LIMIT, Worker


class MathGrader(Worker):
    """Extracts and compares mathematical answers in a child process, started when first used; threads take turns.

    An answer that takes more than `time_limit` seconds to parse or compare counts as having no answer, or as wrong;
    `timeouts` counts these.
    """

    def __init__(self, time_limit: float = TIME_LIMIT) -> None:
        if find_spec("math_verify") is None:
            raise ImportError("grading mathematics needs math-verify: pip install 'swift_kernels[cli]'")
        super().__init__(Path(__file__).with_name("math_worker.py"), time_limit)

    def extract(self, text: str) -> str | None:
        """The answer found in `text`, in a canonical form that equal answers mostly share, or None."""
        found = self.ask({"text": text})
        # The process may have been taken over: whatever it says that is no text is none.
        return found if isinstance(found, str) else None

    def equal(self, text: str, reference: str) -> bool:
        """Whether the answer found in `text` equals `reference`, an answer in LaTeX or plain text.

        Units, bases and names of unknowns that only one of the two gives are taken as implied; if both give one, it
        must be the same. Tuples and intervals are ordered, lists and sets are not.
        """
        return self.ask({"text": text, "reference": reference}) is True
