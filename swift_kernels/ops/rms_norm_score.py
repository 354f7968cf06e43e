"""`rms_norm` and `rms_norm_score` in Triton: the dot products of an entry are taken where its norm has the row anyway.

A program takes one row. Up to MAX_BLOCK columns all of it lies in registers, so that a hidden state is read once. The
order in which a row is added up depends on its width and dtype alone. The steps of one head are launches of one stream:
what an earlier entry's launch stored in `partials`, a later one may read, with no fence and no atomic.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence
from dataclasses import dataclass, replace
from operator import attrgetter
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from swift_kernels.checks import check_rms_norm, check_rms_norm_score, check_slots, debug_checks
from swift_kernels.ops import launch
from swift_kernels.ops.chunks import row_stride, vector_elements

MAX_BLOCK, WIDE_BLOCK = 8192, 4096
"""Columns that fit the registers of a program on any GPU, beside as many of an fp32 head. Wider rows are taken in
blocks of WIDE_BLOCK and read twice, the second time from L1 or L2."""
COLUMNS_PER_THREAD = 16
"""Two 16-byte loads of a 16-bit hidden state, two of the norm's weight and eight of an fp32 head, under way together.
With fewer columns the sums cross more warps, with more the loads of a warp queue up."""
WARP_SIZE = 64 if torch.version.hip else 32
MAX_THREADS = MAX_BLOCK // COLUMNS_PER_THREAD


@triton.jit
def _pointers(ptr, column, ALIGNMENT: tl.constexpr):
    """ALIGNMENT promises that `ptr + column` begins at a multiple of so many bytes, and with it loads as wide.

    No pointer is specialised on its own alignment: there is one build, and one order of additions.
    """
    ptrs = ptr + column
    return tl.multiple_of(ptrs, ALIGNMENT) if ALIGNMENT > 0 else ptrs


@triton.jit
def _load_block(
    row_ptr,
    norm_weight_ptr,
    weight_ptr,
    column,
    scored_width,
    WIDTH: tl.constexpr,
    FEATURES: tl.constexpr,
    GATED: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    WEIGHT_ALIGNMENT: tl.constexpr,
):
    """Hidden state, norm weight, gate weight and reward weight of these columns, the last two up to `scored_width`."""
    inside = column < WIDTH
    x = tl.load(_pointers(row_ptr, column, ALIGNMENT), mask=inside, other=0.0)
    norm_weight = tl.load(_pointers(norm_weight_ptr, column, ALIGNMENT), mask=inside, other=0.0)
    gate_weight, reward_weight = norm_weight, norm_weight
    if weight_ptr is not None:
        reward_ptrs = _pointers(weight_ptr + (FEATURES if GATED else 0), column, WEIGHT_ALIGNMENT)
        reward_weight = tl.load(reward_ptrs, mask=column < scored_width, other=0.0)
        if GATED:
            gate_weight = tl.load(
                _pointers(weight_ptr, column, WEIGHT_ALIGNMENT), mask=column < scored_width, other=0.0
            )
    return x, norm_weight, gate_weight, reward_weight


@triton.jit
def _normalise_block(
    block,
    scale,
    output_ptr,
    column,
    gate_products,
    reward_products,
    WIDTH: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    UNIT_OFFSET: tl.constexpr,
    ROUND_FIRST: tl.constexpr,
    SCORED: tl.constexpr,
    SCORE_OUTPUT: tl.constexpr,
    GATED: tl.constexpr,
):
    """Stores what the norm returns for a block of `_load_block`, and adds the products of the head to those before."""
    x, norm_weight, gate_weight, reward_weight = block
    # Products are taken in fp32, where that of two 16-bit values is exact, and rounded where the reference rounds.
    normalised = x.to(tl.float32) * scale
    if UNIT_OFFSET:
        output = (normalised * (1.0 + norm_weight.to(tl.float32))).to(x.dtype)
    else:
        if ROUND_FIRST:
            normalised = normalised.to(x.dtype).to(tl.float32)
        output = (norm_weight.to(tl.float32) * normalised).to(x.dtype)
    tl.store(_pointers(output_ptr, column, ALIGNMENT), output, mask=column < WIDTH)
    if SCORED:
        scored = (output if SCORE_OUTPUT else x).to(tl.float32)
        reward_products += scored * reward_weight.to(tl.float32)
        if GATED:
            gate_products += scored * gate_weight.to(tl.float32)
    return gate_products, reward_products


# No argument is specialised on: the plan says all there is to say, and no batch size compiles in the middle of serving.
@triton.jit(
    do_not_specialize=[
        "hidden_states_ptr",
        "norm_weight_ptr",
        "weight_ptr",
        "bias_ptr",
        "slots_ptr",
        "sums_ptr",
        "token_count_ptr",
        "partials_ptr",
        "gate_reward_ptr",
        "output_ptr",
        "row_stride",
        "eps",
        "entry",
        "first_feature",
        "partials_stride",
        "slot_count",
    ]
)
def _rms_norm_score_kernel(
    hidden_states_ptr,
    norm_weight_ptr,
    weight_ptr,  # from here to gate_reward_ptr, and the last four integers: None where nothing is scored
    bias_ptr,
    slots_ptr,
    sums_ptr,
    token_count_ptr,
    partials_ptr,
    gate_reward_ptr,
    output_ptr,
    row_stride,
    eps,
    entry,
    first_feature,
    partials_stride,
    slot_count,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    WEIGHT_ALIGNMENT: tl.constexpr,
    FEATURES: tl.constexpr,
    UNIT_OFFSET: tl.constexpr,
    ROUND_FIRST: tl.constexpr,
    GATED: tl.constexpr,
    SCORE_OUTPUT: tl.constexpr,
    LAST: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    hidden_states_ptr += row * row_stride
    output_ptr += row * WIDTH
    SCORED: tl.constexpr = weight_ptr is not None
    scored_width = 0  # of a row that is skipped, nothing of the head is loaded
    if SCORED:
        weight_ptr += first_feature
        slot = tl.load(slots_ptr + row)
        # A slot that is none would be written far from the state; on a GPU nobody else has looked at it.
        live = (slot >= 0) & (slot < slot_count)
        scored_width = tl.where(live, WIDTH, 0)

    # Everything of the first block, which is all there is of most rows, is under way before the first sum waits for it.
    first_block = _load_block(
        hidden_states_ptr,
        norm_weight_ptr,
        weight_ptr,
        column,
        scored_width,
        WIDTH,
        FEATURES,
        GATED,
        ALIGNMENT,
        WEIGHT_ALIGNMENT,
    )
    if LAST:
        live_entries = tl.where(live, entry, 0)
        # 32 entries at a time, by every warp for itself. Launches before this one on the stream wrote them.
        earlier_gates = tl.zeros((32,), tl.float32)
        earlier_rewards = tl.zeros((32,), tl.float32)
        for first in tl.range(0, live_entries, 32):
            earlier = first + tl.arange(0, 32)
            earlier_ptrs = partials_ptr + (row * partials_stride + earlier) * 2
            if GATED:
                earlier_gates += tl.load(earlier_ptrs, mask=earlier < live_entries, other=0.0)
            earlier_rewards += tl.load(earlier_ptrs + 1, mask=earlier < live_entries, other=0.0)

    squares = first_block[0].to(tl.float32) * first_block[0].to(tl.float32)
    for first in tl.range(BLOCK, WIDTH, BLOCK):
        inside = first + column < WIDTH
        x = tl.load(_pointers(hidden_states_ptr, first + column, ALIGNMENT), mask=inside, other=0.0).to(tl.float32)
        squares += x * x
    scale = tl.rsqrt(tl.sum(squares, axis=0) * (1.0 / WIDTH) + eps)

    nothing = tl.zeros((BLOCK,), tl.float32)
    gate_products, reward_products = _normalise_block(
        first_block,
        scale,
        output_ptr,
        column,
        nothing,
        nothing,
        WIDTH,
        ALIGNMENT,
        UNIT_OFFSET,
        ROUND_FIRST,
        SCORED,
        SCORE_OUTPUT,
        GATED,
    )
    for first in tl.range(BLOCK, WIDTH, BLOCK):
        block = _load_block(
            hidden_states_ptr,
            norm_weight_ptr,
            weight_ptr,
            first + column,
            scored_width,
            WIDTH,
            FEATURES,
            GATED,
            ALIGNMENT,
            WEIGHT_ALIGNMENT,
        )
        gate_products, reward_products = _normalise_block(
            block,
            scale,
            output_ptr,
            first + column,
            gate_products,
            reward_products,
            WIDTH,
            ALIGNMENT,
            UNIT_OFFSET,
            ROUND_FIRST,
            SCORED,
            SCORE_OUTPUT,
            GATED,
        )

    if SCORED and scored_width > 0:
        if GATED:  # side by side, the two sums cross from warp to warp at once
            gate, reward = tl.split(tl.sum(tl.join(gate_products, reward_products), axis=0))
        else:
            reward = tl.sum(reward_products, axis=0)
        if LAST:
            reward += tl.sum(earlier_rewards, axis=0) + tl.load(bias_ptr + (1 if GATED else 0)).to(tl.float32)
            gate = tl.sigmoid(gate + tl.sum(earlier_gates, axis=0) + tl.load(bias_ptr).to(tl.float32)) if GATED else 1.0
            weighted_ptr = sums_ptr + slot * 2
            tl.store(weighted_ptr, tl.load(weighted_ptr) + gate * reward)
            tl.store(weighted_ptr + 1, tl.load(weighted_ptr + 1) + gate)
            tl.store(token_count_ptr + slot, tl.load(token_count_ptr + slot) + 1)
            if gate_reward_ptr is not None:
                tl.store(gate_reward_ptr + row * 2, gate)
                tl.store(gate_reward_ptr + row * 2 + 1, reward)
        else:
            partial_ptr = partials_ptr + (row * partials_stride + entry) * 2
            if GATED:
                tl.store(partial_ptr, gate)
            tl.store(partial_ptr + 1, reward)


_KERNELS = {
    warps: launch.Kernel(
        _rms_norm_score_kernel,
        num_warps=warps,
        enable_fp_fusion=True,  # Triton 3.10 changes the default, and with it the last bits of a score
    )
    for warps in (1, 2, 4, 8, 16)
}


@dataclass
class _Plan:
    """What a launch needs beside addresses. The entries of a head that are alike share one."""

    device: int
    grid: launch.Grid
    row_stride: int
    row_stride_aligned: bool
    """Whether the row stride allows 16-byte loads, where the width calls for them."""
    aligned: int
    """How many of hidden states, norm weight and head weight, in this order, have to begin at multiples of 16 bytes."""
    features: int
    absent: tuple[None, ...]
    """Stands for the tensors that are not there."""
    constants: dict[str, Any]
    num_warps: int
    build: Any = None
    """The compiled kernel, once it was launched from this plan; None as long as SWIFT_KERNELS_DEBUG asks for checks."""


_PLANS = launch.Plans[_Plan]()


def _make_plan(
    tensors: Sequence[Tensor],
    unit_offset: bool,
    round_first: bool,
    first_feature_aligned: bool = False,
    score_output: bool = False,
    last: bool = False,
) -> _Plan:
    """`tensors` are those of the ops, in order."""
    hidden_states, weight = tensors[0], tensors[2] if len(tensors) > 2 else None
    rows, width = hidden_states.shape
    outputs, features = (0, 0) if weight is None else weight.shape
    vector = vector_elements([hidden_states])
    weight_alignment = 0
    if vector > 1 and weight is not None and first_feature_aligned:
        # As many columns of the head for each thread as of the hidden states, whose layout, and with it the bits of the
        # norm, stays as it is where nothing is scored.
        weight_alignment = min(vector * weight.element_size(), 16)
        if features * weight.element_size() % weight_alignment:
            weight_alignment = 0
    columns = max(triton.next_power_of_2(width), WARP_SIZE)
    constants = {
        "WIDTH": width,
        "BLOCK": columns if columns <= MAX_BLOCK else WIDE_BLOCK,
        "ALIGNMENT": 16 if vector > 1 else 0,
        "WEIGHT_ALIGNMENT": weight_alignment,
        "FEATURES": features,
        "UNIT_OFFSET": unit_offset,
        "ROUND_FIRST": round_first,
        "GATED": outputs == 2,
        "SCORE_OUTPUT": score_output,
        "LAST": last,
    }
    return _Plan(
        device=hidden_states.get_device(),
        grid=(rows, 1, 1),
        row_stride=row_stride(hidden_states),
        row_stride_aligned=row_stride(hidden_states) % vector == 0,
        aligned=0 if vector == 1 else 3 if weight_alignment else 2,
        features=features,
        absent=(None,) * (9 - len(tensors)),
        constants=constants,
        num_warps=max(min(columns // COLUMNS_PER_THREAD, MAX_THREADS) // WARP_SIZE, 1),
    )


def rms_norm_triton(
    hidden_states: Tensor,
    norm_weight: Tensor,
    eps: float,
    unit_offset: bool,
    round_first: bool,
    *,
    only_plain: bool = False,
) -> Tensor:
    """`reference.rms_norm` in one launch on the current stream.

    Returns NotImplemented for tensors that are not plain, if only plain ones are asked for.
    """
    tensors, flags = (hidden_states, norm_weight), (unit_offset, round_first)
    plan = _PLANS.find(tensors, *flags)
    if plan is None:
        if only_plain and not launch.are_plain(tensors):
            return NotImplemented

        def check_and_make_plan() -> _Plan:
            check_rms_norm(hidden_states, norm_weight)
            return _make_plan(tensors, *flags)

        plan = _PLANS.find_or_make(check_and_make_plan, tensors, *flags)
    return _launch(plan, tensors, eps, None, None, None, None)


def rms_norm_score_triton(
    hidden_states: Tensor,
    norm_weight: Tensor,
    eps: float,
    unit_offset: bool,
    round_first: bool,
    weight: Tensor,
    bias: Tensor,
    entry: int,
    first_feature: int,
    score_output: bool,
    last: bool,
    slots: Tensor,
    sums: Tensor,
    token_count: Tensor,
    partials: Tensor,
    gate_reward: Tensor | None = None,
    *,
    only_plain: bool = False,
) -> Tensor:
    """`reference.rms_norm_score` in one launch on the current stream; `only_plain` as in `rms_norm_triton`."""
    state = (slots, sums, token_count, partials, *(() if gate_reward is None else (gate_reward,)))
    tensors = (hidden_states, norm_weight, weight, bias, *state)

    def check() -> None:
        check_rms_norm_score(hidden_states, norm_weight, weight, bias, entry, first_feature, *state)

    flags = (unit_offset, round_first, first_feature % 8 == 0, score_output, last)
    plan = _PLANS.find(tensors, *flags)
    if plan is None:
        if only_plain and not launch.are_plain(tensors):
            return NotImplemented

        def check_and_make_plan() -> _Plan:
            check()
            return _make_plan(tensors, *flags)

        plan = _PLANS.find_or_make(check_and_make_plan, tensors, *flags)
    # The plan is that of every entry like this one.
    entries = partials.shape[1]
    if not (0 <= entry < entries and 0 <= first_feature <= plan.features - plan.constants["WIDTH"]):
        check()
    if plan.build is None and debug_checks():
        check_slots(slots, sums.shape[0])
    return _launch(plan, tensors, eps, entry, first_feature, entries, sums.shape[0])


def rms_norm_eager(*arguments: Any) -> Any:
    """`rms_norm_triton` past the dispatcher; NotImplemented where something may have to see the op on its way."""
    return NotImplemented if _is_looked_at() else rms_norm_triton(*arguments, only_plain=True)


def rms_norm_score_eager(*arguments: Any) -> Any:
    """`rms_norm_score_triton`, likewise."""
    return NotImplemented if _is_looked_at() else rms_norm_score_triton(*arguments, only_plain=True)


def _is_looked_at() -> bool:
    """Unlike `score_step`, these ops return something that a gradient may be asked of."""
    return torch.is_grad_enabled() or launch.is_watched()


def _launch(plan: _Plan, tensors: Sequence[Tensor], eps: float, *entry: int | None) -> Tensor:
    """Launches the plan; `entry` are the kernel's last four integers."""
    output = torch.empty_like(tensors[0], memory_format=torch.contiguous_format)
    if not output.numel():
        return output
    if output.is_cuda and plan.device != launch.current_device():
        with torch.cuda.device(plan.device):
            return _launch(plan, tensors, eps, *entry)
    addresses = tuple(map(Tensor.data_ptr, tensors))
    misaligned = functools.reduce(operator.or_, addresses[: plan.aligned], 0) % 16
    if misaligned or not plan.row_stride_aligned:
        # No model lays its hidden states out like this. Narrower loads would add a row up in another order, and its
        # score depend on where it lies: a copy keeps it bitwise the same.
        rows = tensors[0].clone(memory_format=torch.contiguous_format)
        weights = [weight.clone() if weight.data_ptr() % 16 else weight for weight in tensors[1 : plan.aligned]]
        plan = replace(plan, row_stride=rows.shape[1], row_stride_aligned=True)
        return _launch(plan, (rows, *weights, *tensors[plan.aligned :]), eps, *entry)

    integers = (plan.row_stride, float(eps), *entry)
    if plan.build is None:
        build = _KERNELS[plan.num_warps].launch(
            (plan.row_stride < 2**31, *map(attrgetter("dtype"), tensors), *plan.constants.values()),
            plan.device,
            plan.grid,
            (*tensors, *plan.absent, output, *integers),
            plan.constants,
        )
        if not debug_checks():
            plan.build = build
    else:
        arguments = (*addresses, *plan.absent, output.data_ptr(), *integers, *plan.constants.values())
        launch.run_build(plan.build, plan.device, plan.grid, arguments)
    return output
