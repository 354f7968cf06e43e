"""The FLOPs of what runs, by PyTorch's own counter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

_ATTENTION = (
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu,
    torch.ops.aten._scaled_dot_product_flash_attention,
    torch.ops.aten._scaled_dot_product_efficient_attention,
    torch.ops.aten._scaled_dot_product_cudnn_attention,
)


def flop_counter(formulas: dict[Any, Callable[..., int]] | None = None) -> FlopCounterMode:
    """A counter that also knows attention on a CPU, and attention with fewer heads of keys than of queries.

    PyTorch's own overlooks the first, and up to 2.12 refuses the second.

    Args:
        formulas: FLOPs of other ops, each a function of the shapes of its arguments.
    """
    return FlopCounterMode(display=False, custom_mapping=dict.fromkeys(_ATTENTION, _attention_flops) | (formulas or {}))


def _attention_flops(query: list[int], key: list[int], value: list[int], *_: object, **__: object) -> int:
    rows, heads, length, width = query
    return 2 * rows * heads * length * key[2] * (width + value[3])
