"""Takes from this process the right to do harm: what evaluates an answer may read files and compute, no more.

Grammars keep an answer from being executed in the first place. This is the second wall, for what they overlook: on
Linux a filter of system calls (seccomp) that ends the process at the first call it does not know, and Landlock, which
judges what a call's numbers do not tell: paths. What remains to be read is Python's modules and the system's libraries,
not the user's files or other processes' environment under /proc. Neither needs root, and neither can be undone. Limits
of resources hold everywhere; where the system offers nothing else, `enter` says so.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import signal
import struct
import sys
import tempfile
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

MEMORY = 4 * 2**30
"""Bytes of address space."""

CPU = 3600
"""Seconds of processor time in all: for want of anyone who ends the process sooner."""

FILES = 64
"""Open files: Python opens a module at a time."""

# What computing, reading files and waiting take: numbers on x86_64 and aarch64; None where there is no such call.
_ALLOWED: dict[str, tuple[int | None, int | None]] = {
    # memory
    "mmap": (9, 222),
    "mprotect": (10, 226),
    "munmap": (11, 215),
    "brk": (12, 214),
    "mremap": (25, 216),
    "mincore": (27, 232),
    "madvise": (28, 233),
    # files that are open, and asking about files
    "read": (0, 63),
    "write": (1, 64),
    "close": (3, 57),
    "lseek": (8, 62),
    "pread64": (17, 67),
    "readv": (19, 65),
    "writev": (20, 66),
    "fadvise64": (221, 223),
    "stat": (4, None),
    "fstat": (5, 80),
    "lstat": (6, None),
    "newfstatat": (262, 79),
    "statx": (332, 291),
    "statfs": (137, 43),
    "fstatfs": (138, 44),
    "access": (21, None),
    "faccessat": (269, 48),
    "faccessat2": (439, 439),
    "readlink": (89, None),
    "readlinkat": (267, 78),
    "getdents64": (217, 61),
    "getcwd": (79, 17),
    # waiting, time and chance
    "poll": (7, None),
    "ppoll": (271, 73),
    "select": (23, None),
    "pselect6": (270, 72),
    "futex": (202, 98),
    "sched_yield": (24, 124),
    "membarrier": (324, 283),
    "clock_gettime": (228, 113),
    "clock_getres": (229, 114),
    "clock_nanosleep": (230, 115),
    "nanosleep": (35, 101),
    "gettimeofday": (96, 169),
    "time": (201, None),
    "getitimer": (36, 102),
    "setitimer": (38, 103),
    "getrandom": (318, 278),
    # signals of its own
    "rt_sigaction": (13, 134),
    "rt_sigprocmask": (14, 135),
    "rt_sigpending": (127, 136),
    "rt_sigreturn": (15, 139),
    "sigaltstack": (131, 132),
    "restart_syscall": (219, 128),
    # what it is
    "getpid": (39, 172),
    "gettid": (186, 178),
    "getppid": (110, 173),
    "getpgrp": (111, None),
    "getuid": (102, 174),
    "geteuid": (107, 175),
    "getgid": (104, 176),
    "getegid": (108, 177),
    "uname": (63, 160),
    "sysinfo": (99, 179),
    "times": (100, 153),
    "getrusage": (98, 165),
    "getrlimit": (97, 163),
    "getcpu": (309, 168),
    "sched_getaffinity": (204, 123),
    "rseq": (334, 293),
    "set_robust_list": (273, 99),
    "exit": (60, 93),
    "exit_group": (231, 94),
}

# Refused with an error, for libraries ask without meaning harm: open() whether it has a terminal, libc for new calls.
_REFUSED = {
    "ioctl": (16, 29, errno.ENOTTY),
    "clone3": (435, 435, errno.ENOSYS),
    "openat2": (437, 437, errno.ENOSYS),
    "prctl": (157, 167, errno.EPERM),
}
_OPEN, _OPENAT, _FCNTL, _PRLIMIT64 = (2, None), (257, 56), (72, 25), (302, 261)

_ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
"""Which of two numbers of a call is the machine's, and how the kernel calls the machine."""

