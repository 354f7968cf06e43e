"""A child process that answers questions, each under a time limit: the parent's side and the child's.

What evaluates an answer may stay busy for ever, as with 9**9**9**9, in one operation in C that no signal interrupts.
A process can be ended whatever it does, and from any thread.

The child imports what takes seconds and answers nothing itself: it forks a server, which gives up its rights and then
talks with the parent directly. After anything out of the ordinary (an exception, its death, a time limit) the server is
replaced by a new fork, so that what an answer left behind in a process never meets another answer.
"""

from __future__ import annotations

import base64
import gc
import json
import logging
import mmap
import os
import pickle
import queue
import secrets
import select
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

from swift_kernels.evaluation import sandbox

TIME_LIMIT = 5.0
"""Seconds that one question may take; after that it is given up."""

START_LIMIT = 120.0
"""Seconds the child may take to import its libraries, on a cold or busy machine."""

GRACE = 2.0
"""Seconds after its limit at which the whole child is ended, where a question did not end its server."""

LONGEST_REPLY = 2**26
"""Bytes; a server that says more is no longer ours."""

_LOG = logging.getLogger(__name__)

_READY = b"ready "
_TOKEN = 16
_STARTING, _NOTHING = b"starting".ljust(_TOKEN), b" " * _TOKEN
_LATE, _DIED, _REFUSED = b"late", b"died", b"refused"

_ENVIRONMENT = ("PATH", "HOME", "LANG", "LANGUAGE", "TZ", "TMPDIR", "TEMP", "TMP", "SYSTEMROOT", "LD_LIBRARY_PATH")
"""What the child inherits, with LC_* and PYTHON*: keys and tokens are others' names."""

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


_WORKERS: weakref.WeakSet[Worker] = weakref.WeakSet()


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
        self._questions: queue.SimpleQueue[tuple[bytes, bytes] | None] = queue.SimpleQueue()
        self._replies: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        _WORKERS.add(self)

    def forget(self) -> None:
        """In a fork of this process: the child answers the one that started it, and starts anew here."""
        if self._process is not None:
            self._finish.detach()
            self._process.returncode = 0  # it is not waited for here
            self._process = None
        self._lock = threading.Lock()

    def ask(self, question: Any) -> Any:
        """The reply to a question that can be pickled; None if it takes too long, or the child fails at it."""
        limit, content = float(self.time_limit), base64.b64encode(pickle.dumps(question))
        with self._lock:
            # A child may die between two questions (out of memory, killed by hand): one new one gets a chance.
            for _ in range(2):
                if self._process is None:
                    self._start()
                # Nobody who has not read the question can reply to it.
                token = secrets.token_hex(8).encode()
                reply = self._exchange(token, b"%b %r %b\n" % (token, limit, content), limit + GRACE)
                if reply is None or reply.strip() == _LATE:
                    self.timeouts += 1
                    return None
                if reply.strip() == _REFUSED:
                    _LOG.warning("a grader was ended for something it may not do; the answer counts as wrong")
                if reply:
                    return _decoded(reply)
        return None

    def close(self) -> None:
        """Ends the child; the next question starts another."""
        with self._lock:
            self._end()

    def _start(self) -> None:
        # The server leaves the current folder.
        path = [os.path.abspath(entry) if os.path.exists(entry or ".") else entry for entry in sys.path]
        environment = {
            name: value
            for name, value in os.environ.items()
            if name in _ENVIRONMENT or name.startswith(("LC_", "PYTHON", "DYLD_"))
        }
        # A fork has one thread, and the servers take turns: more would only wait.
        threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        self._process = subprocess.Popen(
            [sys.executable, "-c", _BOOTSTRAP, str(Path(__file__).parents[1]), str(self._script), *path],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment | threads,
            # Ctrl-C is for the program that asks; the child ends with its input.
            start_new_session=True,
        )
        self._questions, self._replies = queue.SimpleQueue(), queue.SimpleQueue()
        self._finish = weakref.finalize(self, _finish, self._process, self._questions)
        threading.Thread(target=_converse, args=(self._process, self._questions, self._replies), daemon=True).start()
        # What Python itself runs at its start may print, before `serve` can prevent it.
        while not (line := self._exchange(b"", b"", START_LIMIT) or b"").startswith(_READY):
            if not line:
                raise WorkerError(f"the process {sys.executable} {self._script} does not start")
        _tell_missing(tuple(json.loads(line.removeprefix(_READY))))

    def _exchange(self, token: bytes, question: bytes, limit: float) -> bytes | None:
        """What the child says to a question, empty if it died, None if it was late; without a word it is ended."""
        reply = None
        try:
            self._questions.put((token, question))
            reply = self._replies.get(timeout=limit)
        except queue.Empty:
            pass
        finally:
            if not reply:
                # Also when interrupted: what it still replies must not be taken for the reply to the next question.
                self._end()
        return reply

    def _end(self) -> None:
        if self._process is not None:
            self._finish()
            self._process = None


def _forget_all() -> None:
    for worker in list(_WORKERS):
        worker.forget()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_all)


