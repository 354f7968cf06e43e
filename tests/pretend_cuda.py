"""Runs a module as if there were a GPU, to reach what only a GPU reaches: shapes are small, and no figure means much.

    python -m tests.pretend_cuda bench.decode --models 8b --rows 64 --device cuda --results FOLDER

Tensors stay on the CPU, where our operators are C++. A CUDA graph replays the operators of what was captured, on the
same memory and without its Python; nothing is compiled. So this shows what the code around kernels does, not kernels.
"""

from __future__ import annotations

import dataclasses
import importlib
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

# Before anything looks at them.
os.environ |= {"TRITON_INTERPRET": "1", "TORCHDYNAMO_DISABLE": "1"}

import torch
from torch.overrides import TorchFunctionMode

from bench import clocks, floors, shapes
from tests.recorded import Recording

GB = 1_000_000_000


class _OnTheCpu(TorchFunctionMode):
    """Calls with cpu where cuda is asked for."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.device:
            return func(*args, **kwargs)
        return func(*map(_on_the_cpu, args), **{name: _on_the_cpu(value) for name, value in kwargs.items()})


def _on_the_cpu(value: Any) -> Any:
    return "cpu" if isinstance(value, str | torch.device) and str(value).startswith("cuda") else value


class Stream:
    cuda_stream = 0

    def wait_stream(self, stream: Stream) -> None:
        pass


class Event:
    def __init__(self, enable_timing: bool = False) -> None:
        self._at = 0.0

    def record(self) -> None:
        self._at = time.perf_counter()

    def query(self) -> bool:
        return False

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end: Event) -> float:
        return (end._at - self._at) * 1e3


class CUDAGraph:
    replays = 0

    def replay(self) -> None:
        CUDAGraph.replays += 1
        self.recording.replay()  # type: ignore[attr-defined]


@contextmanager
def _graph(graph: Any) -> Iterator[None]:
    with Recording() as graph.recording:
        yield


@contextmanager
def _stream(stream: Stream) -> Iterator[None]:
    yield


class _Generator(torch._C.Generator):
    def __new__(cls, device: Any = "cpu") -> Any:
        return super().__new__(cls)


CURRENT = Stream()
PROPERTIES = SimpleNamespace(
    name="pretended", major=9, minor=0, total_memory=80 * GB, multi_processor_count=132, L2_cache_size=1 << 16
)
STAND_INS: dict[str, Any] = {
    "Stream": Stream,
    "Event": Event,
    "CUDAGraph": CUDAGraph,
    "graph": _graph,
    "stream": _stream,
    "is_available": lambda: True,
    "current_stream": lambda *_: CURRENT,
    "get_device_properties": lambda *_: PROPERTIES,
    "get_device_name": lambda *_: PROPERTIES.name,
    "get_device_capability": lambda *_: (PROPERTIES.major, PROPERTIES.minor),
    "mem_get_info": lambda *_: (79 * GB, 80 * GB),
    **dict.fromkeys(("device_count",), lambda: 1),
    **dict.fromkeys(("current_device", "memory_allocated", "max_memory_allocated"), lambda *_: 0),
    **dict.fromkeys(("synchronize", "reset_peak_memory_stats", "empty_cache", "_sleep"), lambda *_: None),
    "get_rng_state": lambda *_: torch.get_rng_state(),
    "set_rng_state": lambda *_: None,
}
SMALL = {"layers": 4, "hidden": 128, "intermediate": 256, "heads": 4, "kv_heads": 2, "vocabulary": 512}


def pretend() -> None:
    """For the rest of this process."""
    for name, value in STAND_INS.items():
        setattr(torch.cuda, name, value)
    torch.Generator = _Generator  # type: ignore[misc]
    for name, shape in shapes.SHAPES.items():
        shapes.SHAPES[name] = dataclasses.replace(shape, **SMALL)
    shapes.LLAMA_8B = shapes.SHAPES["Llama-3.1-8B"]
    capture = clocks.Replay.__init__
    # It is told the device of tensors.
    clocks.Replay.__init__ = lambda self, calls, _, *more: capture(self, calls, torch.device("cuda"), *more)  # type: ignore[method-assign]
    clocks.REPLAYED = 4
    floors.FLOOR_BYTES["cuda"] = 1 << 20
    from bench import score_step  # which takes over some of these

    score_step.INPUT_BYTES = 1 << 16
    _OnTheCpu().__enter__()


if __name__ == "__main__":
    pretend()
    sys.argv = sys.argv[1:]
    importlib.import_module(sys.argv[0]).main()
    print(f"{CUDAGraph.replays} graphs were replayed", file=sys.stderr)
