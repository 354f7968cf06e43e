"""What a process that evaluates answers may do, where the grammars that guard it have been passed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

from swift_kernels.evaluation import sandbox
from swift_kernels.evaluation.worker import Worker

HERE = Path(__file__).parent
LIMIT = 60.0

_MISSING = """
import json
from swift_kernels.evaluation import sandbox
print(json.dumps(sandbox.enter(rules=sandbox.path_rules())))
"""

HARM = {
    "writes a new file": "open(folder + '/new', 'w').write('x')",
    "appends to a file": "open(folder + '/kept', 'a').write('x')",
    "opens a file to write without Python's open": "import os; os.open(folder + '/kept', os.O_RDWR)",
    "creates a file by a bare call": "import os; os.open(folder + '/new', os.O_RDONLY | os.O_CREAT)",
    "empties a file": "import os; os.truncate(folder + '/kept', 0)",
    "deletes a file": "import os; os.unlink(folder + '/kept')",
    "renames a file": "import os; os.rename(folder + '/kept', folder + '/new')",
    "makes a folder": "import os; os.mkdir(folder + '/new')",
    "makes a link": "import os; os.symlink('/', folder + '/new')",
    "changes a file's mode": "import os; os.chmod(folder + '/kept', 0o777)",
    "dates a file back": "import os; os.utime(folder + '/kept', (0, 0))",
    "forks": "import os; os.fork() or os._exit(0)",
    "runs a shell": "import os; assert os.system('true') == 0",
    "runs a program": "import subprocess; subprocess.run(['true'], check=True)",
    "becomes a program": "import os; os.execv('/bin/true', ['true'])",
    "spawns a program": "import os; os.posix_spawn('/bin/true', ['true'], {})",
    "starts a thread": "import threading; threading.Thread(target=int).start()",
    "opens a socket": "import socket; socket.socket()",
    "opens a datagram socket": "import socket; socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)",
    "signals its parent": "import os; os.kill(os.getppid(), 0)",
    "signals a process by a handle": "import os; os.pidfd_open(os.getppid())",
    "is signalled for a file": "import fcntl, os; fcntl.fcntl(0, fcntl.F_SETOWN, os.getppid())",
    "traces": "assert libc.ptrace(0, 0, 0, 0) == 0",
    "reads another process's memory": "assert libc.syscall(310, os.getpid(), 0, 0, 0, 0, 0) == 0",
    "gives itself more memory": "import resource; resource.setrlimit(resource.RLIMIT_CORE, (0, 0))",
    "maps a file to write": "import mmap; mmap.mmap(os.open(folder + '/kept', os.O_RDWR), 1)[:] = b'x'",
    "makes a pipe": "import os; os.pipe()",
    "mounts by asking the kernel": "assert libc.syscall(165, 0, 0, 0, 0, 0) == -1",
    "loads a program into the kernel": "assert libc.syscall(321, 0, 0, 0) == -1",
}
"""Python that ends well where the harm is done, or where the kernel at least listens."""

PREAMBLE = "import ctypes, os\nfolder = {folder!r}\nlibc = ctypes.CDLL(None)\n"


@pytest.fixture(scope="module")
def missing() -> list[str]:
    """What this system offers nothing against."""
    if sys.platform != "linux":
        pytest.skip("no more than limits of resources hold elsewhere than on Linux")
    made = subprocess.run([sys.executable, "-c", _MISSING], stdout=subprocess.PIPE, check=True)
    return list(json.loads(made.stdout))


@pytest.fixture(
    scope="module",
    params=[
        "harmful_child.py",
        pytest.param(
            "harmful_child_of_nobody.py",
            marks=pytest.mark.skipif(
                not hasattr(os, "getuid") or os.getuid() != 0, reason="who is not root is no one else"
            ),
        ),
    ],
    ids=["as this user", "as nobody"],
)
def child(request: pytest.FixtureRequest, missing: list[str]) -> Iterator[Worker]:
    worker = Worker(HERE / request.param, LIMIT)
    yield worker
    worker.close()


@pytest.fixture
def folder() -> Iterator[Path]:
    """Where anybody may write: pytest's own folders are this user's alone."""
    with tempfile.TemporaryDirectory() as made:
        path = Path(made)
        path.chmod(0o777)
        (path / "kept").write_text("kept")
        (path / "kept").chmod(0o666)
        yield path


@pytest.mark.parametrize("code", HARM.values(), ids=HARM.keys())
def test_harm_is_refused(child: Worker, missing: list[str], folder: Path, code: str) -> None:
    if any("starting processes" in what for what in missing):
        pytest.skip("this kernel filters no system calls")
    code = PREAMBLE.format(folder=str(folder)) + code
    assert child.ask(code) is None
    assert [path.name for path in folder.iterdir()] == ["kept"]
    assert (folder / "kept").read_text() == "kept"
    assert child.ask("import os; result = os.getcwd") is None  # no JSON: the server is replaced
    assert child.ask("result = 1") == 1
    free = subprocess.run([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True)
    if free.returncode:
        pytest.skip(f"this system refuses it to everybody: {free.stderr.splitlines()[-1]}")


def test_files_that_were_open_are_closed(child: Worker) -> None:
    code = """
        import os
        result = []
        for number in range(3, 60):
            try:
                os.fstat(number)
            except OSError:
                continue
            result.append(number)
        result = [len(result), inherited in result]
    """
    # Two: of the questions and of the replies.
    assert child.ask(textwrap.dedent(code)) == [2, False]


def test_other_processes_cannot_be_read(child: Worker, missing: list[str]) -> None:
    if any("reading" in what for what in missing):
        pytest.skip("this kernel has no Landlock")
    code = """
        import os
        result = []
        for name in ("environ", "mem", "maps", "cmdline"):
            try:
                open(f"/proc/{os.getppid()}/{name}", "rb").read(1)
                result.append(name)
            except OSError:
                pass
    """
    assert child.ask(textwrap.dedent(code)) == []
    assert Path(f"/proc/{os.getppid()}/cmdline").read_bytes()


def test_a_users_own_files_cannot_be_read(child: Worker, missing: list[str], folder: Path) -> None:
    if any("reading" in what for what in missing):
        pytest.skip("this kernel has no Landlock")
    assert child.ask(f"open({str(folder / 'kept')!r})") is None
    assert child.ask(f"import os; os.listdir({str(folder)!r})") is None


def test_the_environment_holds_no_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("LC_NAME", "C")
    worker = Worker(HERE / "harmful_child.py", LIMIT)
    names = worker.ask("import os; result = [*os.environ]")
    assert worker._process is not None
    environment = Path(f"/proc/{worker._process.pid}/environ")
    first = environment.read_text() if environment.exists() else ""
    worker.close()
    assert "LC_NAME" in names
    assert "HF_TOKEN" not in names
    assert "hf_secret" not in first


def test_the_working_folder_is_empty_and_gone(child: Worker) -> None:
    assert child.ask("import os; result = os.stat('.').st_nlink") == 0


def test_modules_and_files_are_read(child: Worker) -> None:
    assert child.ask("import sys, colorsys; sys.modules.pop('colorsys'); import colorsys") == "done"
    assert child.ask("import os; result = len(open(os.__file__).read()) > 0") is True


@pytest.mark.parametrize(
    ("code", "kept"),
    [
        ("pass", True),
        ("raise ValueError", False),
        ("raise SystemExit", False),
        ("raise KeyboardInterrupt", False),
        ("import os; os._exit(0)", False),
        ("import os; os.abort()", False),
        ("bytes(2**40)", False),
        ("result = {1}", False),
        ("import ctypes; ctypes.string_at(0)", False),
        ("open('/tmp/x', 'w')", False),
    ],
    ids=[
        *("nothing", "an exception", "an exit", "an interrupt", "a sudden exit", "an abort", "too much memory"),
        *("no JSON", "a crash", "a refusal"),
    ],
)
def test_after_anything_unusual_another_process_answers(child: Worker, code: str, kept: bool) -> None:
    process, mark = child._process, "import builtins; builtins.mark = 1\n"
    assert child.ask("result = 1") == 1
    child.ask(mark + code)
    assert child.ask("import builtins; result = hasattr(builtins, 'mark')") is kept
    assert child._process is process, "the process that imported everything is kept"
    child.ask("raise ValueError")


def test_a_late_answer_costs_no_new_start(child: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    assert child.ask("import builtins; builtins.mark = 1") == "done"
    process, late = child._process, child.timeouts
    with monkeypatch.context() as patch:
        patch.setattr(child, "time_limit", 0.2)
        assert child.ask("9**9**9") is None
    assert child.timeouts == late + 1
    assert child.ask("import builtins; result = hasattr(builtins, 'mark')") is False
    assert child._process is process


@pytest.mark.parametrize(
    "said",
    ["b'0123456789abcdef true\\n'", "b'true\\n' * 3", "b'ready []\\n'", "b'[' * 99999 + b'\\n'", "bytes(9)"],
    ids=["another question's", "no question's", "a new start", "brackets", "no line's end"],
)
def test_a_reply_to_no_question_is_none_to_the_next(child: Worker, said: str) -> None:
    code = f"""
        import os
        for number in range(3, 60):
            try:
                os.write(number, {said})
            except OSError:
                pass
        raise ValueError
    """
    child.ask(textwrap.dedent(code))
    for number in range(3):
        assert child.ask(f"result = {number}") == number


def test_nested_beyond_measure_is_no_reply(child: Worker) -> None:
    code = """
        import inspect, os
        frame = inspect.currentframe()
        while "asked" not in frame.f_locals:
            frame = frame.f_back
        said = frame.f_locals["said"]
        said.write(bytes(frame.f_locals["asked"][:]) + b" " + b"[" * 10**6 + b"\\n")
        said.flush()
        raise ValueError
    """
    assert child.ask(textwrap.dedent(code)) is None
    assert child.ask("result = 1") == 1


def test_what_a_system_offers_nothing_against_is_said(caplog: pytest.LogCaptureFixture) -> None:
    from swift_kernels.evaluation import worker

    worker._tell_missing.cache_clear()
    for _ in range(2):
        worker._tell_missing(("flying",))
    assert [record.message for record in caplog.records] == ["this system offers no means to keep graders from flying"]
    caplog.clear()
    worker._tell_missing(())
    assert caplog.records == []


_ONE_WALL = """
import json, os, sys
from swift_kernels.evaluation import sandbox
if "no seccomp" in sys.argv:
    sandbox._filter_calls = lambda libc: False
