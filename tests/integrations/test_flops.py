"""Attention counts the same whichever kernel runs it, also where keys have fewer heads than queries."""

from __future__ import annotations

import pytest
import torch

from swift_kernels.integrations.flops import flop_counter

CALLS = {
    "cpu": (torch.ops.aten._scaled_dot_product_flash_attention_for_cpu, ()),
    "flash": (torch.ops.aten._scaled_dot_product_flash_attention, ()),
    "efficient": (torch.ops.aten._scaled_dot_product_efficient_attention, (None, False)),
    "cudnn": (torch.ops.aten._scaled_dot_product_cudnn_attention, (None, False)),
}


@pytest.mark.parametrize("key_heads", [8, 2, 1])
@pytest.mark.parametrize(("op", "more"), CALLS.values(), ids=CALLS)
def test_attention_of_every_kernel(op, more, key_heads):
    query, key = torch.empty(3, 8, 5, 16, device="meta"), torch.empty(3, key_heads, 7, 16, device="meta")
    if op is CALLS["efficient"][0] and key_heads < 8:
        key = key.expand(3, 8, 7, 16) if key_heads == 1 else key.repeat_interleave(4, dim=1)  # it knows no groups
    with flop_counter() as counter:
        op(query, key, key, *more)
    # Two products of [5, 16] x [16, 7] and [5, 7] x [7, 16] for each of 3 x 8 heads, 2 FLOPs each.
    assert counter.get_total_flops() == 3 * 8 * 2 * (2 * 5 * 16 * 7)
