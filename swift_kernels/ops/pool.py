"""`pool` and its gradient in Triton, one launch each.

A program takes one sequence of one head and goes through its tokens in blocks, so the order in which they are added up
depends on the length of the sequence alone.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

from swift_kernels.checks import check_cu_seqlens, check_pool, check_pool_backward
from swift_kernels.ops import launch
from swift_kernels.reference import GATE_SUM_FLOOR

BLOCK = 1024
"""Tokens of a sequence that are loaded at once: a long sequence waits for memory once a block."""


@triton.jit(do_not_specialize=["logits_ptr", "cu_seqlens_ptr", "scores_ptr", "gate_reward_ptr", "heads"])
def _pool_kernel(
    logits_ptr,
    cu_seqlens_ptr,
    scores_ptr,
    gate_reward_ptr,
    heads,
    GATED: tl.constexpr,
    FLOOR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    sequence = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    first_token = tl.load(cu_seqlens_ptr + sequence).to(tl.int64)
    end = tl.load(cu_seqlens_ptr + sequence + 1).to(tl.int64)
    weighted = tl.zeros((BLOCK,), tl.float32)
    gates = tl.zeros((BLOCK,), tl.float32)
    for first in tl.range(first_token, end, BLOCK):
        token = first + tl.arange(0, BLOCK)
        live = token < end
        index = token * heads + head
        if GATED:
            gate = tl.sigmoid(tl.load(logits_ptr + index * 2, mask=live, other=0.0))
            reward = tl.load(logits_ptr + index * 2 + 1, mask=live, other=0.0)
        else:
            gate = tl.full((BLOCK,), 1.0, tl.float32)
            reward = tl.load(logits_ptr + index, mask=live, other=0.0)
        tl.store(gate_reward_ptr + index * 2, gate, mask=live)
        tl.store(gate_reward_ptr + index * 2 + 1, reward, mask=live)
        weighted += gate * reward
        gates += tl.where(live, gate, 0.0)
    score = tl.sum(weighted, axis=0) / tl.maximum(tl.sum(gates, axis=0), FLOOR)
    tl.store(scores_ptr + sequence * heads + head, tl.where(end > first_token, score, float("nan")))


@triton.jit(
    do_not_specialize=[
        "grad_scores_ptr",
        "scores_ptr",
        "gate_reward_ptr",
        "cu_seqlens_ptr",
        "grad_logits_ptr",
        "heads",
    ]
)
def _pool_backward_kernel(
    grad_scores_ptr,
    scores_ptr,
    gate_reward_ptr,
    cu_seqlens_ptr,
    grad_logits_ptr,
    heads,
    GATED: tl.constexpr,
    FLOOR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    sequence = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    first_token = tl.load(cu_seqlens_ptr + sequence).to(tl.int64)
    end = tl.load(cu_seqlens_ptr + sequence + 1).to(tl.int64)
    grad_score = tl.load(grad_scores_ptr + sequence * heads + head)
    score = tl.load(scores_ptr + sequence * heads + head)
    gates = tl.zeros((BLOCK,), tl.float32)
    for first in tl.range(first_token, end, BLOCK):
        token = first + tl.arange(0, BLOCK)
        gates += tl.load(gate_reward_ptr + (token * heads + head) * 2, mask=token < end, other=0.0)
    gate_sum = tl.sum(gates, axis=0)
    score = tl.where(gate_sum < FLOOR, 0.0, score)  # where the floor holds, the sum is no function of the gates
    scale = grad_score / tl.maximum(gate_sum, FLOOR)
    for first in tl.range(first_token, end, BLOCK):
        token = first + tl.arange(0, BLOCK)
        live = token < end
        index = token * heads + head
        gate = tl.load(gate_reward_ptr + index * 2, mask=live, other=0.0)
        grad_reward = scale * gate
        if GATED:
            reward = tl.load(gate_reward_ptr + index * 2 + 1, mask=live, other=0.0)
            tl.store(grad_logits_ptr + index * 2, grad_reward * (1.0 - gate) * (reward - score), mask=live)
            tl.store(grad_logits_ptr + index * 2 + 1, grad_reward, mask=live)
        else:
            tl.store(grad_logits_ptr + index, grad_reward, mask=live)


_POOL = launch.Kernel(_pool_kernel, num_warps=4, enable_fp_fusion=True)
_POOL_BACKWARD = launch.Kernel(_pool_backward_kernel, num_warps=4, enable_fp_fusion=True)


def pool_triton(logits: Tensor, cu_seqlens: Tensor, gated: bool) -> tuple[Tensor, Tensor]:
    """`reference.pool` in one launch on the current stream.

    The values of `cu_seqlens` are checked unless a CUDA graph is being captured.
    """
    check_pool(logits, cu_seqlens, gated)
    if not (logits.is_cuda and torch.cuda.is_current_stream_capturing()):
        check_cu_seqlens(cu_seqlens, logits.shape[0])
    sequences, heads = cu_seqlens.shape[0] - 1, logits.shape[1] // (2 if gated else 1)
    scores = logits.new_empty(sequences, heads)
    gate_reward = logits.new_empty(logits.shape[0], heads, 2)
    _launch(_POOL, (logits, cu_seqlens, scores, gate_reward), scores, cu_seqlens, gated)
    return scores, gate_reward


def pool_backward_triton(
    grad_scores: Tensor, scores: Tensor, gate_reward: Tensor, cu_seqlens: Tensor, gated: bool
) -> Tensor:
    """`reference.pool_backward` in one launch on the current stream. `pool` has checked the values of `cu_seqlens`."""
    check_pool_backward(grad_scores, scores, gate_reward, cu_seqlens)
    tokens, heads, _ = gate_reward.shape
    grad_logits = gate_reward.new_empty(tokens, heads * (2 if gated else 1))
    if tokens:
        tensors = (grad_scores, scores, gate_reward, cu_seqlens, grad_logits)
        _launch(_POOL_BACKWARD, tensors, scores, cu_seqlens, gated)
    return grad_logits


def _launch(
    kernel: launch.Kernel, tensors: tuple[Tensor, ...], scores: Tensor, cu_seqlens: Tensor, gated: bool
) -> None:
    """One program for each score."""
    if not scores.numel():
        return
    constants = {"GATED": gated, "FLOOR": GATE_SUM_FLOOR, "BLOCK": BLOCK}
    with torch.cuda.device(scores.device) if scores.is_cuda else nullcontext():
        sequences, heads = scores.shape
        key = (gated, cu_seqlens.dtype)
        kernel.launch(key, scores.get_device(), (sequences, heads, 1), (*tensors, heads), constants)
