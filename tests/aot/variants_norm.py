"""The builds of `rms_norm` and `rms_norm_score` that are looked at, described through the launcher's own plan."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Literal

import torch

from swift_kernels.ops.rms_norm_score import _KERNELS, _make_plan, _rms_norm_score_kernel
from tests.aot.audit import TARGETS
from tests.aot.variants import TYPES, Build


@dataclass(frozen=True)
class Variant:
    width: int
    dtype: torch.dtype = torch.bfloat16
    mode: Literal["rounded first", "rounded once", "unit offset"] = "rounded first"
    scored: Literal["input", "output", None] = None
    last: bool = False
    weight_dtype: torch.dtype = torch.float32
    gated: bool = True
    gate_reward: bool = False

    def __str__(self) -> str:
        parts = [str(self.width), TYPES[self.dtype], self.mode]
        if self.scored:
            parts += [f"scores {self.scored}", "W " + TYPES[self.weight_dtype], "gated" if self.gated else "no gate"]
            parts += ["last"] * self.last + ["gate_reward"] * self.gate_reward
        return ", ".join(parts)


SMALL = [
    Variant(4096),
    Variant(4096, scored="input"),
    Variant(4096, scored="output", last=True, gate_reward=True),
    Variant(8192, torch.float32, "rounded once", scored="output", last=True),
    Variant(2560, torch.float16, "unit offset", scored="input", weight_dtype=torch.bfloat16, gated=False),
    Variant(576, scored="input", last=True),
    Variant(1021, scored="input"),
    Variant(16384, scored="output", last=True),
]
_KINDS = ((None, False, False), ("input", False, False), ("input", True, False), ("output", True, True))
"""scored, last, gate_reward"""
FULL = [
    *(
        Variant(width, dtype, "rounded first", *kind[:2], gate_reward=kind[2])
        for width, dtype, kind in itertools.product((1, 576, 1021, 2304, 2560, 4096, 8192, 16384, 18432), TYPES, _KINDS)
    ),
    *(
        Variant(4096, torch.bfloat16, mode, *kind[:2], weight_dtype, gated, kind[2])
        for mode, kind, weight_dtype, gated in itertools.product(
            ("rounded first", "rounded once", "unit offset"), _KINDS[1:], (torch.float32, torch.bfloat16), (True, False)
        )
        if (mode, weight_dtype, gated) != ("rounded first", torch.float32, True)
    ),
]


def build(variant: Variant, target: str) -> Build:
    on_amd = TARGETS[target].backend == "hip"
    hidden_states = torch.empty(2, variant.width, dtype=variant.dtype, device="meta")
    tensors = [hidden_states, hidden_states[0]]
    x, weight = "*" + TYPES[variant.dtype], "*" + TYPES[variant.weight_dtype]
    head_and_state, integers = [None] * 7, [None] * 4
    if variant.scored:
        outputs = 2 if variant.gated else 1
        tensors.append(torch.empty(outputs, 33 * variant.width, dtype=variant.weight_dtype, device="meta"))
        head_and_state = [weight, weight, "*i64", "*fp32", "*i32", "*fp32", "*fp32" if variant.gate_reward else None]
        integers = ["i32"] * 4
    flags = (variant.mode == "unit offset", variant.mode == "rounded first")
    plan = _make_plan(tensors, *flags, True, variant.scored == "output", variant.last)
    types = [x, x, *head_and_state, x, "i32", "fp32", *integers]
    arguments = dict(zip(_rms_norm_score_kernel.arg_names, types, strict=False)) | plan.constants
    warps = max(plan.num_warps // 2, 1) if on_amd else plan.num_warps
    return Build(_rms_norm_score_kernel, arguments, _KERNELS[plan.num_warps].options | {"num_warps": warps})
