"""The builds of `score_step` that are looked at, described through the launcher's own plan."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch

from swift_kernels.ops.score_step import _KERNEL, _make_plan, _score_step_kernel
from tests.aot.audit import TARGETS
from tests.aot.variants import TYPES, Build


@dataclass(frozen=True)
class Variant:
    widths: tuple[int, ...]
    dtype: torch.dtype = torch.bfloat16
    weight_dtype: torch.dtype = torch.float32
    gated: bool = True
    gate_reward: bool = False
    padding: int = 0
    """Elements between the rows: row stride minus width."""

    def __str__(self) -> str:
        widths = (
            f"{len(self.widths)}x{self.widths[0]}" if len(set(self.widths)) == 1 else "+".join(map(str, self.widths))
        )
        parts = [widths, TYPES[self.dtype], "W " + TYPES[self.weight_dtype]]
        parts += ["gated" if self.gated else "no gate"] + ["gate_reward"] * self.gate_reward
        parts += [f"stride +{self.padding}"] * bool(self.padding)
        return ", ".join(parts)


SMALL = [
    Variant((4096,) * 33),
    Variant((4096,) * 33, weight_dtype=torch.bfloat16, gate_reward=True),
    Variant((576,) * 31),
    Variant((2560, 2304), gated=False, padding=8),
    Variant((4096,) * 2, dtype=torch.float32),
    Variant((1021,) * 2, dtype=torch.float16),
    Variant((128256,)),
]

_WIDTHS = [
    (4096,) * 33,
    (576,) * 31,
    (2560,) * 34,
    (2304,) * 27,
    (8192,) * 81,
    (4096, 2560, 576),
    (128256,),
    (1021,) * 3,
]
FULL = [
    Variant(widths, dtype, weight_dtype, gated, gate_reward, padding)
    for widths, dtype, weight_dtype, (gated, gate_reward), padding in itertools.product(
        _WIDTHS, TYPES, (torch.float32, torch.bfloat16), ((True, False), (True, True), (False, False)), (0, 8)
    )
]


def build(variant: Variant, target: str) -> Build:
    hidden_states = [
        torch.empty(2, width + variant.padding, dtype=variant.dtype, device="meta")[:, :width]
        for width in variant.widths
    ]
    outputs = 2 if variant.gated else 1
    plan = _make_plan(hidden_states, torch.empty(outputs, sum(variant.widths), device="meta"), slot_count=2)
    weight = "*" + TYPES[variant.weight_dtype]
    on_amd = TARGETS[target].backend == "hip"
    return Build(
        _score_step_kernel,
        {
            "hidden_states": (f"*{TYPES[variant.dtype]}:16",) * len(variant.widths),
            "row_strides": tuple(f"i32{':16' if stride % 16 == 0 else ''}" for stride in plan.row_strides),
            "weight_ptr": weight + ":16",
            "bias_ptr": weight,
            "slots_ptr": "*i64",
            "sums_ptr": "*fp32",
            "token_count_ptr": "*i32",
            "partials_ptr": "*fp32:16",
            "arrivals_ptr": "*i32",
            "gate_reward_ptr": "*fp32" if variant.gate_reward else None,
            "rows": "i32",
            "slot_count": "i32",
            **plan.constants,
            "RELEASE_EACH_WARP": on_amd,
        },
        _KERNEL.options | {"num_warps": 4 if on_amd else 8},
        counts_arrivals=True,
    )
