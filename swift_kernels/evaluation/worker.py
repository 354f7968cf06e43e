"""A child process that answers questions, each under a time limit: the parent's side and the child's.

What evaluates an answer may stay busy for ever, as with 9**9**9**9, in one operation in C that no signal interrupts.
A process can be ended whatever it does, and from any thread.
"""

from __future__ import annotations

import base64
import json
import logging
import os
import pickle
import queue
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

TIME_LIMIT = 5.0
"""Seconds that one question may take; after that it is given up."""

START_LIMIT = 120.0
"""Seconds the child may take to import its libraries, on a cold or busy machine."""

MEMORY = 4 * 2**30
"""Bytes of address space that a question may take; beyond them it fails."""

GRACE = 2.0
"""Seconds after its limit at which a question ends the child by itself, for want of a parent that does."""

_READY = b"ready\n"

# The package's own __init__ imports torch, which takes several times as long as all that a child needs. The path is the
# parent's, without the current folder that -c adds: a file there may have the name of a module.
_BOOTSTRAP = """
import sys
_, package_path, script, *sys.path[:] = sys.argv
import runpy, types
package = types.ModuleType("swift_kernels")
package.__path__ = [package_path]
sys.modules["swift_kernels"] = package
runpy.run_path(script, run_name="__main__")
"""


class WorkerError(RuntimeError):
    """The process cannot be started: not the fault of any answer, and every other question would fail too."""


class Worker:
    """Answers questions in a child process that runs `script`, started when first used; threads take turns.

    The script calls `serve`. `timeouts` counts the questions that were given up.
    """

    def __init__(self, script: Path, time_limit: float = TIME_LIMIT) -> None:
        self.time_limit = time_limit
        self.timeouts = 0
        self._script = script
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._questions: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._replies: queue.SimpleQueue[bytes] = queue.SimpleQueue()

    def ask(self, question: Any) -> Any:
        """The reply to a question that can be pickled; None if it takes too long, or the child fails at it."""
        line = b"%r %b\n" % (float(self.time_limit), base64.b64encode(pickle.dumps(question)))
        with self._lock:
            # A child may die between two questions (out of memory, killed by hand): one new one gets a chance.
            for _ in range(2):
                if self._process is None:
                    self._start()
                reply = self._exchange(line, self.time_limit)
                if reply:
                    return json.loads(reply)
                if reply is None:
                    self.timeouts += 1
                    break
        return None

    def close(self) -> None:
        """Ends the child; the next question starts another."""
        with self._lock:
            self._end()

    def _start(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", _BOOTSTRAP, str(Path(__file__).parents[1]), str(self._script), *map(str, sys.path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            # Ctrl-C is for the program that asks; the child ends with its input.
            start_new_session=True,
        )
        self._questions, self._replies = queue.SimpleQueue(), queue.SimpleQueue()
        self._finish = weakref.finalize(self, _finish, self._process, self._questions)
        threading.Thread(target=_converse, args=(self._process, self._questions, self._replies), daemon=True).start()
        # What Python itself runs at its start may print, before `serve` can prevent it.
        while (line := self._exchange(b"", START_LIMIT)) != _READY:
            if not line:
                raise WorkerError(f"the process {sys.executable} {self._script} does not start")

    def _exchange(self, question: bytes, limit: float) -> bytes | None:
        """The child's next line, empty if it died, None if it was late; without one it is ended."""
        line = None
        try:
            self._questions.put(question)
            line = self._replies.get(timeout=limit)
        except queue.Empty:
            pass
        finally:
            if not line:
                # Also when interrupted: what it still replies must not be taken for the reply to the next question.
                self._end()
        return line

    def _end(self) -> None:
        if self._process is not None:
            self._finish()
            self._process = None


def _converse(
    process: subprocess.Popen[bytes], questions: queue.SimpleQueue[bytes | None], replies: queue.SimpleQueue[bytes]
) -> None:
    """Writes questions and reads replies, in a thread: a queue can be waited for with a limit, a pipe cannot."""
    assert process.stdin is not None
    assert process.stdout is not None
    while (question := questions.get()) is not None:
        line = b""
        with suppress(OSError):  # it died before it had read the question
            process.stdin.write(question)
            process.stdin.flush()
            line = process.stdout.readline()
        replies.put(line if line.endswith(b"\n") else b"")
    process.stdout.close()
    with suppress(OSError):  # what was still to be written
        process.stdin.close()


def _finish(process: subprocess.Popen[bytes], questions: queue.SimpleQueue[bytes | None]) -> None:
    process.kill()
    process.wait()
    questions.put(None)


def serve(answer: Callable[[Any], Any], prepare: Callable[[], object]) -> None:
    """The child's side: replies to each question with its answer as JSON, or null where that fails.

    `prepare` imports what takes long: the parent waits for it once, not in its first question.
    """
    questions, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    # Whatever a library, or an answer that it evaluates, reads or prints is no question and no reply.
    nothing = os.open(os.devnull, os.O_RDWR)
    os.dup2(nothing, 0)
    os.dup2(nothing, 1)
    prepare()
    _limit_memory()
    logging.disable(logging.CRITICAL)
    replies.write(b"\n" + _READY)
    replies.flush()
    for line in questions:
        limit, _, question = line.partition(b" ")
        _set_alarm(float(limit) + GRACE)
        try:
            reply = json.dumps(answer(pickle.loads(base64.b64decode(question))), ensure_ascii=False)
        except (Exception, SystemExit):  # an answer may be anything, exit() too
            reply = "null"
        _set_alarm(0)
        # Escapes would make one character of two surrogates.
        replies.write(reply.encode("utf-8", "surrogatepass") + b"\n")
        replies.flush()


def _set_alarm(seconds: float) -> None:
    """Ends this process after so many seconds; 0 takes that back.

    A parent that is killed cannot end its child, which would compute for ever. The signal's default action needs no
    Python, so that it interrupts an operation in C too.
    """
    if hasattr(signal, "setitimer"):
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_REAL, min(seconds, 1e6))


def _limit_memory() -> None:
    with suppress(ImportError, OSError, ValueError):
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, resource.getrlimit(resource.RLIMIT_AS)[1]))