_ALLOW, _ERROR, _KILL = 0x7FFF0000, 0x00050000, 0x80000000
_LOAD, _EQUAL, _ANY_BIT, _RETURN = 0x20, 0x15, 0x45, 0x06
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND | 0o20000000  # O_TMPFILE
_HARMLESS_FCNTL = (1, 2, 3, 1030)  # F_GETFD, F_SETFD, F_GETFL, F_DUPFD_CLOEXEC; others send signals or lock

_PR_SET_PDEATHSIG, _PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS = 1, 22, 38
_SECCOMP_MODE_FILTER = 2

# The same on every machine.
_LANDLOCK_CREATE, _LANDLOCK_ADD, _LANDLOCK_RESTRICT = 444, 445, 446
_LANDLOCK_ALL = 0b1_1111_1111_1111
"""What the first version knows: execute, read, write, remove and make."""

_READ_FILE, _READ_FOLDER = 0b100, 0b1000
_READABLE = ("/usr", "/lib", "/lib64", "/etc", "/dev")
"""Of the system: libraries that modules load late, time zones and the like."""


def path_rules() -> int | None:
    """Landlock's rules as an open file, which processes that this one forks pass on to `enter`; None without Landlock.

    They are made once, for the modules that are there by then: it takes longer than a fork.
    """
    if sys.platform != "linux":
        return None
    libc = ctypes.CDLL(None, use_errno=True)
    version = libc.syscall(_LANDLOCK_CREATE, None, ctypes.c_size_t(0), ctypes.c_uint32(1))
    if version < 1:
        return None
    files = _LANDLOCK_ALL | (version >= 2) << 13 | (version >= 3) << 14 | (version >= 5) << 15
    network, scopes = 0b11 * (version >= 4), 0b11 * (version >= 6)
    handled = (ctypes.c_uint64 * 3)(files, network, scopes)
    size = 8 * (1 + (version >= 4) + (version >= 6))
    rules: int = libc.syscall(_LANDLOCK_CREATE, handled, ctypes.c_size_t(size), ctypes.c_uint32(0))
    if rules < 0:
        return None
    for path in _readable():
        with suppress(OSError):
            entry = os.open(path, os.O_PATH)
            access = _READ_FILE | _READ_FOLDER if os.path.isdir(path) else _READ_FILE
            rule = ctypes.create_string_buffer(struct.pack("=Qi", access, entry))
            libc.syscall(_LANDLOCK_ADD, rules, ctypes.c_uint32(1), rule, ctypes.c_uint32(0))
            os.close(entry)
    return rules


def _readable() -> set[str]:
    """Where modules lie: those on the path, and packages that were found in another way."""
    packages = [os.path.dirname(getattr(module, "__file__", None) or "") for module in list(sys.modules.values())]
    libraries = os.environ.get("LD_LIBRARY_PATH", "").split(":")
    paths = {*_READABLE, sys.prefix, sys.base_prefix, *sys.path, *packages, *libraries}
    # All of it would be /proc too.
    paths = {os.path.realpath(path) for path in paths if path} - {"/"}
    return {path for path in paths if not any(str(above) in paths for above in Path(path).parents)}


def enter(keep: Iterable[int] = (), rules: int | None = None) -> list[str]:
    """Gives up what this process may do beyond computing, reading modules, and writing to the files in `keep`.

    Other files are closed, and the working folder is an empty one that is already deleted. `rules` are those of
    `path_rules`. Returns what the system offers no means against, in words.
    """
    _close_others((*keep, *([] if rules is None else [rules])))
    _leave_folder()
    _limit_resources()
    if sys.platform != "linux":
        return ["reading and writing files, starting processes and the network"]
    libc = ctypes.CDLL(None, use_errno=True)
    # Its parent may be killed while an answer is computed for ever.
    libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    landlocked = False
    if rules is not None:
        landlocked = libc.syscall(_LANDLOCK_RESTRICT, rules, ctypes.c_uint32(0)) == 0
        os.close(rules)
    filtered = _filter_calls(libc)
    missing = []
    if not landlocked:
        missing.append("reading the user's files and the environment of other processes")
    if not filtered:
        missing.append("starting processes and the network" + ("" if landlocked else ", and writing files"))
    return missing


