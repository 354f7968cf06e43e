"""What the kernels that take dot products with every entry share: tiles, loads, and where an entry's chunks lie."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from swift_kernels.checks import FEATURE_CHUNK, partials_per_row

SPAN = FEATURE_CHUNK // 4
"""Columns of one load of a row: 32 lanes of 16 bytes in bf16 and fp16."""
TILE_ROWS, TILES = 8, 4
"""Rows of one load, a warp each (on AMD a wavefront of 64 lanes takes two), and the tiles of a program.

A program keeps its weight in registers for all its tiles: an fp32 weight then adds an eighth to the 16-bit hidden
states read through L2, and 64 rows still make two programs for each of 132 multiprocessors. On sm_90 that takes 128
registers: two programs on a multiprocessor, with some 20 loads in flight in each of their 512 threads."""
ODD_TILE_ROWS, ODD_TILES = 2, 8
"""The same where a width allows no 16-byte loads. All warps then share a row, and taller tiles run out of registers."""
NUM_WARPS = 4 if torch.version.hip else 8


@triton.jit
def select(chunk, values, FIRST_CHUNKS: tl.constexpr):
    """The element of `values` that belongs to the entry `chunk` lies in.

    A kernel cannot index its arguments at run time, and Triton 3.4 knows neither recursion nor growing tuples. Choosing
    within groups of eight first makes a chain of `len(values) / 8 + 8` dependent selects, not of `len(values)`.
    """
    selected = values[0]
    for group in tl.static_range(0, len(values), 8):
        candidate = values[group]
        for i in tl.static_range(group + 1, group + 8):
            if i < len(values):
                candidate = tl.where(chunk >= FIRST_CHUNKS[i], values[i], candidate)
        selected = tl.where(chunk >= FIRST_CHUNKS[group], candidate, selected)
    return selected


@triton.jit
def _load_span(ptrs, column, width, live, FULL: tl.constexpr):
    if FULL:
        return tl.load(ptrs, mask=live, other=0.0)
    else:
        return tl.load(ptrs, mask=live & (column < width), other=0.0)


@triton.jit
def load_chunk(ptrs, column, width, live, SPAN: tl.constexpr, FULL: tl.constexpr):
    """The four spans of a chunk, each a `[TILE_ROWS, SPAN]` tile. FULL: no chunk reaches beyond its entry's width."""
    return (
        _load_span(ptrs, column, width, live, FULL),
        _load_span(ptrs + SPAN, column + SPAN, width, live, FULL),
        _load_span(ptrs + 2 * SPAN, column + 2 * SPAN, width, live, FULL),
        _load_span(ptrs + 3 * SPAN, column + 3 * SPAN, width, live, FULL),
    )


@triton.jit
def dot(x, weight):
    """`[TILE_ROWS, 1]` fp32 products of two chunks."""
    total = x[0].to(tl.float32) * weight[0].to(tl.float32)
    for span in tl.static_range(1, len(x)):
        total = tl.fma(x[span].to(tl.float32), weight[span].to(tl.float32), total)
    return tl.sum(total, axis=1, keep_dims=True)


def row_stride(entry: Tensor) -> int:
    """Elements from row to row; of a single row whatever suits, as PyTorch leaves it open."""
    return entry.stride(0) if entry.shape[0] > 1 else entry.shape[1]


def vector_elements(hidden_states: Sequence[Tensor]) -> int:
    """Elements of the 16-byte loads that the widths allow, or 1."""
    vector = 16 // hidden_states[0].element_size()
    return 1 if any(entry.shape[1] % vector for entry in hidden_states) else vector


def tile_of(vector: int) -> tuple[int, int]:
    """Rows of a tile and tiles of a program."""
    return (TILE_ROWS, TILES) if vector > 1 else (ODD_TILE_ROWS, ODD_TILES)


def chunk_constants(widths: Sequence[int]) -> dict[str, Any]:
    """The compile-time constants that say which chunk belongs to which entry."""
    first_chunks, first_features, chunks, features = [], [], 0, 0
    for width in widths:
        first_chunks.append(chunks)
        first_features.append(features)
        chunks += partials_per_row([width])
        features += width
    return {
        "WIDTHS": tuple(widths),
        "FIRST_CHUNKS": tuple(first_chunks),
        "FIRST_FEATURES": tuple(first_features),
        "FEATURES": features,
        "CHUNKS": chunks,
    }


def aligned_entries(hidden_states: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The entries as 16-byte loads can have them, where their widths allow those.

    No model lays its hidden states out otherwise. Narrower loads would add a row up in another order, and its score
    depend on where it lies: a copy keeps it bitwise the same.
    """
    vector = vector_elements(hidden_states)
    return tuple(
        entry.clone(memory_format=torch.contiguous_format)
        if vector > 1 and (entry.data_ptr() % 16 or row_stride(entry) % vector)
        else entry
        for entry in hidden_states
    )


def strides_in_vectors(hidden_states: Sequence[Tensor]) -> tuple[int, ...]:
    """Row strides in units of `vector_elements`, so that Triton knows what divides them: one, where all are equal."""
    vector = vector_elements(hidden_states)
    strides = tuple(row_stride(entry) // vector for entry in hidden_states)
    return strides[:1] if len(set(strides)) == 1 else strides
