"""How much memory a call needs at its height, and how much is held after it."""

from __future__ import annotations

import ctypes
import re
import resource
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch


def peak_bytes(call: Callable[[], object], device: torch.device) -> int:
    """Memory beyond what is held before, at the call's height. Call it once before, for libraries and kernels to load.

    On the CPU the resident set: what the allocator keeps from earlier calls is returned to the system first, so that it
    counts again when it is used again.
    """
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated(device) - before
    _return_free_memory()
    with suppress(OSError):  # where the kernel does not let the mark be reset, what came before counts as well
        Path("/proc/self/clear_refs").write_text("5")
    before = _resident_bytes()
    call()
    return _peak_resident_bytes() - before


def held_bytes(device: torch.device) -> int:
    """Memory in use now: of PyTorch's allocator on a GPU, of this process on the CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated(device)
    _return_free_memory()
    return _resident_bytes()


def _return_free_memory() -> None:
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):  # glibc; others return large blocks by themselves
        libc.malloc_trim(0)


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def _peak_resident_bytes() -> int:
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(found[1]) << 10 if found else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
