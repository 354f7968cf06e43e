"""The child process behind the graders: one that does as it is told, and those that grade."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from swift_kernels.evaluation.worker import Worker, WorkerError

CHILD = Path(__file__).with_name("odd_child.py")
LIMIT = 60.0
"""Seconds for a question that is answered, on a busy machine too."""


def plain() -> tuple[Worker, Callable[[str], bool]]:
    worker = Worker(CHILD, LIMIT)
    return worker, lambda answer: bool(worker.ask({"right": "yes", "hangs": "hang"}[answer]))


def mathematics() -> tuple[Worker, Callable[[str], bool]]:
    pytest.importorskip("math_verify")
    from swift_kernels.evaluation.graders import MathGrader

    grader = MathGrader(LIMIT)
    return grader, lambda answer: grader.equal({"right": "\\boxed{5}", "hangs": "\\boxed{100000000!}"}[answer], "5")


def gym() -> tuple[Worker, Callable[[str], bool]]:
    reasoning_gym = pytest.importorskip("reasoning_gym")
    from swift_kernels.evaluation.tasks.gym_scorer import Scorer

    scorer = Scorer(LIMIT)
    entry = reasoning_gym.create_dataset("simple_integration", size=1, seed=0)[0]
    hard = {**entry, "metadata": {**entry["metadata"], "integrand": "9**9**9**9"}}
    entries = {"right": entry, "hangs": hard}
    return scorer, lambda answer: scorer.score("simple_integration", {}, entry["answer"], entries[answer]) == 1.0


@pytest.fixture(scope="module", params=[plain, mathematics, gym])
def any_worker(request: pytest.FixtureRequest) -> Iterator[tuple[Worker, Callable[[str], bool]]]:
    worker, is_right = request.param()
    yield worker, is_right
    worker.close()


@pytest.fixture(scope="module")
def worker() -> Iterator[Worker]:
    made = Worker(CHILD, LIMIT)
    yield made
    made.close()


class TestAny:
    def test_one_that_died_is_replaced(self, any_worker: tuple[Worker, Callable[[str], bool]]) -> None:
        worker, is_right = any_worker
        assert is_right("right")
        process = worker._process
        assert process is not None
        process.kill()
        process.wait()
        assert is_right("right")
        assert worker._process is not process
        assert worker.timeouts == 0

    def test_a_question_that_hangs_is_given_up_and_the_next_is_answered(
        self, any_worker: tuple[Worker, Callable[[str], bool]], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        worker, is_right = any_worker
        assert is_right("right")
        process, begin = worker._process, time.monotonic()
        with monkeypatch.context() as patch:
            patch.setattr(worker, "time_limit", 0.3)
            assert not is_right("hangs")
        assert time.monotonic() - begin < LIMIT
        assert worker.timeouts == 1
        assert is_right("right")
        assert worker.timeouts == 1
        assert worker._process is process, "what it imported is kept"


@pytest.mark.parametrize(
    "question",
    [
        *("", "\ud800", "\ud83d\ude00", "\x00", "a\nb\r\n", "x" * 2**20, "\U0001f600" * 2**20),
        *(0, [1, {"a": None}], {"k": 0.1}, True, None, float("inf")),
    ],
    ids=[
        *("empty", "surrogate", "two surrogates", "null", "lines", "long", "long and wide"),
        *("zero", "nested", "float", "true", "none", "infinity"),
    ],
)
def test_questions_and_replies_arrive_as_they_are(worker: Worker, question: Any) -> None:
    assert worker.ask(question) == question


@pytest.mark.parametrize("question", ["raise", "exit", "a set"])
def test_a_failure_is_none_and_costs_no_process(worker: Worker, question: str) -> None:
    worker.ask("first")
    process = worker._process
    assert worker.ask(question) is None
    assert worker.ask("next") == "next"
    assert (worker._process, worker.timeouts) == (process, 0)


def test_what_is_printed_or_read_is_no_reply_and_no_question(worker: Worker) -> None:
    assert worker.ask("print") == "print"
    assert worker.ask("read") == ["", ""]
    assert worker.ask("next") == "next"


class Unreadable:
    def __reduce__(self) -> tuple[Any, ...]:
        return int, ("no number",)


def test_a_question_that_the_child_cannot_read_is_a_failure(worker: Worker) -> None:
    assert worker.ask(Unreadable()) is None
    assert worker.ask("next") == "next"


def test_the_child_has_the_path_of_the_parent_and_no_torch(worker: Worker) -> None:
    assert worker.ask("path") == sys.path
    modules = worker.ask("modules")
    assert "swift_kernels.evaluation.worker" in modules
    assert "torch" not in modules


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere address space may not be limited")
def test_memory_is_limited(worker: Worker) -> None:
    assert worker.ask("memory") is None
    assert worker.ask("next") == "next"


_PARENT = """
import sys
from pathlib import Path
from swift_kernels.evaluation.worker import Worker
worker = Worker(Path(sys.argv[1]), 1.0)
print(*worker.ask("processes"), flush=True)
worker.ask("hang")
"""


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="needs POSIX timers")
def test_a_child_whose_parent_is_killed_ends() -> None:
    with subprocess.Popen([sys.executable, "-c", _PARENT, str(CHILD)], stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        children = [int(process) for process in parent.stdout.readline().split()]
        time.sleep(0.3)
        parent.kill()
    assert len(set(children)) == 2
    end = time.monotonic() + 60
    while time.monotonic() < end and any(map(_runs, children)):
        time.sleep(0.1)
    assert not any(map(_runs, children))


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    # Ended, but not yet waited for by whoever inherited it.
    stat = Path(f"/proc/{process}/stat")
    return not (stat.exists() and stat.read_text().rpartition(")")[2].split()[0] == "Z")


def test_a_question_it_dies_of_is_a_failure_and_costs_no_new_start(worker: Worker) -> None:
    worker.ask("first")
    process, late = worker._process, worker.timeouts
    assert worker.ask("die") is None
    assert worker.ask("next") == "next"
    assert (worker._process, worker.timeouts) == (process, late)


@pytest.fixture
def unforked(monkeypatch: pytest.MonkeyPatch) -> Iterator[Worker]:
    """A child of a system that cannot fork."""
    monkeypatch.setenv("PYTHON_ODD_CHILD", "unforked")
    worker = Worker(CHILD, LIMIT)
    yield worker
    worker.close()


class TestWithoutFork:
    @pytest.mark.parametrize("question", ["raise", "exit", "a set"])
    def test_a_failure_is_none_and_the_next_is_answered_by_another(self, unforked: Worker, question: str) -> None:
        one = unforked.ask("processes")
        assert unforked.ask("next") == "next"
        assert unforked.ask("processes") == one
        assert unforked.ask(question) is None
        assert unforked.ask("next") == "next"
        assert unforked.ask("processes") != one
        assert unforked.timeouts == 0

    def test_a_question_it_dies_of_is_asked_twice(self, unforked: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
        started: list[Any] = []
        start = unforked._start

        def start_and_note() -> None:
            start()
            started.append(unforked._process)

        monkeypatch.setattr(unforked, "_start", start_and_note)
        assert unforked.ask("die") is None
        assert len(started) == 2
        assert all(process.poll() is not None for process in started)
        assert unforked.timeouts == 0
        assert unforked.ask("next") == "next"


@pytest.mark.parametrize(
    ("script", "limit"),
    [("", LIMIT), ("import nowhere", LIMIT), ("import time; print('slow', flush=True); time.sleep(60)", 0.3)],
    ids=["ends", "raises", "takes too long"],
)
def test_one_that_does_not_start_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, limit: float
) -> None:
    monkeypatch.setattr("swift_kernels.evaluation.worker.START_LIMIT", limit)
    (tmp_path / "child.py").write_text(script)
    worker = Worker(tmp_path / "child.py")
    for _ in range(2):
        with pytest.raises(WorkerError, match=r"child\.py does not start"):
            worker.ask("right")
        assert worker._process is None
    assert worker.timeouts == 0


def test_threads_take_turns(worker: Worker) -> None:
    replies: dict[int, Any] = {}

    def ask(start: int) -> None:
        for number in range(start, 200, 4):
            replies[number] = worker.ask(number)

    threads = [threading.Thread(target=ask, args=(start,)) for start in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert replies == {number: number for number in range(200)}


def test_an_interrupted_question_does_not_answer_the_next() -> None:
    worker = Worker(CHILD, LIMIT)
    assert worker.ask("first") == "first"
    timer = threading.Timer(0.2, signal.pthread_kill, (threading.main_thread().ident, signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        worker.ask("hang")
    assert worker._process is None
    assert worker.ask("next") == "next"
    worker.close()


@pytest.mark.parametrize("by_hand", [True, False], ids=["closed", "forgotten"])
def test_its_process_ends_with_it(by_hand: bool) -> None:
    worker = Worker(CHILD, LIMIT)
    worker.close()
    assert worker.ask("first") == "first"
    process = worker._process
    assert process is not None
    if by_hand:
        worker.close()
        worker.close()
        assert worker._process is None
    else:
        del worker
        gc.collect()
    assert process.poll() is not None


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.parametrize("busy", [False, True], ids=["at rest", "while another thread asks"])
def test_a_fork_of_the_program_has_a_child_of_its_own(worker: Worker, busy: bool) -> None:
    """As `multiprocessing` makes them: it has the parent's pipes and lock, but not the thread that talks."""
    assert worker.ask("first") == "first"
    served = worker._process
    assert served is not None
    if busy:
        worker._lock.acquire()
    forked = os.fork()
    if not forked:
        signal.alarm(int(LIMIT))  # instead of waiting for ever
        right = False
        try:
            right = worker.ask("forked") == "forked"
            worker.close()
        finally:
            os._exit(0 if right else 1)
    if busy:
        worker._lock.release()
    assert os.waitstatus_to_exitcode(os.waitpid(forked, 0)[1]) == 0
    assert served.poll() is None
    assert worker.ask("second") == "second"
    assert worker._process is served
    assert worker.timeouts == 0
