"""An H200 for machines without a GPU: shapes and dtypes of its tensors, and the code that Inductor writes for it."""

from __future__ import annotations

import contextlib
import ctypes
import math
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

H200 = SimpleNamespace(
    name="NVIDIA H200",
    major=9,
    minor=0,
    multi_processor_count=132,
    regs_per_multiprocessor=65536,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    shared_memory_per_block_optin=232448,
    warp_size=32,
    total_memory=141 << 30,
)


@contextlib.contextmanager
def fake_gpu() -> Iterator[None]:
    """Inside, tensors on "cuda" are fake ones, and Inductor writes Triton code for an H200."""
    import triton
    from torch._dynamo.device_interface import CudaInterface
    from torch._inductor import scheduler
    from torch._inductor.fx_passes.joint_graph import UniformValueConstantFolder
    from torch._inductor.runtime.hints import DeviceProperties
    from triton.backends.compiler import GPUTarget

    deduce = UniformValueConstantFolder._deduce_value

    def deduce_on_host(folder: Any, node: Any) -> Any:
        with _OnHost():
            return deduce(folder, node)

    properties = staticmethod(lambda device=None: H200)
    target = GPUTarget("cuda", 90, 32)
    driver = SimpleNamespace(get_current_target=lambda: target, get_current_device=lambda: 0)
    _register_device_guard()
    DeviceProperties.create.cache_clear()
    torch.utils._triton.triton_hash_with_backend.cache_clear()
    with contextlib.ExitStack() as stack:
        for patch in (
            mock.patch.object(torch.cuda, "get_device_properties", return_value=H200),
            mock.patch.object(torch.cuda, "get_device_capability", return_value=(9, 0)),
            mock.patch.object(CudaInterface, "get_device_properties", properties),
            mock.patch.object(CudaInterface.Worker, "get_device_properties", properties),
            mock.patch.object(CudaInterface, "is_bf16_supported", staticmethod(lambda *_, **__: True)),
            mock.patch.object(scheduler, "has_triton", return_value=True),
            mock.patch.object(triton.runtime.driver, "_active", driver),
            mock.patch.object(UniformValueConstantFolder, "_deduce_value", deduce_on_host),
        ):
            stack.enter_context(patch)
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", "Warning only once for all operators", UserWarning)
        library = stack.enter_context(torch.library._scoped_library("aten", "IMPL"))
        for key in ("CUDA", "AutogradCUDA"):
            library.impl("scaled_dot_product_attention", _attention, key)
        stack.enter_context(FakeTensorMode())
        try:
            yield
        finally:
            DeviceProperties.create.cache_clear()
            torch.utils._triton.triton_hash_with_backend.cache_clear()


class _OnHost(TorchDispatchMode):
    """Inductor computes constants where the graph would: that is moved to the CPU."""

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        return op(*args, **({**kwargs, "device": torch.device("cpu")} if kwargs.get("device") else kwargs))


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """The ops that `scaled_dot_product_attention` runs on a GPU; a build for the CPU would take its plain one."""
    if attn_mask is None:
        flash = torch.ops.aten._scaled_dot_product_flash_attention
        output = flash(query, key, value, dropout_p, is_causal, False, scale=scale)[0]
        heads, length, width = output.shape[1:]  # laid out as [batch, length, heads, width]
        return output.as_strided(output.shape, (length * heads * width, width, heads * width, 1))
    assert not enable_gqa, "with a mask and fewer key heads, a GPU takes the plain attention"
    if attn_mask.dtype == torch.bool:
        attn_mask = torch.where(attn_mask, 0.0, torch.scalar_tensor(-math.inf, dtype=query.dtype, device=query.device))
    attn_mask = attn_mask.expand(*query.shape[:3], key.shape[2])
    efficient = torch.ops.aten._scaled_dot_product_efficient_attention
    return efficient(query, key, value, attn_mask, False, dropout_p, is_causal, scale=scale)[0]


def _register_device_guard() -> None:
    """Lets a PyTorch built without CUDA index fake tensors on "cuda".

    Indexing enters the guard of its tensor's device. FakeTensorMode puts one that does nothing in place of a CUDA guard
    that has no devices, but a build for the CPU has none to replace: it gets that of the meta device.
    """
    library = ctypes.CDLL(str(next(Path(torch.__file__).parent.glob("lib/libc10.*"))))
    devices = torch._C._autograd.DeviceType
    registry = (ctypes.c_void_p * 20).in_dll(library, "_ZN3c104impl26device_guard_impl_registryE")
    cuda, meta = int(devices.CUDA), int(devices.Meta)
    if not registry[cuda]:
        registry[cuda] = registry[meta]
