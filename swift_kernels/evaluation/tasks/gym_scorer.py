"""The scorers of reasoning-gym in a process of their own, under a time limit.

They evaluate what a model wrote: "9**9**9**9" as an answer keeps some of them busy for ever, in one operation that no
signal interrupts. A process can be ended whatever it does, and from any thread.
"""

from __future__ import annotations

import atexit
import json
import pickle
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

TIME_LIMIT = 5.0
"""Seconds that scoring one answer may take; after that the answer counts as wrong."""

_START_LIMIT = 120.0
"""Seconds the worker may take to import reasoning-gym, on a cold or busy machine."""

_WORKER = Path(__file__).with_name("gym_worker.py")
"""Run as a file: as a module it would import torch with the package, which takes as long again."""


class Scorer:
    """Scores answers in a worker process, started when first used; threads take turns.

    `timeouts` counts the answers that were given up.
    """

    def __init__(self, time_limit: float = TIME_LIMIT) -> None:
        self.time_limit = time_limit
        self.timeouts = 0
        self._worker: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()

    def score(self, dataset: str, config: dict[str, Any], answer: str, entry: Any) -> float:
        """The score of an answer to `entry`, a problem of this dataset; 0 where the scorer fails or takes too long."""
        question = pickle.dumps((dataset, config, answer, entry))
        with self._lock:
            # A worker may die between two questions (out of memory, killed by hand): one new one gets a chance.
            for _ in range(2):
                worker = self._worker or self._start()
                reply, in_time = _ask(worker, question, self.time_limit)
                if reply:
                    return float(json.loads(reply))
                self._end()
                if not in_time:
                    self.timeouts += 1
                    break
        return 0.0

    def close(self) -> None:
        """Ends the worker; the next question starts another."""
        with self._lock:
            self._end()

    def _start(self) -> subprocess.Popen[bytes]:
        self._worker = subprocess.Popen(
            [sys.executable, str(_WORKER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            # Ctrl-C is for the program that grades; the worker ends with its input.
            start_new_session=True,
        )
        atexit.register(self._end)
        if not _ask(self._worker, b"", _START_LIMIT)[0]:
            self._end()
            raise RuntimeError(f"the scoring process {sys.executable} {_WORKER} does not start")
        return self._worker

    def _end(self) -> None:
        if self._worker is not None:
            self._worker.kill()
            self._worker.wait()
            for pipe in (self._worker.stdin, self._worker.stdout):
                if pipe is not None:
                    with suppress(OSError):  # what was still to be written to a dead worker
                        pipe.close()
            self._worker = None
            atexit.unregister(self._end)


def _ask(worker: subprocess.Popen[bytes], question: bytes, limit: float) -> tuple[bytes, bool]:
    """The worker's next line, empty where it has ended, and whether it came in time; a late worker is ended."""
    assert worker.stdin is not None
    assert worker.stdout is not None
    late = threading.Event()

    def end() -> None:
        late.set()
        worker.kill()

    timer = threading.Timer(limit, end)
    timer.daemon = True
    timer.start()
    try:
        worker.stdin.write(question)
        worker.stdin.flush()
        return worker.stdout.readline(), not late.is_set()
    except OSError:  # it ended before it had read the question
        return b"", not late.is_set()
    finally:
        timer.cancel()


SCORER = Scorer()
"""Of all tasks in this process: a worker takes seconds to start."""
