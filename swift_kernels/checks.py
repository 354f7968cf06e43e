"""What the ops accept. Fake kernels, reference and Triton all check through these functions; `csrc/` says the same.

Only `check_slots` and `check_cu_seqlens` read tensors; everything else looks at metadata alone.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
from torch import Tensor

FEATURE_CHUNK = 1024
"""Features per partial sum. Every kernel reduces chunks of this many columns of an entry, then adds the partials in
order: at 33 x 4096 that is 132 chunks, one for each multiprocessor of an H100/H200 at a single row."""

HIDDEN_STATE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
WEIGHT_DTYPES = (torch.float32, torch.bfloat16)


def partials_per_row(widths: Sequence[int]) -> int:
    """Number of partial sums a row of entries of these widths is reduced through."""
    return sum(-(-width // FEATURE_CHUNK) for width in widths)


def debug_checks() -> bool:
    """Whether `SWIFT_KERNELS_DEBUG=1` asks for slot checks that wait for the device."""
    return os.environ.get("SWIFT_KERNELS_DEBUG", "0") not in ("", "0")


def check_slots(slots: Tensor, count: int) -> None:
    """Raises on repeated or out-of-range slots. Reads the tensor: waits for the device it is on."""
    live = slots[slots >= 0]
    if live.numel() and int(live.max()) >= count:
        raise ValueError(f"slots contains {int(live.max())}: expected values below {count}, or negative to skip a row")
    unique, occurrences = live.unique(return_counts=True)
    if unique.numel() != live.numel():
        raise ValueError(f"slots contains {int(unique[occurrences > 1][0])} more than once: expected distinct slots")


def check_cu_seqlens(cu_seqlens: Tensor, tokens: int) -> None:
    """Raises unless the values rise from 0 to `tokens`. Reads the tensor: waits for the device it is on."""
    values = cu_seqlens.tolist()
    if values[0] != 0:
        raise ValueError(f"cu_seqlens starts at {values[0]}: expected 0")
    for index in range(1, len(values)):
        if values[index] < values[index - 1]:
            raise ValueError(
                f"cu_seqlens[{index}] is {values[index]}, after {values[index - 1]}: expected values that do not "
                "decrease"
            )
    if values[-1] != tokens:
        raise ValueError(f"cu_seqlens ends at {values[-1]}: expected {tokens}, the number of tokens")


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
    """Raises on metadata that `score_step` cannot take."""
    rows = _check_entries(hidden_states, "rows")
    widths = [entry.shape[1] for entry in hidden_states]
    _check_weight(weight, bias, sum(widths), (1, 2), f"entries of widths {widths}")
    _check_state(rows, slots, sums, token_count, gate_reward)
    _check_partials(partials, rows, partials_per_row(widths), exactly=True)
    if arrivals.dtype != torch.int32 or arrivals.dim() != 1 or arrivals.shape[0] < rows:
        raise ValueError(
            f"arrivals is {arrivals.dtype} of shape {list(arrivals.shape)}: expected int32 [at least {rows}]"
        )
    _check_device(
        hidden_states[0],
        weight=weight,
        bias=bias,
        slots=slots,
        sums=sums,
        token_count=token_count,
        partials=partials,
        arrivals=arrivals,
        gate_reward=gate_reward,
    )


def check_rms_norm(hidden_states: Tensor, norm_weight: Tensor) -> None:
    """Raises on metadata that `rms_norm` cannot take."""
    _check_entries([hidden_states], "rows")
    width = hidden_states.shape[1]
    if norm_weight.dtype != hidden_states.dtype or tuple(norm_weight.shape) != (width,):
        raise ValueError(
            f"norm_weight is {norm_weight.dtype} of shape {list(norm_weight.shape)}: expected {hidden_states.dtype} "
            f"[{width}], as the hidden states"
        )
    if not norm_weight.is_contiguous():
        raise ValueError(f"norm_weight has strides {list(norm_weight.stride())}: expected a contiguous [{width}]")
    _check_device(hidden_states, norm_weight=norm_weight)


def check_rms_norm_score(
    hidden_states: Tensor,
    norm_weight: Tensor,
    weight: Tensor,
    bias: Tensor,
    entry: int,
    first_feature: int,
    slots: Tensor,
    sums: Tensor,
    token_count: Tensor,
    partials: Tensor,
    gate_reward: Tensor | None = None,
) -> None:
    """Raises on metadata that `rms_norm_score` cannot take."""
    check_rms_norm(hidden_states, norm_weight)
    rows, width = hidden_states.shape
    features = weight.shape[1] if weight.dim() == 2 else 0
    _check_weight(weight, bias, features, (1, 2), "a head")
    if not 0 <= first_feature <= features - width:
        raise ValueError(
            f"first_feature is {first_feature}: expected 0..{features - width}, for {width} of {features} features"
        )
    _check_state(rows, slots, sums, token_count, gate_reward)
    if entry < 0:
        raise ValueError(f"entry is {entry}: expected 0 or more")
    _check_partials(partials, rows, entry + 1, exactly=False)
    _check_device(
        hidden_states,
        weight=weight,
        bias=bias,
        slots=slots,
        sums=sums,
        token_count=token_count,
        partials=partials,
        gate_reward=gate_reward,
    )


def check_project(hidden_states: Sequence[Tensor], weight: Tensor, bias: Tensor) -> None:
    """Raises on metadata that `project` cannot take."""
    _check_entries(hidden_states, "tokens")
    widths = [entry.shape[1] for entry in hidden_states]
    _check_weight(weight, bias, sum(widths), None, f"entries of widths {widths}")
    _check_device(hidden_states[0], weight=weight, bias=bias)


def check_project_backward(hidden_states: Sequence[Tensor], grad_logits: Tensor) -> None:
    """Raises on metadata that `project_backward` cannot take."""
    tokens = _check_entries(hidden_states, "tokens")
    if (
        grad_logits.dtype != torch.float32
        or grad_logits.dim() != 2
        or grad_logits.shape[0] != tokens
        or not grad_logits.is_contiguous()
    ):
        raise ValueError(
            f"grad_logits is {grad_logits.dtype} of shape {list(grad_logits.shape)}: expected contiguous float32 "
            f"[{tokens}, outputs]"
        )
    _check_device(hidden_states[0], grad_logits=grad_logits)


def check_pool(logits: Tensor, cu_seqlens: Tensor, gated: bool) -> None:
    """Raises on metadata that `pool` cannot take; `check_cu_seqlens` looks at the values."""
    outputs = 2 if gated else 1
    if logits.dtype != torch.float32 or logits.dim() != 2 or logits.shape[1] % outputs or not logits.is_contiguous():
        expected = "2 heads (gate and reward of each)" if gated else "heads"
        raise ValueError(
            f"logits is {logits.dtype} of shape {list(logits.shape)}: expected contiguous float32 [tokens, {expected}]"
        )
    check_cu_seqlens_metadata(cu_seqlens)
    _check_device(logits, "logits", cu_seqlens=cu_seqlens)


def check_pool_backward(grad_scores: Tensor, scores: Tensor, gate_reward: Tensor, cu_seqlens: Tensor) -> None:
    """Raises on metadata that `pool_backward` cannot take."""
    if (
        gate_reward.dtype != torch.float32
        or gate_reward.dim() != 3
        or gate_reward.shape[2] != 2
        or not gate_reward.is_contiguous()
    ):
        raise ValueError(
            f"gate_reward is {gate_reward.dtype} of shape {list(gate_reward.shape)}: expected contiguous float32 "
            "[tokens, heads, 2]"
        )
    check_cu_seqlens_metadata(cu_seqlens)
    sequences, heads = cu_seqlens.shape[0] - 1, gate_reward.shape[1]
    for name, tensor in (("grad_scores", grad_scores), ("scores", scores)):
        if tensor.dtype != torch.float32 or tuple(tensor.shape) != (sequences, heads) or not tensor.is_contiguous():
            raise ValueError(
                f"{name} is {tensor.dtype} of shape {list(tensor.shape)}: expected contiguous float32 "
                f"[{sequences}, {heads}]"
            )
    _check_device(gate_reward, "gate_reward", grad_scores=grad_scores, scores=scores, cu_seqlens=cu_seqlens)


def check_cu_seqlens_metadata(cu_seqlens: Tensor) -> None:
    """Raises unless `cu_seqlens` is int32 or int64 `[sequences + 1]`."""
    if not isinstance(cu_seqlens, Tensor):
        raise ValueError(f"cu_seqlens is a {type(cu_seqlens).__name__}: expected a tensor of int32 or int64")
    if (
        cu_seqlens.dtype not in (torch.int32, torch.int64)
        or cu_seqlens.dim() != 1
        or cu_seqlens.shape[0] < 1
        or not cu_seqlens.is_contiguous()
    ):
        raise ValueError(
            f"cu_seqlens is {cu_seqlens.dtype} of shape {list(cu_seqlens.shape)}: expected contiguous int32 or int64 "
            "[sequences + 1]"
        )


def _check_entries(hidden_states: Sequence[Tensor], what: str) -> int:
    """Checks entries of `[what, width]`; returns how many rows or tokens they hold."""
    if not hidden_states:
        raise ValueError(f"hidden_states is empty: expected one [{what}, width] tensor per selected layer")
    first = hidden_states[0]
    for index, entry in enumerate(hidden_states):
        if entry.dim() != 2:
            raise ValueError(f"hidden_states[{index}] has shape {list(entry.shape)}: expected [{what}, width]")
        if entry.shape[0] != first.shape[0]:
            raise ValueError(
                f"hidden_states[{index}] has {entry.shape[0]} {what}, hidden_states[0] has {first.shape[0]}: "
                f"every entry holds the same {what}"
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
    return first.shape[0]


def _check_weight(
    weight: Tensor, bias: Tensor, features: int, allowed_outputs: tuple[int, ...] | None, what: str
) -> None:
    outputs = weight.shape[0] if weight.dim() == 2 else 0
    fits = outputs in allowed_outputs if allowed_outputs else outputs > 0
    if not fits or weight.shape[1] != features or not weight.is_contiguous():
        shapes = f"[2, {features}] (gate, reward) or [1, {features}]" if allowed_outputs else f"[outputs, {features}]"
        raise ValueError(f"weight has shape {list(weight.shape)}: expected a contiguous {shapes} for {what}")
    if weight.dtype not in WEIGHT_DTYPES or bias.dtype != weight.dtype or tuple(bias.shape) != (outputs,):
        raise ValueError(
            f"weight is {weight.dtype}, bias {bias.dtype} of shape {list(bias.shape)}: expected both float32 or both "
            f"bfloat16, bias of shape [{outputs}]"
        )


def _check_state(rows: int, slots: Tensor, sums: Tensor, token_count: Tensor, gate_reward: Tensor | None) -> None:
    if slots.dtype != torch.int64 or tuple(slots.shape) != (rows,) or not slots.is_contiguous():
        raise ValueError(f"slots is {slots.dtype} of shape {list(slots.shape)}: expected contiguous int64 [{rows}]")
    if sums.dtype != torch.float32 or sums.dim() != 2 or sums.shape[1] != 2 or not sums.is_contiguous():
        raise ValueError(f"sums is {sums.dtype} of shape {list(sums.shape)}: expected contiguous float32 [slots, 2]")
    if token_count.dtype != torch.int32 or token_count.shape != sums.shape[:1] or not token_count.is_contiguous():
        raise ValueError(
            f"token_count is {token_count.dtype} of shape {list(token_count.shape)}: expected contiguous int32 "
            f"[{sums.shape[0]}]"
        )
    if gate_reward is not None and (
        gate_reward.dtype != torch.float32 or tuple(gate_reward.shape) != (rows, 2) or not gate_reward.is_contiguous()
    ):
        raise ValueError(
            f"gate_reward is {gate_reward.dtype} of shape {list(gate_reward.shape)}: expected contiguous float32 "
            f"[{rows}, 2]"
        )


def _check_partials(partials: Tensor, rows: int, needed: int, exactly: bool) -> None:
    fits = partials.dtype == torch.float32 and partials.dim() == 3 and partials.shape[0] >= rows
    if fits:
        fits = partials.shape[1] == needed if exactly else partials.shape[1] >= needed
    if not fits or partials.shape[2] != 2 or not partials.is_contiguous():
        raise ValueError(
            f"partials is {partials.dtype} of shape {list(partials.shape)}: expected contiguous float32 "
            f"[at least {rows}, {'' if exactly else 'at least '}{needed}, 2]; a step of more rows than slots needs "
            "init_state(..., max_rows=rows)"
        )


def _check_device(first: Tensor, what: str = "hidden_states", **tensors: Tensor | None) -> None:
    for name, tensor in tensors.items():
        if tensor is not None and tensor.device != first.device:
            raise ValueError(f"{name} is on {tensor.device}, {what} are on {first.device}: expected one device")
