"""`project` and its gradient in Triton: two reads of the hidden states where the model left them, and no copy of them.

Forward, a program reduces one chunk of FEATURE_CHUNK columns of a few tokens to a partial sum for each output, and a
second launch adds the partials of a token in order: as in `score_step`, what a token gets depends on widths and dtype
alone, never on the tokens beside it. Backward, a program sums a chunk over a range of tokens for each output, and a
second launch adds the ranges in order. Outputs share a read of the hidden states in groups, of MAX_OUTPUTS forward.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from swift_kernels.checks import FEATURE_CHUNK, check_project, check_project_backward, partials_per_row
from swift_kernels.ops import launch
from swift_kernels.ops.chunks import (
    NUM_WARPS,
    SPAN,
    aligned_entries,
    chunk_constants,
    dot,
    load_chunk,
    select,
    strides_in_vectors,
    tile_of,
    vector_elements,
)

MAX_OUTPUTS = 16
"""Outputs that share a read of the hidden states forward: those of eight heads with a gate."""
MAX_GRAD_OUTPUTS, MAX_GRAD_OUTPUTS_ODD = 8, 4
"""The same backward, where a thread keeps 8 sums of each output in registers; and where odd widths make it load columns
one by one, each with an address of its own."""
GRAD_BLOCK, MAX_SPLITS, PROGRAMS = 256, 16, 2048
"""Backward, the longest run of tokens that are added one after the other, and the shortest range of them for a program.
There are MAX_SPLITS ranges at most, or where the entries make few chunks as many as it takes to have PROGRAMS programs:
their sums take 16 times the memory of dW, or 8 MB an output."""
ADD_BLOCK = 512
"""Elements of a program that adds partial sums."""


@triton.jit(do_not_specialize=["partials_ptr", "tokens", "first_output", "outputs"])
def _project_kernel(
    hidden_states,  # tuple of pointers, one an entry
    row_strides,  # tuple of ints, in units of VECTOR elements: one an entry, or a single one where all are equal
    weight_ptr,
    partials_ptr,
    tokens,
    first_output,
    outputs,
    WIDTHS: tl.constexpr,
    FIRST_CHUNKS: tl.constexpr,
    FIRST_FEATURES: tl.constexpr,
    FEATURES: tl.constexpr,
    VECTOR: tl.constexpr,
    SPAN: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    FULL: tl.constexpr,
    OUTPUT_BLOCK: tl.constexpr,
):
    # Programs that run at once share a chunk, and find its weight in L1. Each takes two tiles of rows for a load of it.
    # The compiler keeps them in fp32: with more, only one program would fit a multiprocessor.
    token_block = tl.program_id(0)
    chunk = tl.program_id(1)
    row = token_block.to(tl.int64) * (2 * TILE_ROWS) + tl.arange(0, TILE_ROWS)[:, None]
    entry_ptr = select(chunk, hidden_states, FIRST_CHUNKS)
    row_stride = row_strides[0] if len(row_strides) == 1 else select(chunk, row_strides, FIRST_CHUNKS)
    width = select(chunk, WIDTHS, FIRST_CHUNKS)
    first_column = (chunk - select(chunk, FIRST_CHUNKS, FIRST_CHUNKS)) * (SPAN * 4)
    column = first_column + tl.arange(0, SPAN)[None, :]
    if VECTOR == 1:
        # As in score_step: 0, which hides from the compiler what alignment it might know of.
        column += tl.minimum(tokens, 0)

    next_row = row + TILE_ROWS
    x = load_chunk(entry_ptr + row * row_stride * VECTOR + column, column, width, row < tokens, SPAN, FULL)
    next_x = load_chunk(
        entry_ptr + next_row * row_stride * VECTOR + column, column, width, next_row < tokens, SPAN, FULL
    )
    # A tile as tall as those of the hidden states, its rows alike: all get one layout, and nothing is exchanged.
    weight_ptrs = weight_ptr + select(chunk, FIRST_FEATURES, FIRST_CHUNKS) + column + tl.zeros_like(row)
    lane = tl.arange(0, 2 * OUTPUT_BLOCK)[None, :]
    sums = tl.zeros((TILE_ROWS, 2 * OUTPUT_BLOCK), tl.float32)
    for output in tl.range(0, outputs):
        output_ptrs = weight_ptrs + (first_output + output).to(tl.int64) * FEATURES
        weight = load_chunk(output_ptrs, column, width, row >= 0, SPAN, FULL)
        sums = tl.where(lane == output, dot(x, weight), sums)
        sums = tl.where(lane == OUTPUT_BLOCK + output, dot(next_x, weight), sums)
    lane_row = row + lane // OUTPUT_BLOCK * TILE_ROWS
    lane_output = lane % OUTPUT_BLOCK
    partials_ptrs = partials_ptr + (chunk.to(tl.int64) * tokens + lane_row) * outputs + lane_output
    tl.store(partials_ptrs, sums, mask=(lane_row < tokens) & (lane_output < outputs))


@triton.jit
def _load_row(row_ptr, row, rows, column, width):
    return tl.load(row_ptr + column, mask=column < tl.where(row < rows, width, 0), other=0.0)


@triton.jit
def _load_four(row_ptr, row_stride, row, rows, column, width):
    return (
        _load_row(row_ptr, row, rows, column, width),
        _load_row(row_ptr + row_stride, row + 1, rows, column, width),
        _load_row(row_ptr + row_stride * 2, row + 2, rows, column, width),
        _load_row(row_ptr + row_stride * 3, row + 3, rows, column, width),
    )


@triton.jit(
    do_not_specialize=[
        "grad_logits_ptr",
        "sums_ptr",
        "tokens",
        "split_tokens",
        "first_output",
        "outputs",
        "all_outputs",
    ]
)
def _project_backward_kernel(
    hidden_states,  # as in _project_kernel
    row_strides,
    grad_logits_ptr,
    sums_ptr,
    tokens,
    split_tokens,
    first_output,
    outputs,
    all_outputs,
    WIDTHS: tl.constexpr,
    FIRST_CHUNKS: tl.constexpr,
    FIRST_FEATURES: tl.constexpr,
    FEATURES: tl.constexpr,
    VECTOR: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    OUTPUT_BLOCK: tl.constexpr,
):
    chunk = tl.program_id(0)
    split = tl.program_id(1).to(tl.int64)
    entry_ptr = select(chunk, hidden_states, FIRST_CHUNKS)
    row_stride = row_strides[0] if len(row_strides) == 1 else select(chunk, row_strides, FIRST_CHUNKS)
    width = select(chunk, WIDTHS, FIRST_CHUNKS)
    first_column = (chunk - select(chunk, FIRST_CHUNKS, FIRST_CHUNKS)) * CHUNK
    column = first_column + tl.arange(0, CHUNK)[None, :]
    if VECTOR == 1:
        column += tl.minimum(tokens, 0)  # as in _project_kernel

    output = tl.arange(0, OUTPUT_BLOCK)
    sums_ptr += (split * all_outputs + first_output) * FEATURES + select(chunk, FIRST_FEATURES, FIRST_CHUNKS)
    sums_ptrs = sums_ptr + column + output[:, None] * FEATURES
    if VECTOR > 1:
        sums_ptrs = tl.multiple_of(sums_ptrs, (1, 16))
    stored = (output < outputs)[:, None] & (column < width)
    first_row = split * split_tokens
    last_row = tl.minimum(first_row + split_tokens, tokens)
    row_stride = tl.cast(row_stride, tl.int64) * VECTOR
    row_ptr = entry_ptr + first_row * row_stride
    grad_ptr = grad_logits_ptr + first_row * all_outputs + first_output
    for first_of_block in tl.range(first_row, last_row, BLOCK):
        # A thread keeps the sums of its columns for every output and meets no other. Rows follow each other, four of
        # them under way at a time.
        rows = tl.minimum(last_row - first_of_block, BLOCK).to(tl.int32)
        sums = tl.zeros((OUTPUT_BLOCK, CHUNK), tl.float32)
        x = _load_four(row_ptr, row_stride, 0, rows, column, width)
        for row in tl.range(0, rows, 4):
            row_ptr += row_stride * 4
            next_x = _load_four(row_ptr, row_stride, row + 4, rows, column, width)
            for i in tl.static_range(4):
                grad = tl.load(grad_ptr + output, mask=output < tl.where(row + i < rows, outputs, 0), other=0.0)
                sums += grad[:, None] * x[i].to(tl.float32)
                grad_ptr += all_outputs
            x = next_x
        # The sums of blocks are added up in memory: registers hold no second set, and one sum over all rows would round
        # to one side for as long as its exponent stays the same.
        if first_of_block > first_row:
            sums += tl.load(sums_ptrs, mask=stored, other=0.0)
        tl.store(sums_ptrs, sums, mask=stored)
        tl.debug_barrier()  # another thread may load what this one has stored


@triton.jit(
    do_not_specialize=[
        "parts_ptr",
        "bias_ptr",
        "out_ptr",
        "parts",
        "elements",
        "outputs",
        "first_output",
        "all_outputs",
    ]
)
def _add_parts_kernel(
    parts_ptr,  # [parts, rows, outputs]
    bias_ptr,  # [all_outputs], or None
    out_ptr,  # [rows, all_outputs]
    parts,
    elements,
    outputs,
    first_output,
    all_outputs,
    BLOCK: tl.constexpr,
):
    """Adds the parts in order, then the bias: the columns of `out` from `first_output` on."""
    element = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for first in tl.range(0, parts, 16):
        for i in tl.static_range(16):  # so many loads are under way at a time
            inside = element < tl.where(first + i < parts, elements, 0)
            total += tl.load(parts_ptr + element, mask=inside, other=0.0)
            parts_ptr += elements
    column = first_output + element % outputs
    if bias_ptr is not None:
        total += tl.load(bias_ptr + column).to(tl.float32)
    tl.store(out_ptr + element // outputs * all_outputs + column, total, mask=element < elements)


_PROJECT = launch.Kernel(_project_kernel, num_warps=NUM_WARPS, enable_fp_fusion=True)
_PROJECT_BACKWARD = {
    registers: launch.Kernel(
        _project_backward_kernel,
        num_warps=NUM_WARPS // 2,
        enable_fp_fusion=True,
        # Left to itself, ptxas keeps a few values in memory to have one program more on a multiprocessor. AMD has no
        # such option.
        **({} if torch.version.hip else {"maxnreg": registers}),
    )
    for registers in (128, 255)
}
"""By the most registers of a thread."""
_ADD_PARTS = launch.Kernel(_add_parts_kernel, num_warps=4, enable_fp_fusion=True)


def project_constants(hidden_states: Sequence[Tensor], outputs: int) -> dict[str, Any]:
    """The compile-time constants of `_project_kernel`."""
    widths = [entry.shape[1] for entry in hidden_states]
    vector = vector_elements(hidden_states)
    constants = chunk_constants(widths)
    del constants["CHUNKS"]
    return {
        **constants,
        "VECTOR": vector,
        "SPAN": SPAN,
        "TILE_ROWS": tile_of(vector)[0],
        "FULL": all(width % FEATURE_CHUNK == 0 for width in widths),
        "OUTPUT_BLOCK": triton.next_power_of_2(outputs),
    }


def project_backward_constants(hidden_states: Sequence[Tensor], outputs: int) -> dict[str, Any]:
    """The compile-time constants of `_project_backward_kernel`."""
    constants = chunk_constants([entry.shape[1] for entry in hidden_states])
    del constants["CHUNKS"]
    return {
        **constants,
        "VECTOR": vector_elements(hidden_states),
        "CHUNK": FEATURE_CHUNK,
        "BLOCK": GRAD_BLOCK,
        "OUTPUT_BLOCK": triton.next_power_of_2(outputs),
    }


def project_backward_registers(constants: dict[str, Any]) -> int:
    """How many registers a thread of `_project_backward_kernel` may take. Half of them do for a single head."""
    return 128 if constants["VECTOR"] > 1 and constants["OUTPUT_BLOCK"] <= 2 else 255


def project_triton(hidden_states: Sequence[Tensor], weight: Tensor, bias: Tensor) -> Tensor:
    """`reference.project` on the current stream."""
    check_project(hidden_states, weight, bias)
    tokens, all_outputs = hidden_states[0].shape[0], weight.shape[0]
    chunks = partials_per_row([entry.shape[1] for entry in hidden_states])
    if not tokens or not chunks:
        return bias.float().expand(tokens, -1).clone()
    logits = torch.empty(tokens, all_outputs, dtype=torch.float32, device=weight.device)
    partials = logits.new_empty(chunks, tokens, min(all_outputs, MAX_OUTPUTS))
    if weight.data_ptr() % 16:
        weight = weight.clone()
    entries = aligned_entries(hidden_states)
    row_strides = strides_in_vectors(entries)
    with _on_device_of(weight):
        for first, outputs in _groups(all_outputs, MAX_OUTPUTS):
            constants = project_constants(entries, outputs)
            _PROJECT.launch(
                (*_specialised(entries, row_strides), weight.dtype, *constants.values()),
                weight.get_device(),
                (triton.cdiv(tokens, 2 * constants["TILE_ROWS"]), chunks, 1),
                (entries, row_strides, weight, partials, tokens, first, outputs),
                constants,
            )
            _add_parts(partials, bias, logits, chunks, tokens * outputs, outputs, first)
    return logits


def project_backward_triton(hidden_states: Sequence[Tensor], grad_logits: Tensor) -> Tensor:
    """`reference.project_backward` on the current stream."""
    check_project_backward(hidden_states, grad_logits)
    tokens, all_outputs = grad_logits.shape
    widths = [entry.shape[1] for entry in hidden_states]
    chunks = partials_per_row(widths)
    if not tokens or not chunks:
        return grad_logits.new_zeros(all_outputs, sum(widths))
    splits, split_tokens = token_splits(tokens, chunks)
    sums = grad_logits.new_empty(splits, all_outputs, sum(widths))
    entries = aligned_entries(hidden_states)
    row_strides = strides_in_vectors(entries)
    with _on_device_of(grad_logits):
        most = MAX_GRAD_OUTPUTS if vector_elements(entries) > 1 else MAX_GRAD_OUTPUTS_ODD
        for first, outputs in _groups(all_outputs, most):
            constants = project_backward_constants(entries, outputs)
            _PROJECT_BACKWARD[project_backward_registers(constants)].launch(
                (*_specialised(entries, row_strides), *constants.values()),
                grad_logits.get_device(),
                (chunks, splits, 1),
                (entries, row_strides, grad_logits, sums, tokens, split_tokens, first, outputs, all_outputs),
                constants,
            )
        if splits == 1:
            return sums[0]
        grad_weight = torch.empty_like(sums[0])
        _add_parts(sums, None, grad_weight.view(1, -1), splits, grad_weight.numel(), grad_weight.numel(), 0)
    return grad_weight


def token_splits(tokens: int, chunks: int) -> tuple[int, int]:
    """Number and length of the backward's ranges of tokens: from shapes alone, as the order of additions has to be."""
    most = max(MAX_SPLITS, triton.cdiv(PROGRAMS, chunks))
    length = triton.cdiv(tokens, min(triton.cdiv(tokens, GRAD_BLOCK), most))
    return triton.cdiv(tokens, length), length


def _add_parts(
    parts: Tensor, bias: Tensor | None, out: Tensor, count: int, elements: int, outputs: int, first_output: int
) -> None:
    _ADD_PARTS.launch(
        (elements < 2**31, None if bias is None else bias.dtype),
        out.get_device(),
        (triton.cdiv(elements, ADD_BLOCK), 1, 1),
        (parts, bias, out, count, elements, outputs, first_output, out.shape[1]),
        {"BLOCK": ADD_BLOCK},
    )


def _groups(outputs: int, most: int) -> Iterator[tuple[int, int]]:
    """First output and number of outputs of every group."""
    for first in range(0, outputs, most):
        yield first, min(most, outputs - first)


def _specialised(entries: Sequence[Tensor], row_strides: Sequence[int]) -> tuple[Any, ...]:
    """What Triton compiles for of entries and strides."""
    aligned = tuple(entry.data_ptr() % 16 == 0 for entry in entries)
    return entries[0].dtype, aligned, *map(launch.specialised, row_strides)


def _on_device_of(tensor: Tensor) -> AbstractContextManager[None]:
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()
