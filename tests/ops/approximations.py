"""A pytest plugin that gives Triton's interpreter the errors of a GPU's approximations.

    APPROXIMATION="exp above" TRITON_INTERPRET=1 pytest -p tests.ops.approximations tests/ops

For NVIDIA's GPUs Triton makes of `exp` a product with log2(e) and `ex2.approx`, of a division `div.full`, and of
`rsqrt` `rsqrt.approx`; the interpreter has numpy compute all three exactly, but for one rounding. Here each result is
off by as much as the PTX manual allows it to be, as a fixed function of the operand's bits, which it is on a GPU.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from triton.runtime import interpreter

EXP2_ERROR, RSQRT_ERROR = 2**-22.5, 2**-22.9
"""Relative, of `ex2.approx.f32` and `rsqrt.approx.f32`."""
DIVISION_ERROR = 2.0
"""Of `div.full.f32`, in units in the last place."""
LOG2_E = np.float32(1.4426950408889634)

PATTERNS: dict[str, tuple[float, float, float] | int] = {
    "exp above": (1.0, -1.0, -1.0),
    "exp below": (-1.0, 1.0, 1.0),
    "scattered 1": 1,
    "scattered 2": 2,
    "scattered 3": 3,
}
"""What share of its bound `ex2`, `div` and `rsqrt` are off by: always the same, signed so that the errors of a sigmoid
add up; or scattered, by this seed."""


def share(operand: Any, op: int, pattern: str) -> Any:
    """From -1 to 1, for each value of the operand."""
    found = PATTERNS[pattern]
    if isinstance(found, tuple):
        return np.full(operand.shape, found[op])
    bits = np.ascontiguousarray(operand, dtype=np.float32).view(np.uint32).astype(np.uint64)
    with np.errstate(over="ignore"):  # splitmix64: neighbours get unlike errors
        mixed = (bits + np.uint64(3 * found + op + 1)) * np.uint64(0x9E3779B97F4A7C15)
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
        mixed ^= mixed >> np.uint64(31)
    return 2.0 * (mixed >> np.uint64(11)).astype(np.float64) / 2**53 - 1.0


def off(exact: Any, bound: Any, shares: Any) -> Any:
    """As far from the exact value as these shares of the bound, which holds for what is rounded to float32 as well."""
    nearest = exact.astype(np.float32)
    unit = np.abs(np.spacing(nearest)).astype(np.float64)
    moved = exact + shares * np.maximum(bound - unit / 2, 0.0)
    return np.where(np.isfinite(nearest) & (nearest != 0), moved, exact).astype(np.float32)


def exp(x: Any, pattern: str) -> Any:
    power = (x * LOG2_E).astype(np.float32)
    exact = np.exp2(power.astype(np.float64))
    return off(exact, EXP2_ERROR * exact, share(power, 0, pattern))


def divide(dividend: Any, divisor: Any, pattern: str) -> Any:
    exact = dividend.astype(np.float64) / divisor.astype(np.float64)
    bound = DIVISION_ERROR * np.abs(np.spacing(exact.astype(np.float32))).astype(np.float64)
    return off(exact, bound, share(np.broadcast_to(divisor, exact.shape), 1, pattern))


def rsqrt(x: Any, pattern: str) -> Any:
    exact = 1 / np.sqrt(x.astype(np.float64))
    return off(exact, RSQRT_ERROR * exact, share(x, 2, pattern))


def install(pattern: str) -> None:
    """Replaces what `tl.exp`, `/` and `tl.rsqrt` of float32 run in the interpreter, for the rest of the process."""
    builder = interpreter.InterpreterBuilder

    def replace(name: str, compute: Callable[..., Any]) -> None:
        exact = getattr(builder, name)

        def create(self: Any, *operands: Any) -> Any:
            if operands[0].data.dtype != np.float32:
                return exact(self, *operands)
            with np.errstate(all="ignore"):
                value = compute(*(operand.data for operand in operands), pattern)
            return interpreter.TensorHandle(value, operands[0].dtype.scalar)

        setattr(builder, name, create)

    for name, compute in (("create_exp", exp), ("create_fdiv", divide), ("create_rsqrt", rsqrt)):
        replace(name, compute)


def pytest_configure() -> None:
    pattern = os.environ.get("APPROXIMATION", "")
    if pattern not in PATTERNS:
        raise pytest.UsageError(f"APPROXIMATION is {pattern!r}: expected one of {', '.join(map(repr, PATTERNS))}")
    install(pattern)


def pytest_report_header() -> str:
    return f"approximations as on a GPU: {os.environ['APPROXIMATION']}"
