"""The builds of `project`, `pool` and their gradients that are looked at."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any, Literal

import torch

from swift_kernels.ops import pool, project
from swift_kernels.ops.chunks import strides_in_vectors
from swift_kernels.reference import GATE_SUM_FLOOR
from tests.aot.audit import TARGETS
from tests.aot.variants import TYPES, Build


@dataclass(frozen=True)
class Variant:
    """A kernel that reads hidden states: `project`, or its gradient for the weight."""

    op: Literal["project", "backward"]
    widths: tuple[int, ...]
    outputs: int = 2
    dtype: torch.dtype = torch.bfloat16
    weight_dtype: torch.dtype = torch.float32

    def __str__(self) -> str:
        widths = (
            f"{len(self.widths)}x{self.widths[0]}" if len(set(self.widths)) == 1 else "+".join(map(str, self.widths))
        )
        weight = ["W " + TYPES[self.weight_dtype]] * (self.op == "project")
        return ", ".join([self.op, widths, f"{self.outputs} outputs", TYPES[self.dtype], *weight])


@dataclass(frozen=True)
class Other:
    """A kernel that reads what the first two have made of them."""

    kernel: Literal["add chunks", "add splits", "pool", "pool backward"]
    gated: bool = True

    def __str__(self) -> str:
        return self.kernel + ", no gate" * (not self.gated)


SMALL = [
    Variant("project", (4096,) * 33),
    Variant("project", (4096,) * 33, outputs=16, weight_dtype=torch.bfloat16),
    Variant("project", (2560, 576), outputs=3, dtype=torch.float32),
    Variant("project", (1021,) * 2, dtype=torch.float16),
    Variant("backward", (4096,) * 33),
    Variant("backward", (4096,) * 33, outputs=8),
    Variant("backward", (2560, 576), outputs=3, dtype=torch.float32),
    Variant("backward", (1021,) * 2, outputs=4, dtype=torch.float16),
    Other("add chunks"),
    Other("add splits"),
    *(Other(kernel, gated) for kernel in ("pool", "pool backward") for gated in (True, False)),
]
_WIDTHS = [(4096,) * 33, (576,) * 31, (2560,) * 34, (8192,) * 81, (4096, 2560, 576), (128256,), (8,), (1021,) * 3]
FULL = [
    *(
        Variant("project", widths, outputs, dtype, weight_dtype)
        for widths, outputs, (dtype, weight_dtype) in itertools.product(
            _WIDTHS,
            (2, 16),
            ((torch.bfloat16, torch.float32), (torch.float16, torch.bfloat16), (torch.float32, torch.float32)),
        )
    ),
    *(
        Variant("backward", widths, outputs, dtype)
        for widths, outputs, dtype in itertools.product(_WIDTHS, (2, 8), TYPES)
        if outputs <= project.MAX_GRAD_OUTPUTS_ODD or widths[0] != 1021
    ),
    *(Variant("backward", (1021,) * 3, project.MAX_GRAD_OUTPUTS_ODD, dtype) for dtype in TYPES),
    *(variant for variant in SMALL if isinstance(variant, Other)),
]


def build(variant: Variant | Other, target: str) -> Build:
    on_amd = TARGETS[target].backend == "hip"
    kernel, launcher, types, constants = (_other if isinstance(variant, Other) else _reads_entries)(variant)
    warps = launcher.options["num_warps"]
    if on_amd and kernel in (project._project_kernel, project._project_backward_kernel):
        warps //= 2
    arguments = dict(zip(kernel.arg_names, types, strict=False)) | constants
    return Build(kernel, arguments, launcher.options | {"num_warps": warps})


def _reads_entries(variant: Variant) -> tuple[Any, Any, list[Any], dict[str, Any]]:
    entries = [torch.empty(2, width, dtype=variant.dtype, device="meta") for width in variant.widths]
    pointers = (f"*{TYPES[variant.dtype]}:16",) * len(entries)
    strides = tuple(f"i32{':16' if stride % 16 == 0 else ''}" for stride in strides_in_vectors(entries))
    if variant.op == "project":
        types = [pointers, strides, f"*{TYPES[variant.weight_dtype]}:16", "*fp32", *["i32"] * 3]
        return project._project_kernel, project._PROJECT, types, project.project_constants(entries, variant.outputs)
    types = [pointers, strides, "*fp32", "*fp32", *["i32"] * 5]
    constants = project.project_backward_constants(entries, variant.outputs)
    launcher = project._PROJECT_BACKWARD[project.project_backward_registers(constants)]
    return project._project_backward_kernel, launcher, types, constants


def _other(variant: Other) -> tuple[Any, Any, list[Any], dict[str, Any]]:
    pooling = {"GATED": variant.gated, "FLOOR": GATE_SUM_FLOOR, "BLOCK": pool.BLOCK}
    if variant.kernel == "pool":
        return pool._pool_kernel, pool._POOL, ["*fp32", "*i64", "*fp32", "*fp32", "i32"], pooling
    if variant.kernel == "pool backward":
        types = ["*fp32", "*fp32", "*fp32", "*i64", "*fp32", "i32"]
        return pool._pool_backward_kernel, pool._POOL_BACKWARD, types, pooling
    bias = "*fp32" if variant.kernel == "add chunks" else None
    types = ["*fp32", bias, "*fp32", *["i32"] * 5]
    return project._add_parts_kernel, project._ADD_PARTS, types, {"BLOCK": project.ADD_BLOCK}