def _close_others(keep: Iterable[int]) -> None:
    ends = sorted({*keep, 0, 1, 2})
    for low, high in zip(ends, [*ends[1:], 2**20], strict=True):
        os.closerange(low + 1, high)


def _leave_folder() -> None:
    with suppress(OSError):
        os.chdir("/")
        folder = tempfile.mkdtemp()
        os.chdir(folder)
        os.rmdir(folder)


def _limit_resources() -> None:
    try:
        import resource
    except ImportError:
        return
    limits = {"AS": MEMORY, "CPU": CPU, "FSIZE": 0, "NOFILE": FILES, "CORE": 0, "NPROC": 0}
    for name, limit in limits.items():
        with suppress(AttributeError, OSError, ValueError):
            resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (limit, limit))


class _Instruction(ctypes.Structure):
    _fields_ = (("code", ctypes.c_uint16), ("yes", ctypes.c_uint8), ("no", ctypes.c_uint8), ("k", ctypes.c_uint32))


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_uint16), ("filter", ctypes.POINTER(_Instruction)))


def _filter_calls(libc: ctypes.CDLL) -> bool:
    architecture = _ARCHITECTURES.get(platform.machine())
    if architecture is None or sys.maxsize < 2**32:
        return False
    instructions = [_Instruction(*one) for one in _program(*architecture)]
    program = _Program(len(instructions), (_Instruction * len(instructions))(*instructions))
    return libc.prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.byref(program), 0, 0) == 0


def _program(column: int, architecture: int) -> list[tuple[int, int, int, int]]:
    """The filter. Offsets into what it sees: the call's number 0, the machine 4, argument n at 16 + 8 n."""

    def low(argument: int) -> int:
        return 16 + 8 * argument  # both machines are little-endian

    program = [(_LOAD, 0, 0, 4), (_EQUAL, 1, 0, architecture), (_RETURN, 0, 0, _KILL), (_LOAD, 0, 0, 0)]

    def on(call: tuple[int | None, int | None], *then: tuple[int, int, int, int]) -> None:
        if (number := call[column]) is not None:
            program.extend([(_EQUAL, 0, len(then), number), *then])

    for allowed in _ALLOWED.values():
        on(allowed, (_RETURN, 0, 0, _ALLOW))
    for *numbers, error in _REFUSED.values():
        on((numbers[0], numbers[1]), (_RETURN, 0, 0, _ERROR | error))
    for call, flags in ((_OPEN, 1), (_OPENAT, 2)):
        kill_writes = (_ANY_BIT, 0, 1, _WRITES), (_RETURN, 0, 0, _KILL)
        on(call, (_LOAD, 0, 0, low(flags)), *kill_writes, (_RETURN, 0, 0, _ALLOW))
    commands = [(_EQUAL, len(_HARMLESS_FCNTL) - i, 0, command) for i, command in enumerate(_HARMLESS_FCNTL)]
    on(_FCNTL, (_LOAD, 0, 0, low(1)), *commands, (_RETURN, 0, 0, _KILL), (_RETURN, 0, 0, _ALLOW))
    # Limits may be read, not set: the new ones are a null pointer, and its two halves are compared.
    null = (_EQUAL, 1, 0, 0), (_RETURN, 0, 0, _KILL)
    halves = (_LOAD, 0, 0, low(2)), *null, (_LOAD, 0, 0, low(2) + 4), *null
    on(_PRLIMIT64, *halves, (_RETURN, 0, 0, _ALLOW))
    return [*program, (_RETURN, 0, 0, _KILL)]
