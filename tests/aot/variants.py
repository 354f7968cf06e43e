"""The kernels that the audit looks at, and how a kernel joins them.

A kernel joins with a line in `KERNELS` and the module it names, which has

- `SMALL` and `FULL`, lists of variants: of what is compiled differently, such as widths, dtypes or a missing output. A
  variant is anything that can be pickled and whose `str` tells it from the others. `make audit` compiles SMALL, a
  representative few, and `python -m tests.aot.audit --full` FULL;
- `build(variant, target)`, the `Build` of a variant on one of `audit.TARGETS`.

Then `python -m tests.aot.audit --update` notes the figures of its SMALL variants in `baseline.json`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

KERNELS = {
    "score_step": "tests.aot.variants_score_step",
    "norm": "tests.aot.variants_norm",
    "sequence": "tests.aot.variants_sequence",
}

TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


@dataclass(frozen=True)
class Build:
    kernel: Any
    """A `triton.jit` function."""
    arguments: dict[str, Any]
    """For each of its parameters in order a type, such as "*bf16:16" or "i32", or the value of a constant: what
    `audit.compile_kernel` takes. A launch has to specialise the same way, or another build is looked at than runs."""
    options: dict[str, Any]
    """What it is launched with: `num_warps`, `enable_fp_fusion`."""
    counts_arrivals: bool = False
    """Whether the last program to arrive reads what others stored: then the memory order is checked."""

    def __post_init__(self) -> None:
        if list(self.arguments) != self.kernel.arg_names:
            raise ValueError(f"arguments are {list(self.arguments)}: expected those of {self.kernel.arg_names}")