rules = None if "no Landlock" in sys.argv else sandbox.path_rules()
missing = sandbox.enter(rules=rules)
print(json.dumps(missing), flush=True)
try:
    os.write(os.open(sys.argv[1], os.O_WRONLY | os.O_APPEND), b"x")
    print("written", flush=True)
except OSError:
    pass
"""


@pytest.mark.parametrize(
    ("without", "said"),
    [
        ([], []),
        (["no seccomp"], ["starting processes and the network"]),
        (["no Landlock"], ["reading the user's files and the environment of other processes"]),
        (
            ["no seccomp", "no Landlock"],
            [
                "reading the user's files and the environment of other processes",
                "starting processes and the network, and writing files",
            ],
        ),
    ],
    ids=["with both", "without seccomp", "without Landlock", "with neither"],
)
def test_each_wall_keeps_from_writing_and_what_is_missing_is_told(
    missing: list[str], folder: Path, without: list[str], said: list[str]
) -> None:
    if missing:
        pytest.skip(f"this system lacks one: {missing}")
    command = [sys.executable, "-c", _ONE_WALL, str(folder / "kept"), *without]
    made = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    first, *rest = made.stdout.splitlines()
    assert json.loads(first) == said
    # With neither the size of files is limited still.
    assert rest == []
    assert (folder / "kept").read_text() == "kept"


def verdict(program: list[tuple[int, int, int, int]], seen: dict[int, int]) -> int:
    """What a filter says of a call: a value at each offset, 0 where none is given."""
    at, value = 0, 0
    while True:
        code, yes, no, k = program[at]
        at += 1
        if code == sandbox._RETURN:
            return k
        if code == sandbox._LOAD:
            value = seen.get(k, 0)
        else:
            assert code in (sandbox._EQUAL, sandbox._ANY_BIT)
            at += yes if (value == k if code == sandbox._EQUAL else value & k) else no


@pytest.mark.parametrize(("machine", "numbers"), sandbox._ARCHITECTURES.items(), ids=sandbox._ARCHITECTURES)
def test_the_filter_of_each_machine(machine: str, numbers: tuple[int, int]) -> None:
    column, architecture = numbers
    program = sandbox._program(column, architecture)
    assert all(max(yes, no) < 256 for _, yes, no, _ in program)

    def of(call: int, *arguments: int, on: int = architecture) -> int:
        halves = {16 + 4 * i: half for i, half in enumerate(arguments)}
        return verdict(program, {0: call, 4: on, **halves})

    allowed = [call[column] for call in sandbox._ALLOWED.values()]
    assert len(set(allowed)) == len(allowed) - allowed.count(None) + bool(allowed.count(None))
    assert all(of(call) == sandbox._ALLOW for call in allowed if call is not None)
    others = {"x86_64": 0xC00000B7, "aarch64": 0xC000003E}
    assert of(0, on=others[machine]) == sandbox._KILL
    # The calls of x86_64 with short pointers have this bit.
    assert of(0x40000000) == sandbox._KILL
    openat, fcntl, limits = sandbox._OPENAT[column], sandbox._FCNTL[column], sandbox._PRLIMIT64[column]
    assert of(openat, 0, 0, 0, 0, os.O_RDONLY | os.O_CLOEXEC) == sandbox._ALLOW
    for flags in (os.O_WRONLY, os.O_RDWR, os.O_CREAT, os.O_TRUNC, os.O_APPEND, 0o20000000):
        assert of(openat, 0, 0, 0, 0, flags) == sandbox._KILL
    assert [of(fcntl, 0, 0, command) == sandbox._ALLOW for command in (1, 2, 3, 1030, 4, 8, 10)] == [True] * 4 + [
        False
    ] * 3
    assert of(limits) == sandbox._ALLOW
    assert of(limits, 0, 0, 0, 0, 1) == of(limits, 0, 0, 0, 0, 0, 1) == sandbox._KILL
    ending = {"x86_64": {"clone": 56, "execve": 59, "socket": 41, "kill": 62}, "aarch64": {"clone": 220, "execve": 221}}
    assert all(of(call) == sandbox._KILL for call in ending[machine].values())
