"""Grading mathematical answers with math-verify, each under a time limit and none able to raise.

math-verify guards itself with an alarm signal, which works in the main thread alone and waits for a long operation in C
to end. Grading therefore runs in a worker process that is ended when it takes too long.
"""

from __future__ import annotations

import atexit
import json
import queue
import subprocess
import sys
import threading
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

TIME_LIMIT = 5.0
"""Seconds one answer may take to parse or compare; after that it counts as having no answer, or as wrong."""

_START_LIMIT = 120.0
"""Seconds the worker may take to import math-verify and sympy, on a cold or busy machine."""


class MathGrader:
    """Extracts and compares mathematical answers in a worker process, started when first used.

    Usable from one thread at a time. `timeouts` counts the answers that were given up.
    """

    def __init__(self, time_limit: float = TIME_LIMIT) -> None:
        if find_spec("math_verify") is None:
            raise ImportError("grading mathematics needs math-verify: pip install 'swift_kernels[cli]'")
        self.time_limit = time_limit
        self.timeouts = 0
        self._worker: subprocess.Popen[str] | None = None
        self._replies: queue.SimpleQueue[str] = queue.SimpleQueue()

    def extract(self, text: str) -> str | None:
        """The answer found in `text`, in a canonical form that equal answers mostly share, or None."""
        return self._ask({"text": text})

    def equal(self, text: str, reference: str) -> bool:
        """Whether the answer found in `text` equals `reference`, an answer in LaTeX or plain text.

        Units, bases and names of unknowns that only one of the two gives are taken as implied; if both give one, it
        must be the same. Tuples and intervals are ordered, lists and sets are not.
        """
        return bool(self._ask({"text": text, "reference": reference}))

    def close(self) -> None:
        """Ends the worker; the next question starts another."""
        if self._worker is not None:
            self._worker.kill()
            self._worker.wait()
            for pipe in (self._worker.stdin, self._worker.stdout):
                if pipe is not None:
                    with suppress(OSError):  # what was still to be written to a dead worker
                        pipe.close()
            self._worker = None
            atexit.unregister(self.close)

    def _ask(self, question: dict[str, str]) -> Any:
        # A worker may die between two questions (out of memory, killed by hand): one new one gets a chance.
        for _ in range(2):
            if self._worker is None and not self._start():
                raise RuntimeError(f"the grading process of {sys.executable}, {_WORKER_MODULE}, does not start")
            try:
                self._send(question)
                reply = self._replies.get(timeout=self.time_limit)
            except queue.Empty:
                self.timeouts += 1
                self.close()
                return None
            except OSError:
                reply = ""
            if reply:
                return json.loads(reply)
            self.close()
        return None

    def _start(self) -> bool:
        self._replies = queue.SimpleQueue()
        self._worker = subprocess.Popen(
            [sys.executable, "-c", _WORKER, str(Path(__file__).parents[1]), _WORKER_MODULE],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            encoding="utf-8",
            # Ctrl-C is for the program that grades; the worker ends with its input.
            start_new_session=True,
        )
        atexit.register(self.close)
        threading.Thread(target=_forward_lines, args=(self._worker.stdout, self._replies), daemon=True).start()
        try:
            return self._replies.get(timeout=_START_LIMIT) != ""
        except queue.Empty:
            return False

    def _send(self, question: dict[str, str]) -> None:
        assert self._worker is not None
        assert self._worker.stdin is not None
        self._worker.stdin.write(json.dumps(question) + "\n")
        self._worker.stdin.flush()


def _forward_lines(pipe: Any, replies: queue.SimpleQueue[str]) -> None:
    """Moves lines into a queue, whose `get` has a timeout; an empty string says that the pipe has ended."""
    try:
        for line in pipe:
            replies.put(line)
    except ValueError:  # closed by the other thread
        pass
    replies.put("")


# The package's own __init__ imports torch, which takes several times as long as all that grading needs.
_WORKER = """
import runpy, sys, types
package = types.ModuleType("swift_kernels")
package.__path__ = [sys.argv[1]]
sys.modules["swift_kernels"] = package
runpy.run_module(sys.argv[2], run_name="__main__")
"""
_WORKER_MODULE = "swift_kernels.evaluation.math_worker"