def _converse(
    process: subprocess.Popen[bytes],
    questions: queue.SimpleQueue[tuple[bytes, bytes] | None],
    replies: queue.SimpleQueue[bytes],
) -> None:
    """Writes questions and reads replies, in a thread: a queue can be waited for with a limit, a pipe cannot."""
    assert process.stdin is not None
    assert process.stdout is not None
    while (one := questions.get()) is not None:
        token, question = one
        line = b""
        with suppress(OSError):  # it died before it had read the question
            process.stdin.write(question)
            process.stdin.flush()
            # What an earlier question left in the pipe has another token.
            while (line := process.stdout.readline(LONGEST_REPLY)).endswith(b"\n") and not line.startswith(token):
                pass
        replies.put(line[len(token) :] if line.endswith(b"\n") else b"")
    process.stdout.close()
    with suppress(OSError):  # what was still to be written
        process.stdin.close()


def _finish(process: subprocess.Popen[bytes], questions: queue.SimpleQueue[tuple[bytes, bytes] | None]) -> None:
    # Its server too; once it was waited for, its number may be another group's.
    if process.returncode is None and hasattr(os, "killpg"):
        with suppress(OSError):
            os.killpg(process.pid, signal.SIGKILL)
    process.kill()
    process.wait()
    questions.put(None)


def _decoded(reply: bytes) -> Any:
    """What a server says, which may have been taken over: anything."""
    with suppress(ValueError, RecursionError):
        return json.loads(reply)
    return None


@cache
def _tell_missing(missing: tuple[str, ...]) -> None:
    if missing:
        _LOG.warning("this system offers no means to keep graders from %s", "; from ".join(missing))


def serve(answer: Callable[[Any], Any], prepare: Callable[[], object]) -> None:
    """The child's side: replies to each question with its answer as JSON, or null where that fails.

    `prepare` imports what takes long: the parent waits for it once, not in its first question.
    """
    questions, replies = os.dup(0), os.dup(1)
    # Whatever a library, or an answer that it evaluates, reads or prints is no question and no reply.
    nothing = os.open(os.devnull, os.O_RDWR)
    os.dup2(nothing, 0)
    os.dup2(nothing, 1)
    prepare()
    logging.disable(logging.CRITICAL)
    os.write(replies, b"\n")
    if not hasattr(os, "fork"):
        # The process ends after anything out of the ordinary, and the parent starts another, which takes seconds.
        _serve(answer, questions, replies, bytearray(_TOKEN), sandbox.path_rules(), first=True)
        return
    # A fork shares what the collector does not touch.
    gc.collect()
    gc.freeze()
    rules = sandbox.path_rules()
    asked, first = mmap.mmap(-1, _TOKEN), True  # shared: the question that a server is at, or that it has yet to start
    while True:
        asked[:] = _STARTING
        server = os.fork()
        if not server:
            with suppress(BaseException):
                _serve(answer, questions, replies, asked, rules, first)
            os._exit(0)
        status = os.waitpid(server, 0)[1]
        first = False
        if asked[:] == _STARTING or _hung_up(questions):
            return
        if asked[:] != _NOTHING:
            verdicts: dict[int, bytes] = {signal.SIGALRM: _LATE, signal.SIGSYS: _REFUSED}
            verdict = verdicts.get(os.WTERMSIG(status), _DIED) if os.WIFSIGNALED(status) else _DIED
            os.write(replies, b"\n%b %b\n" % (asked[:], verdict))


def _serve(
    answer: Callable[[Any], Any],
    questions: int,
    replies: int,
    asked: mmap.mmap | bytearray,
    rules: int | None,
    first: bool,
) -> None:
    """Answers questions until the first out of the ordinary, without rights."""
    missing = sandbox.enter((questions, replies), rules)
    sys.dont_write_bytecode = True
    if hasattr(signal, "setitimer"):
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGALRM})
    with os.fdopen(questions, "rb") as lines, os.fdopen(replies, "wb") as said:
        if first:
            said.write(_READY + json.dumps(missing).encode() + b"\n")
            said.flush()
        asked[:] = _NOTHING
        for line in lines:
            asked[:], limit, content = line.split(b" ")
            reply, usual = "null", False
            _set_alarm(float(limit))
            # An answer may be anything, exit() too.
            with suppress(Exception, SystemExit):
                reply = json.dumps(answer(pickle.loads(base64.b64decode(content))), ensure_ascii=False)
                usual = True
            _set_alarm(0)
            # On a line of its own, whatever else was written before an exception. Escapes would make one character of
            # two surrogates.
            begin = b"" if usual else b"\n"
            said.write(b"%b%b %b\n" % (begin, bytes(asked[:]), reply.encode("utf-8", "surrogatepass")))
            said.flush()
            asked[:] = _NOTHING
            if not usual or time.process_time() > sandbox.CPU / 2:
                return


def _hung_up(pipe: int) -> bool:
    """Whether nobody can write to a pipe any more; nothing is read from it."""
    waiting = select.poll()
    waiting.register(pipe, 0)
    return any(event & (select.POLLHUP | select.POLLERR) for _, event in waiting.poll(0))


def _set_alarm(seconds: float) -> None:
    """Ends this process after so many seconds; 0 takes that back.

    The signal's default action needs no Python, so that it interrupts an operation in C too.
    """
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_REAL, min(seconds, 1e6))
