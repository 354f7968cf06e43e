"""A CUDA driver for machines without a GPU: Triton compiles and launches for sm_90, and nothing runs.

Triton's own launcher runs up to `cuLaunchKernelEx`, where `libcuda.c` keeps the grid and every parameter. So tests see
what a launch would hand to the GPU, and the time up to there is the host's true cost. Tensors lie on the CPU.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import importlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import driver as nvidia
from triton.runtime.cache import get_cache_manager

from swift_kernels import schema
from swift_kernels.ops import launch, rms_norm_score, score_step

TARGET = GPUTarget("cuda", 90, 32)
DEVICE = -1
"""As tensors on the CPU name theirs."""
KEPT, MOST_PARAMETERS = 64, 512  # as in libcuda.c
SIZES = {"i1": 1, "i8": 1, "i16": 2, "i32": 4, "i64": 8, "u32": 4, "u64": 8, "fp32": 4, "fp64": 8}


class _Kernel(ctypes.Structure):
    _fields_ = (("parameters", ctypes.c_int), ("sizes", ctypes.c_int * MOST_PARAMETERS))


class _Launch(ctypes.Structure):
    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("threads", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("kernel", ctypes.POINTER(_Kernel)),
        ("parameters", ctypes.c_ulonglong * MOST_PARAMETERS),
    )


@dataclass(frozen=True)
class Launch:
    """One call of `cuLaunchKernelEx`."""

    kernel: str
    build: int
    """Which of its builds: the function that the driver loaded."""
    grid: tuple[int, int, int]
    threads: int
    stream: int
    parameters: tuple[int, ...]
    """What the compiled function takes, as unsigned integers: tuples are flattened, constants left out."""


class FakeDriver(nvidia.CudaDriver):
    """Launches from tensors on the CPU, on `stream`."""

    def __init__(self) -> None:
        self._library = _load_libcuda()
        for counter in ("launch_count", "pointer_queries"):
            ctypes.c_long.in_dll(self._library, counter).value = 0
        self._names: dict[int, str] = {}
        self._kernels: list[_Kernel] = []
        self.compilations: list[str] = []
        """Every build that was not in Triton's memory, in order."""
        self.stream = 7
        self.utils = SimpleNamespace(**vars(nvidia.CudaUtils()))
        self.utils.load_binary = self._load_binary
        self.utils.unload_module = lambda module: None
        self.utils.get_device_properties = lambda device: {"max_shared_mem": 232448}
        self.get_device_capability = lambda device=None: divmod(TARGET.arch, 10)
        self.get_current_device = lambda: DEVICE
        self.set_current_device = lambda device: None
        self.get_current_stream = lambda device=None: self.stream

    def get_current_target(self) -> GPUTarget:
        return TARGET

    def launcher_cls(self, source: Any, metadata: Any) -> Any:  # Triton makes it right before it loads the binary
        types = list(_flatten(source.signature.values()))
        self._kernels.append(_Kernel(len(types), tuple(8 if kind[0] == "*" else SIZES[kind] for kind in types)))
        return nvidia.CudaLauncher(source, metadata)

    def _load_binary(self, name: str, *_: Any) -> tuple[int, int, int, int, int]:
        function = ctypes.addressof(self._kernels[-1])
        self._names[function] = name
        return 1, function, 0, 0, 1024  # module, function, registers, spills, most threads

    @property
    def launch_count(self) -> int:
        return ctypes.c_long.in_dll(self._library, "launch_count").value

    @property
    def pointer_queries(self) -> int:
        """How often the launcher asked the driver what a tensor's address is."""
        return ctypes.c_long.in_dll(self._library, "pointer_queries").value

    def last(self, back: int = 0) -> Launch:
        """The last launch, or the one `back` before it."""
        assert back < min(self.launch_count, KEPT), "no such launch is kept"
        record = (_Launch * KEPT).in_dll(self._library, "launches")[(self.launch_count - 1 - back) % KEPT]
        function = ctypes.addressof(record.kernel.contents)
        return Launch(
            self._names[function],
            function,
            tuple(record.grid),
            record.threads,
            record.stream,
            tuple(record.parameters[: record.kernel.contents.parameters]),
        )


