"""The ops: their schemas, their fake kernels, and which implementation runs where.

`score_step` has three implementations behind one schema: Triton on CUDA, C++ on the CPU (`csrc/`, registered by the
library itself once loaded), and `reference.py` wherever neither can run. Nothing is imported, built or compiled
before the first call that needs it. `SWIFT_KERNELS_IMPL=reference` forces the reference everywhere.
"""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from swift_kernels import reference

FEATURE_CHUNK = 1024
"""Features per partial sum. Every kernel reduces chunks of this many columns of an entry, then adds the partials in
order: at 33 x 4096 that is 132 chunks, one for each multiprocessor of an H100/H200 at a single row."""

HIDDEN_STATE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
WEIGHT_DTYPES = (torch.float32, torch.bfloat16)

_LIBRARY = torch.library.Library("swift_kernels", "DEF")
_LIBRARY.define(
    "score_step(Tensor[] hidden_states, Tensor weight, Tensor bias, Tensor slots, Tensor(a!) sums, "
    "Tensor(b!) token_count, Tensor(c!) partials, Tensor(d!) arrivals, Tensor(e!)? gate_reward=None) -> ()"
)


def score_step(
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
    """The fused op; arguments as in `reference.score_step`, updates `sums` and `token_count` in place.

    Hidden states are float32, bfloat16 or float16 with unit stride along the width; weight and bias float32 or
    bfloat16; `sums` float32. `partials` and `arrivals` are the scratch of one `ScoreState` and of one stream.
    """
    torch.ops.swift_kernels.score_step(
        hidden_states, weight, bias, slots, sums, token_count, partials, arrivals, gate_reward
    )


def partials_per_row(widths: Sequence[int]) -> int:
    """Number of partial sums a row of entries of these widths is reduced through."""
    return sum(-(-width // FEATURE_CHUNK) for width in widths)


def check_step(
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
    """Raises on metadata that `score_step` cannot take. Reads no tensor data."""
    if not hidden_states:
        raise ValueError("hidden_states is empty: expected one [rows, width] tensor per selected layer")
    first = hidden_states[0]
    for index, entry in enumerate(hidden_states):
        if entry.dim() != 2:
            raise ValueError(f"hidden_states[{index}] has shape {list(entry.shape)}: expected [rows, width]")
        if entry.shape[0] != first.shape[0]:
            raise ValueError(
                f"hidden_states[{index}] has {entry.shape[0]} rows, hidden_states[0] has {first.shape[0]}: "
                "every entry holds the same rows"
            )
        if entry.dtype != first.dtype or entry.device != first.device:
            raise ValueError(
                f"hidden_states[{index}] is {entry.dtype} on {entry.device}, hidden_states[0] is {first.dtype} on "
                f"{first.device}: every entry has one dtype and device"
            )
        if entry.shape[1] > 1 and entry.stride(1) != 1:
            raise ValueError(
                f"hidden_states[{index}] has strides {list(entry.stride())}: expected unit stride along the width"
            )
    if first.dtype not in HIDDEN_STATE_DTYPES:
        raise ValueError(f"hidden_states are {first.dtype}: expected float32, bfloat16 or float16")
    features = sum(entry.shape[1] for entry in hidden_states)
    outputs = weight.shape[0] if weight.dim() == 2 else 0
    if outputs not in (1, 2) or weight.shape[1] != features or not weight.is_contiguous():
        raise ValueError(
            f"weight has shape {list(weight.shape)}: expected a contiguous [2, {features}] (gate, reward) or "
            f"[1, {features}] for entries of widths {[entry.shape[1] for entry in hidden_states]}"
        )
    if weight.dtype not in WEIGHT_DTYPES or bias.dtype != weight.dtype or tuple(bias.shape) != (outputs,):
        raise ValueError(
            f"weight is {weight.dtype}, bias {bias.dtype} of shape {list(bias.shape)}: expected both float32 or both "
            f"bfloat16, bias of shape [{outputs}]"
        )
    rows = first.shape[0]
    if slots.dtype != torch.int64 or tuple(slots.shape) != (rows,) or not slots.is_contiguous():
        raise ValueError(f"slots is {slots.dtype} of shape {list(slots.shape)}: expected contiguous int64 [{rows}]")
    if sums.dtype != torch.float32 or sums.dim() != 2 or sums.shape[1] != 2 or not sums.is_contiguous():
        raise ValueError(f"sums is {sums.dtype} of shape {list(sums.shape)}: expected contiguous float32 [slots, 2]")
    if token_count.dtype != torch.int32 or token_count.shape != sums.shape[:1] or not token_count.is_contiguous():
        raise ValueError(
            f"token_count is {token_count.dtype} of shape {list(token_count.shape)}: expected contiguous int32 "
            f"[{sums.shape[0]}]"
        )
    needed = partials_per_row([entry.shape[1] for entry in hidden_states])
    if (
        partials.dtype != torch.float32
        or partials.dim() != 3
        or partials.shape[0] < rows
        or tuple(partials.shape[1:]) != (needed, 2)
        or not partials.is_contiguous()
    ):
        raise ValueError(
            f"partials is {partials.dtype} of shape {list(partials.shape)}: expected contiguous float32 "
            f"[at least {rows}, {needed}, 2]; a step of more rows than slots needs init_state(..., max_rows=rows)"
        )
    if arrivals.dtype != torch.int32 or arrivals.dim() != 1 or arrivals.shape[0] < rows:
        raise ValueError(
            f"arrivals is {arrivals.dtype} of shape {list(arrivals.shape)}: expected int32 [at least {rows}]"
        )
    if gate_reward is not None and (
        gate_reward.dtype != torch.float32 or tuple(gate_reward.shape) != (rows, 2) or not gate_reward.is_contiguous()
    ):
        raise ValueError(
            f"gate_reward is {gate_reward.dtype} of shape {list(gate_reward.shape)}: expected contiguous float32 "
            f"[{rows}, 2]"
        )
    for name, tensor in (
        ("weight", weight),
        ("bias", bias),
        ("slots", slots),
        ("sums", sums),
        ("token_count", token_count),
        ("partials", partials),
        ("arrivals", arrivals),
        ("gate_reward", gate_reward),
    ):
        if tensor is not None and tensor.device != first.device:
            raise ValueError(f"{name} is on {tensor.device}, hidden_states are on {first.device}: expected one device")


def check_slots(slots: Tensor, count: int) -> None:
    """Raises on repeated or out-of-range slots. Reads the tensor: waits for the device it is on."""
    live = slots[slots >= 0]
    if live.numel() and int(live.max()) >= count:
        raise ValueError(f"slots contains {int(live.max())}: expected values below {count}, or negative to skip a row")
    unique, occurrences = live.unique(return_counts=True)
    if unique.numel() != live.numel():
        raise ValueError(f"slots contains {int(unique[occurrences > 1][0])} more than once: expected distinct slots")


def debug_checks() -> bool:
    """Whether `SWIFT_KERNELS_DEBUG=1` asks for slot checks that wait for the device."""
    return os.environ.get("SWIFT_KERNELS_DEBUG", "0") not in ("", "0")


def implementation(device_type: str) -> str:
    """Which implementation `score_step` runs on a device type: "triton", "cpp" or "reference"."""
    return _select(device_type)[0]


@functools.cache
def _select(device_type: str) -> tuple[str, Callable[..., None]]:
    if os.environ.get("SWIFT_KERNELS_IMPL", "") == "reference":
        return "reference", _reference_step
    if device_type == "cuda":
        try:
            from swift_kernels.ops.score_step import score_step_triton
        except ImportError as error:
            _warn_fallback(device_type, f"Triton cannot be imported ({error}); `pip install triton`")
            return "reference", _reference_step
        return "triton", score_step_triton
    if device_type == "cpu":
        from swift_kernels import cpp

        try:
            cpp.load()
        except cpp.BuildError as error:
            _warn_fallback(device_type, str(error))
            return "reference", _reference_step
        return "cpp", torch.ops.swift_kernels.score_step
    _warn_fallback(device_type, "there is no kernel for it")
    return "reference", _reference_step


def _warn_fallback(device_type: str, reason: str) -> None:
    warnings.warn(
        f"swift_kernels scores on {device_type} with its plain PyTorch reference, correct but slow: {reason}",
        RuntimeWarning,
        stacklevel=2,
    )


def _reference_step(
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
    check_step(hidden_states, weight, bias, slots, sums, token_count, partials, arrivals, gate_reward)
    if slots.device.type == "cpu" or debug_checks():
        check_slots(slots, sums.shape[0])
    reference.score_step(hidden_states, weight, bias, slots, sums, token_count, gate_reward=gate_reward)


def _dispatch(hidden_states: Sequence[Tensor], *args: Tensor | None) -> None:
    if not hidden_states:
        raise ValueError("hidden_states is empty: expected one [rows, width] tensor per selected layer")
    _select(hidden_states[0].device.type)[1](hidden_states, *args)


# The C++ library registers for the CPU key, which is more specific than this one: after it has been loaded by the
# first call, CPU calls no longer pass through Python.
_LIBRARY.impl("score_step", _dispatch, "CompositeExplicitAutograd")
torch.library.register_fake("swift_kernels::score_step", check_step, lib=_LIBRARY)
