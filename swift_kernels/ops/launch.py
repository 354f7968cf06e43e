"""How the Triton ops launch, at a cost that eager decoding does not notice.

`Plans` finds what is known of a launch by the metadata of its tensors, `Kernel` compiles once, and never in the middle
of a capture, `run_build` hands addresses to Triton's launcher, and where `is_watched` is false ops skip the dispatcher.
Times in comments are of 33 entries, so 40 tensors, on one core of an AMD EPYC (Zen 4); see `bench/launch_cost.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from operator import attrgetter
from typing import Any, Generic, TypeVar

import torch
import triton
from torch import Tensor
from triton import knobs

try:
    from torch._C._dynamo.guards import TensorGuards
except ImportError:  # a private part of PyTorch: without it every step finds its plan the long way
    TensorGuards = None  # type: ignore[assignment,misc]

DEVICE_TYPE = "cuda"
"""Of the tensors that are launched on. A driver that drives no GPU, for tests, has them on the CPU."""

_PLAIN_TYPES = (Tensor, torch.nn.Parameter)
_INFERENCE_MODE = torch._C.DispatchKeySet(torch._C.DispatchKey.BackendSelect)
_UNWATCHED = {
    _INFERENCE_MODE.raw_repr(),
    _INFERENCE_MODE.add(torch._C.DispatchKey.ADInplaceOrView).raw_repr(),
}
"""The dispatch keys of eager execution, in inference mode and outside of it."""

Plan = TypeVar("Plan")
Grid = tuple[int, int, int]


class Plans(Generic[Plan]):
    """What is known of a launch, found by types, dtypes, devices, shapes and strides of all its tensors.

    A key of them made in Python takes 13 us, and none of it may be left out: a launch that does not fit its tensors
    writes wherever it likes. So plans are found through the guards that torch.compile checks its inputs with, which
    look at the same in C++ in 3 us.
    """

    MOST = 1024
    MOST_ALIKE = 8

    def __init__(self) -> None:
        self._by_key: dict[tuple[Any, ...], Plan] = {}
        self._guarded: dict[tuple[Any, ...], list[tuple[Any, Plan]]] = {}

    def find(self, tensors: Sequence[Tensor], *scalars: Hashable) -> Plan | None:
        """The plan for tensors like these and these scalars, if guards of it were made."""
        for guards, plan in self._guarded.get((len(tensors), tensors[0].shape, *scalars), ()):
            if guards.check(*tensors):
                return plan
        return None

    def find_or_make(self, make: Callable[[], Plan], tensors: Sequence[Tensor], *scalars: Hashable) -> Plan:
        """The plan for tensors like these and these scalars, where `find` has none; it will have it next time."""
        key = (
            *scalars,
            len(tensors),
            *map(attrgetter("shape"), tensors),
            *map(Tensor.stride, tensors),
            *map(attrgetter("dtype"), tensors),
            *map(attrgetter("device"), tensors),
        )
        plan = self._by_key.get(key)
        if plan is None:
            plan = make()
            if len(self._by_key) == self.MOST:
                self.clear()
            self._by_key[key] = plan
        if TensorGuards is not None and are_plain(tensors):
            alike = self._guarded.setdefault((len(tensors), tensors[0].shape, *scalars), [])
            alike.insert(0, (TensorGuards(*tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None), plan))
            del alike[self.MOST_ALIKE :]
        return plan

    def clear(self) -> None:
        self._by_key.clear()
        self._guarded.clear()


def are_plain(tensors: Sequence[Tensor]) -> bool:
    """Whether these are ordinary tensors on the GPU, of no subclass. True of all that `Plans.find` finds a plan for."""
    return tensors[0].device.type == DEVICE_TYPE and all(type(tensor) in _PLAIN_TYPES for tensor in tensors)


def is_watched() -> bool:
    """Whether a dispatch mode, a transform or a tracer has to see what is done to tensors now; guards overlook some.

    Takes 0.4 us. Function modes are not asked: a default device is one of them.
    """
    return torch._C._dispatch_tls_local_include_set().raw_repr() not in _UNWATCHED


class Kernel:
    """A `triton.jit` function and its builds.

    The key of a build has to tell apart all that Triton would compile anew for: types, constants, and of what it
    specialises on the alignment of pointers and the values of integers.
    """

    def __init__(self, function: Any, **options: Any) -> None:
        self._function = function
        self.options = options
        self._builds: dict[Hashable, Any] = {}

    def launch(
        self, key: Hashable, device: int, grid: Grid, arguments: Sequence[Any], constants: dict[str, Any]
    ) -> Any:
        """Launches the build of `key` on the current device, compiled if this is the first, and returns it.

        There is none to return under the interpreter, nor on AMD: there Triton specialises also on whether a tensor's
        storage is below 2 GiB, which no key knows, so every launch has to go through Triton.
        """
        build = self._builds.get((device, key))
        if build is not None and torch.version.hip is None:
            run_build(build, device, grid, (*arguments, *constants.values()))
            return build
        if build is None and torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                f"{self._function.__name__} is not compiled yet for these widths and dtypes on this device, and cannot "
                "be while a CUDA graph is captured: call SwiftHead.warmup() before the capture"
            )
        build = self._builds[device, key] = self._function[grid](*arguments, **constants, **self.options)
        return build if torch.version.hip is None else None

    def clear(self) -> None:
        self._builds.clear()


def specialised(value: int) -> tuple[bool, ...]:
    """What Triton compiles an integer argument for: whether it is 1, divisible by 16, and of 32 bits."""
    return value == 1, value % 16 == 0, -(2**31) <= value < 2**31


def current_device() -> int:
    """Index of the device that a launch goes to."""
    return triton.runtime.driver.active.get_current_device()


def run_build(build: Any, device: int, grid: Grid, arguments: Sequence[Any]) -> None:
    """`build[grid](*arguments)` on the current device: 3 us instead of 8 where tensors are given as addresses.

    The launcher takes an integer for a pointer as it is; of a tensor it asks the address, and CUDA whether that is one.
    And `build[grid]` prepares what hooks are told of a launch, also where nobody has set any.
    """
    hooks = (knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook)
    if any(getattr(hook, "calls", hook) for hook in hooks):  # chains of functions; in Triton 3.4 a function or None
        build[grid](*arguments)
        return
    stream = triton.runtime.driver.active.get_current_stream(device)
    build.run(*grid, stream, build.function, build.packed_metadata, None, None, None, *arguments)