_EAGER = {
    "score_step": score_step.score_step_eager,
    "rms_norm": rms_norm_score.rms_norm_eager,
    "rms_norm_score": rms_norm_score.rms_norm_score_eager,
}


@contextlib.contextmanager
def fake_driver() -> Iterator[FakeDriver]:
    """Makes a fake driver Triton's active one, and Triton what runs the ops; at the end all of it is forgotten."""
    if torch.cuda.is_available():
        raise RuntimeError("there is a GPU here, and its libcuda stands where the stand-in would")
    driver = FakeDriver()
    functions = set()

    def note(*, fn: Any, repr: str, **_: Any) -> None:
        functions.add(fn.jit_function)
        driver.compilations.append(repr)

    operations = _Operations()

    def select(device_type: str) -> tuple[str, _Operations]:
        return "triton", operations

    with contextlib.ExitStack() as stack:
        for target, name, value in (
            (triton.runtime.driver, "_active", driver),
            (knobs.runtime, "jit_post_compile_hook", note),
            (launch, "DEVICE_TYPE", "cpu"),
            (schema, "_select", select),
            (schema, "_EAGER", _EAGER),
        ):
            stack.enter_context(mock.patch.object(target, name, value))
        forget()
        try:
            yield driver
        finally:
            forget()
            for function in functions:
                for kernel in function.device_caches.pop(DEVICE)[0].values():
                    kernel.module = None  # else it would be unloaded through a driver that is gone


def forget() -> None:
    """Forgets every plan and build: the next launches go through Triton, whose own memory of builds stays."""
    for name, module in list(sys.modules.items()):
        if name.startswith("swift_kernels.ops."):
            for value in vars(module).values():
                for held in value.values() if isinstance(value, dict) else (value,):
                    if isinstance(held, launch.Plans | launch.Kernel):
                        held.clear()


class _Operations(dict[str, Callable[..., Any]]):
    """The Triton function of each op, imported when it is asked for."""

    def __missing__(self, op: str) -> Callable[..., Any]:
        return getattr(importlib.import_module(f"swift_kernels.ops.{schema._TRITON[op]}"), f"{op}_triton")


@functools.cache
def _load_libcuda() -> ctypes.CDLL:
    """Builds the stand-in and loads it before anything asks for `libcuda.so.1`, which then finds it by its name."""
    folder = Path(nvidia.__file__).parent
    source = Path(__file__).with_name("libcuda.c").read_text()
    # A launcher links to much that no launch calls.
    symbols = sorted(set(re.findall(r"\bcu[A-Z]\w+(?=\()", (folder / "driver.c").read_text())))
    rest = "".join(f"__attribute__((weak)) int {symbol}(void) {{ return 801; }}\n" for symbol in symbols)
    cache = get_cache_manager(hashlib.sha256((source + rest).encode()).hexdigest())
    path = cache.get_file("libcuda.so.1")
    if path is None:
        with tempfile.TemporaryDirectory() as build:
            (Path(build) / "libcuda.c").write_text(source)
            (Path(build) / "rest.c").write_text(rest)
            command = ["cc", "-O2", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", f"-I{folder / 'include'}"]
            subprocess.run([*command, "libcuda.c", "rest.c", "-o", "libcuda.so.1"], cwd=build, check=True)
            path = cache.put((Path(build) / "libcuda.so.1").read_bytes(), "libcuda.so.1")
    knobs.nvidia.libcuda_path = str(Path(path).parent)
    return ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL)


def _flatten(types: Any) -> Iterator[str]:
    for kind in types:
        if isinstance(kind, tuple):
            yield from _flatten(kind)
        elif kind != "constexpr":
            yield kind
