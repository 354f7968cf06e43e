"""`score_step` in Triton: one launch reads every entry where the model left it and updates the running means.

A program reduces one chunk of FEATURE_CHUNK columns for a block of rows to two fp32 partial sums a row. A warp holds
whole rows of a chunk, so the order in which a row is added up depends on its width and dtype alone, never on the rows
beside it. The last program to arrive at a row block adds the block's partials in order and updates the state.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from swift_kernels.checks import FEATURE_CHUNK, check_slots, check_step, debug_checks
from swift_kernels.ops import launch
from swift_kernels.ops.chunks import (
    NUM_WARPS,
    SPAN,
    aligned_entries,
    chunk_constants,
    dot,
    load_chunk,
    row_stride,
    select,
    strides_in_vectors,
    tile_of,
    vector_elements,
)


@triton.jit
def _update_state(
    bias_ptr,
    slots_ptr,
    sums_ptr,
    token_count_ptr,
    partials_ptr,
    gate_reward_ptr,
    row_block,
    rows,
    slot_count,
    CHUNKS: tl.constexpr,
    GATED: tl.constexpr,
    ROW_BLOCK: tl.constexpr,
):
    """Adds the partials of a row block, in order, and updates the slots its rows are routed to."""
    row = row_block.to(tl.int64) * ROW_BLOCK + tl.arange(0, ROW_BLOCK)
    slot = tl.load(slots_ptr + row, mask=row < rows, other=-1)
    # A slot that is none would be written far from the state; on a GPU nobody else has looked at it.
    live = (slot >= 0) & (slot < slot_count)
    # Everything that does not depend on the partials is loaded before them, to wait for memory once.
    bias_reward = tl.load(bias_ptr + (1 if GATED else 0)).to(tl.float32)
    bias_gate = tl.load(bias_ptr).to(tl.float32)
    weighted_ptrs = sums_ptr + slot * 2
    weighted = tl.load(weighted_ptrs, mask=live, other=0.0)
    gates = tl.load(weighted_ptrs + 1, mask=live, other=0.0)
    count = tl.load(token_count_ptr + slot, mask=live, other=0)

    output = tl.arange(0, 2)[None, None, :]
    totals = tl.zeros((ROW_BLOCK, 32, 2), tl.float32)
    for batch in tl.range(0, CHUNKS, 256):  # eight loads at a time: enough to cover the latency, few enough registers
        for start in tl.static_range(0, CHUNKS if CHUNKS < 256 else 256, 32):
            chunk = batch + start + tl.arange(0, 32)[None, :, None]
            # Other multiprocessors wrote these: read them from L2, whatever this one's L1 holds.
            totals += tl.load(
                partials_ptr + (row[:, None, None] * CHUNKS + chunk) * 2 + output,
                mask=live[:, None, None] & (chunk < CHUNKS),
                other=0.0,
                cache_modifier=".cg",
            )
    gate, reward = tl.split(tl.sum(totals, axis=1))
    reward += bias_reward
    gate = tl.sigmoid(gate + bias_gate) if GATED else tl.full((ROW_BLOCK,), 1.0, tl.float32)

    tl.store(weighted_ptrs, tl.fma(gate, reward, weighted), mask=live)
    tl.store(weighted_ptrs + 1, gates + gate, mask=live)
    tl.store(token_count_ptr + slot, count + 1, mask=live)
    if gate_reward_ptr is not None:
        tl.store(gate_reward_ptr + row * 2, gate, mask=live)
        tl.store(gate_reward_ptr + row * 2 + 1, reward, mask=live)


# Triton compiles a variant for each divisibility by 16, and for the value 1, of what it specialises on. These arguments
# gain nothing from it, and no batch size should compile in the middle of serving.
@triton.jit(
    do_not_specialize=[
        "bias_ptr",
        "slots_ptr",
        "sums_ptr",
        "token_count_ptr",
        "arrivals_ptr",
        "gate_reward_ptr",
        "rows",
        "slot_count",
    ]
)
def _score_step_kernel(
    hidden_states,  # tuple of pointers, one an entry
    row_strides,  # tuple of ints, in units of VECTOR elements: one an entry, or a single one where all are equal
    weight_ptr,
    bias_ptr,
    slots_ptr,
    sums_ptr,
    token_count_ptr,
    partials_ptr,
    arrivals_ptr,
    gate_reward_ptr,
    rows,
    slot_count,
    WIDTHS: tl.constexpr,
    FIRST_CHUNKS: tl.constexpr,
    FIRST_FEATURES: tl.constexpr,
    FEATURES: tl.constexpr,
    CHUNKS: tl.constexpr,
    GATED: tl.constexpr,
    VECTOR: tl.constexpr,
    SPAN: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILES: tl.constexpr,
    FULL: tl.constexpr,
    RELEASE_EACH_WARP: tl.constexpr,
):
    chunk = tl.program_id(0)
    row_block = tl.program_id(1)
    ROW_BLOCK: tl.constexpr = TILES * TILE_ROWS

    row = row_block.to(tl.int64) * ROW_BLOCK + tl.arange(0, TILE_ROWS)[:, None]
    live = tl.zeros((TILE_ROWS, 1), tl.int32)  # bit i: whether this row of tile i is scored
    for tile in tl.static_range(TILES):
        tile_row = row + tile * TILE_ROWS
        slot = tl.load(slots_ptr + tile_row, mask=tile_row < rows, other=-1)
        live |= (slot >= 0).to(tl.int32) << tile

    entry_ptr = select(chunk, hidden_states, FIRST_CHUNKS)
    row_stride = row_strides[0] if len(row_strides) == 1 else select(chunk, row_strides, FIRST_CHUNKS)
    width = select(chunk, WIDTHS, FIRST_CHUNKS)
    first_column = (chunk - select(chunk, FIRST_CHUNKS, FIRST_CHUNKS)) * (SPAN * 4)
    column = first_column + tl.arange(0, SPAN)[None, :]
    if VECTOR == 1:
        # The layout, and with it the order of additions, must not change with the alignment of one batch's tensors.
        # This is 0, and hides from the compiler what it might know of it.
        column += tl.minimum(rows, 0)

    # A tile as tall as that of the hidden states, its rows alike: both get one layout, and the weight needs no exchange
    # between threads. A warp without a live row does not load it.
    weight_ptrs = weight_ptr + select(chunk, FIRST_FEATURES, FIRST_CHUNKS) + column + tl.zeros_like(live)
    reward_weight = load_chunk(weight_ptrs + (FEATURES if GATED else 0), column, width, live != 0, SPAN, FULL)
    if GATED:
        gate_weight = load_chunk(weight_ptrs, column, width, live != 0, SPAN, FULL)

    # Lane 2 i keeps the gate and lane 2 i + 1 the reward of this warp's row of tile i.
    lane = tl.arange(0, 32)[None, :]
    sums = tl.zeros((TILE_ROWS, 32), tl.float32)
    for tile in tl.static_range(TILES):
        x_ptrs = entry_ptr + (row + tile * TILE_ROWS) * row_stride * VECTOR + column
        x = load_chunk(x_ptrs, column, width, ((live >> tile) & 1) != 0, SPAN, FULL)
        sums = tl.where(lane == 2 * tile + 1, dot(x, reward_weight), sums)
        if GATED:
            sums = tl.where(lane == 2 * tile, dot(x, gate_weight), sums)
    tl.store(
        partials_ptr + ((row + lane // 2 * TILE_ROWS) * CHUNKS + chunk) * 2 + lane % 2,
        sums,
        mask=(lane < 2 * TILES) & (((live >> (lane // 2)) & 1) != 0),
    )

    # One thread counts for the whole program: the barrier puts the stores of all before its release. On AMD a barrier
    # does not wait for stores to global memory, so there every wavefront releases its own first, by adding nothing.
    if RELEASE_EACH_WARP:
        counter_ptrs = arrivals_ptr + row_block + tl.zeros((TILE_ROWS, 32), tl.int32)
        tl.atomic_add(counter_ptrs, 0, mask=lane == 0, sem="release", scope="gpu")
    tl.debug_barrier()
    if tl.atomic_add(arrivals_ptr + row_block, 1, sem="acq_rel", scope="gpu") == CHUNKS - 1:
        _update_state(
            bias_ptr,
            slots_ptr,
            sums_ptr,
            token_count_ptr,
            partials_ptr,
            gate_reward_ptr,
            row_block,
            rows,
            slot_count,
            CHUNKS,
            GATED,
            ROW_BLOCK,
        )
        # Ready for the next launch, also when a CUDA graph is replayed.
        tl.store(arrivals_ptr + row_block, 0)


_KERNEL = launch.Kernel(
    _score_step_kernel,
    num_warps=NUM_WARPS,
    enable_fp_fusion=True,  # Triton 3.10 changes the default, and with it the last bits of a score
)


@dataclass
class _Plan:
    """What a launch needs beside addresses."""

    device: int
    entries: int
    rows: int
    slot_count: int
    grid: launch.Grid
    row_strides: tuple[int, ...]
    constants: dict[str, Any]
    strides_aligned: bool
    """Whether the strides allow 16-byte loads, which the widths call for."""
    build: Any = None
    """What was compiled for addresses that are multiples of 16. None before it is launched from this plan, and for
    good while SWIFT_KERNELS_DEBUG asks for checks of every step."""
    tail: tuple[Any, ...] = ()
    """The arguments of `build` that follow the last tensor."""


_PLANS = launch.Plans[_Plan]()


def _make_plan(hidden_states: Sequence[Tensor], weight: Tensor, slot_count: int) -> _Plan:
    rows, widths = hidden_states[0].shape[0], tuple(entry.shape[1] for entry in hidden_states)
    vector = vector_elements(hidden_states)
    tile_rows, tiles = tile_of(vector)
    constants = {
        **chunk_constants(widths),
        "GATED": weight.shape[0] == 2,
        "VECTOR": vector,
        "SPAN": SPAN,
        "TILE_ROWS": tile_rows,
        "TILES": tiles,
        "FULL": all(width % FEATURE_CHUNK == 0 for width in widths),
        "RELEASE_EACH_WARP": torch.version.hip is not None,
    }
    return _Plan(
        device=weight.get_device(),
        entries=len(hidden_states),
        rows=rows,
        slot_count=slot_count,
        grid=(constants["CHUNKS"], triton.cdiv(rows, tiles * tile_rows), 1),
        row_strides=strides_in_vectors(hidden_states),
        constants=constants,
        strides_aligned=all(row_stride(entry) % vector == 0 for entry in hidden_states),
    )


def score_step_triton(
    hidden_states: Sequence[Tensor],
    weight: Tensor,
    bias: Tensor,
    slots: Tensor,
    sums: Tensor,
    token_count: Tensor,
    partials: Tensor,
    arrivals: Tensor,
    gate_reward: Tensor | None = None,
) -> None:
    """`reference.score_step` in one launch on the current stream; see `schema.score_step` for the arguments."""
    arguments = (weight, bias, slots, sums, token_count, partials, arrivals, gate_reward)
    tensors = _tensors(hidden_states, *arguments)
    plan = _PLANS.find(tensors)
    if plan is None:

        def check_and_make_plan() -> _Plan:
            check_step(hidden_states, *arguments)
            return _make_plan(hidden_states, weight, sums.shape[0])

        plan = _PLANS.find_or_make(check_and_make_plan, tensors)
    elif _launch_again(plan, tensors):
        return
    debug = debug_checks()
    if debug:
        check_slots(slots, sums.shape[0])
    if not plan.rows:
        return
    if sums.is_cuda and plan.device != launch.current_device():
        with torch.cuda.device(plan.device):
            return score_step_triton(hidden_states, *arguments)
    entries_aligned = tuple(entry.data_ptr() % 16 == 0 for entry in hidden_states)
    if plan.constants["VECTOR"] > 1 and not (plan.strides_aligned and all(entries_aligned)):
        return score_step_triton(aligned_entries(hidden_states), *arguments)

    others_aligned = (weight.data_ptr() % 16 == 0, partials.data_ptr() % 16 == 0)
    specialised = (entries_aligned, others_aligned, tuple(map(launch.specialised, plan.row_strides)))
    build = _KERNEL.launch(
        (hidden_states[0].dtype, weight.dtype, gate_reward is None, specialised, *plan.constants.values()),
        plan.device,
        plan.grid,
        (
            tuple(hidden_states),
            plan.row_strides,
            *arguments,
            plan.rows,
            plan.slot_count,
        ),  # a tuple: Triton takes no list
        plan.constants,
    )
    if all(entries_aligned) and all(others_aligned) and not debug:
        plan.tail = ((None,) if gate_reward is None else ()) + (
            plan.rows,
            plan.slot_count,
            *plan.constants.values(),
        )
        plan.build = build


def score_step_eager(*arguments: Any) -> Any:
    """`score_step_triton` past the dispatcher; NotImplemented where something may have to see the op on its way.

    Boxing the tensors of 33 entries and unboxing them again takes the dispatcher 8 us of 20.
    """
    if launch.is_watched():
        return NotImplemented
    tensors = _tensors(*arguments)
    plan = _PLANS.find(tensors)
    if plan is None and not launch.are_plain(tensors):
        return NotImplemented
    if plan is None or not _launch_again(plan, tensors):
        score_step_triton(*arguments)
    return None


def _tensors(hidden_states: Sequence[Tensor], *arguments: Any) -> tuple[Tensor, ...]:
    return (*hidden_states, *(arguments[:-1] if arguments[-1] is None else arguments))


def _launch_again(plan: _Plan, tensors: tuple[Tensor, ...]) -> bool:
    """Launches what was launched before for tensors like these, unless they are aligned otherwise."""
    if plan.build is None or plan.device != launch.current_device():
        return False
    addresses = tuple(map(Tensor.data_ptr, tensors))
    entries, others = addresses[: plan.entries], addresses[plan.entries :]
    # What the build relies on: every entry, the weight and the partials begin at multiples of 16 bytes.
    if functools.reduce(operator.or_, entries, others[0] | others[5]) % 16:
        return False
    launch.run_build(plan.build, plan.device, plan.grid, (entries, plan.row_strides, *others, *plan.tail))
    return True
