"""The ops: their schemas, their fake kernels, their gradients, and which implementation runs where.

An op has three implementations behind one schema: Triton on CUDA, C++ on the CPU (`csrc/`, registered by the library
itself once loaded), and `reference.py` wherever neither can run. Nothing is imported, built or compiled before the
first call that needs it. `SWIFT_KERNELS_IMPL=reference` forces the reference everywhere.
"""

from __future__ import annotations

import functools
import importlib
import os
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from swift_kernels import reference
from swift_kernels.checks import (
    check_cu_seqlens,
    check_cu_seqlens_metadata,
    check_pool,
    check_pool_backward,
    check_project,
    check_project_backward,
    check_rms_norm,
    check_rms_norm_score,
    check_slots,
    check_step,
    debug_checks,
)

_LIBRARY = torch.library.Library("swift_kernels", "DEF")
_LIBRARY.define(
    "score_step(Tensor[] hidden_states, Tensor weight, Tensor bias, Tensor slots, Tensor(a!) sums, "
    "Tensor(b!) token_count, Tensor(c!) partials, Tensor(d!) arrivals, Tensor(e!)? gate_reward=None) -> ()"
)
_LIBRARY.define(
    "rms_norm(Tensor hidden_states, Tensor norm_weight, float eps, bool unit_offset, bool round_first) -> Tensor"
)
_LIBRARY.define(
    "rms_norm_score(Tensor hidden_states, Tensor norm_weight, float eps, bool unit_offset, bool round_first, "
    "Tensor weight, Tensor bias, int entry, int first_feature, bool score_output, bool last, Tensor slots, "
    "Tensor(a!) sums, Tensor(b!) token_count, Tensor(c!) partials, Tensor(d!)? gate_reward=None) -> Tensor"
)
_LIBRARY.define("project(Tensor[] hidden_states, Tensor weight, Tensor bias) -> Tensor")
_LIBRARY.define("project_backward(Tensor[] hidden_states, Tensor grad_logits) -> Tensor")
_LIBRARY.define("pool(Tensor logits, Tensor cu_seqlens, bool gated) -> (Tensor, Tensor)")
_LIBRARY.define(
    "pool_backward(Tensor grad_scores, Tensor scores, Tensor gate_reward, Tensor cu_seqlens, bool gated) -> Tensor"
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
    _call("score_step", hidden_states, weight, bias, slots, sums, token_count, partials, arrivals, gate_reward)


def rms_norm(
    hidden_states: Tensor, norm_weight: Tensor, eps: float, unit_offset: bool = False, round_first: bool = True
) -> Tensor:
    """`reference.rms_norm` in one kernel; float32, bfloat16 or float16 rows and a weight of the same dtype."""
    return _call("rms_norm", hidden_states, norm_weight, eps, unit_offset, round_first)


def rms_norm_score(
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
) -> Tensor:
    """`reference.rms_norm_score` in one kernel; dtypes as in `rms_norm` and `score_step`."""
    return _call(
        "rms_norm_score",
        hidden_states,
        norm_weight,
        eps,
        unit_offset,
        round_first,
        weight,
        bias,
        entry,
        first_feature,
        score_output,
        last,
        slots,
        sums,
        token_count,
        partials,
        gate_reward,
    )


def score_sequence(
    hidden_states: Sequence[Tensor], weight: Tensor, bias: Tensor, cu_seqlens: Tensor, gated: bool = True
) -> tuple[Tensor, Tensor]:
    """Scores whole packed sequences; arguments as in `reference.score_sequence`, differentiable.

    Hidden states and weights as in `score_step`; `cu_seqlens` int32 or int64, on any device. Its values are checked
    unless a CUDA graph is being captured. Float64 weights take the reference.

    Returns:
        float32 scores `[sequences, heads]`, and gates and rewards `[tokens, heads, 2]`.
    """
    check_cu_seqlens_metadata(cu_seqlens)
    if weight.dtype == torch.float64:
        check_cu_seqlens(cu_seqlens, hidden_states[0].shape[0])
        return reference.score_sequence(hidden_states, weight, bias, cu_seqlens, gated)
    return pool(project(hidden_states, weight, bias), cu_seqlens, gated)


def project(hidden_states: Sequence[Tensor], weight: Tensor, bias: Tensor) -> Tensor:
    """`reference.project` in one read of the hidden states, fp32 `[tokens, outputs]`, differentiable."""
    return torch.ops.swift_kernels.project(hidden_states, weight, bias)


def pool(logits: Tensor, cu_seqlens: Tensor, gated: bool = True) -> tuple[Tensor, Tensor]:
    """`reference.pool` in one launch, differentiable."""
    return torch.ops.swift_kernels.pool(logits, cu_seqlens.to(logits.device), gated)


def _call(op: str, *arguments: Any) -> Any:
    # The dispatcher takes over a third of what a call costs the host (bench/launch_cost.py): it is left out where
    # nothing looks at the op. Profilers then see its kernel alone.
    eager = None if torch.compiler.is_compiling() else _EAGER.get(op)
    result = NotImplemented if eager is None else eager(*arguments)
    return getattr(torch.ops.swift_kernels, op)(*arguments) if result is NotImplemented else result


def implementation(device_type: str) -> str:
    """Which implementation runs on a device type: "triton", "cpp" or "reference"."""
    return _select(device_type)[0]


_TRITON = {
    "score_step": "score_step",
    "rms_norm": "rms_norm_score",
    "rms_norm_score": "rms_norm_score",
    "project": "project",
    "project_backward": "project",
    "pool": "pool",
    "pool_backward": "pool",
}
"""The module of `ops/` that has `<op>_triton`."""


@functools.cache
def _select(device_type: str) -> tuple[str, dict[str, Callable[..., Any]]]:
    """What runs on a device type, and its function for each op."""
    if os.environ.get("SWIFT_KERNELS_IMPL", "") == "reference":
        return "reference", _REFERENCE
    if device_type == "cuda":
        try:
            modules = {name: importlib.import_module(f"swift_kernels.ops.{name}") for name in set(_TRITON.values())}
        except ImportError as error:
            _warn_fallback(device_type, f"Triton cannot be imported ({error}); `pip install triton`")
            return "reference", _REFERENCE
        return "triton", {op: getattr(modules[module], f"{op}_triton") for op, module in _TRITON.items()}
    if device_type == "cpu":
        from swift_kernels import cpp

        try:
            cpp.load()
        except cpp.BuildError as error:
            _warn_fallback(device_type, str(error))
            return "reference", _REFERENCE
        return "cpp", {op: getattr(torch.ops.swift_kernels, op) for op in _TRITON}
    _warn_fallback(device_type, "there is no kernel for it")
    return "reference", _REFERENCE


def _warn_fallback(device_type: str, reason: str) -> None:
    warnings.warn(
        f"swift_kernels scores on {device_type} with its plain PyTorch reference, correct but slow: {reason}",
        RuntimeWarning,
        stacklevel=2,
    )


def _reference_step(hidden_states: Sequence[Tensor], *args: Any) -> None:
    check_step(hidden_states, *args)
    _check_slots_where_cheap(args[2], args[3])
    reference.score_step(hidden_states, *args)


def _reference_rms_norm(hidden_states: Tensor, norm_weight: Tensor, *args: Any) -> Tensor:
    check_rms_norm(hidden_states, norm_weight)
    return reference.rms_norm(hidden_states, norm_weight, *args)


def _reference_rms_norm_score(hidden_states: Tensor, norm_weight: Tensor, *args: Any) -> Tensor:
    _check_rms_norm_score(hidden_states, norm_weight, *args)
    _check_slots_where_cheap(args[9], args[10])
    return reference.rms_norm_score(hidden_states, norm_weight, *args)


def _reference_project(hidden_states: Sequence[Tensor], weight: Tensor, bias: Tensor) -> Tensor:
    check_project(hidden_states, weight, bias)
    with torch.autocast(weight.device.type, enabled=False):
        return reference.project(hidden_states, weight, bias)


def _reference_project_backward(hidden_states: Sequence[Tensor], grad_logits: Tensor) -> Tensor:
    check_project_backward(hidden_states, grad_logits)
    return reference.project_backward(hidden_states, grad_logits)


def _reference_pool(logits: Tensor, cu_seqlens: Tensor, gated: bool) -> tuple[Tensor, Tensor]:
    check_pool(logits, cu_seqlens, gated)
    check_cu_seqlens(cu_seqlens, logits.shape[0])
    return reference.pool(logits, cu_seqlens, gated)


def _reference_pool_backward(
    grad_scores: Tensor, scores: Tensor, gate_reward: Tensor, cu_seqlens: Tensor, gated: bool
) -> Tensor:
    check_pool_backward(grad_scores, scores, gate_reward, cu_seqlens)
    check_cu_seqlens(cu_seqlens, gate_reward.shape[0])
    return reference.pool_backward(grad_scores, scores, gate_reward, cu_seqlens, gated)


def _check_slots_where_cheap(slots: Tensor, sums: Tensor) -> None:
    if slots.device.type == "cpu" or debug_checks():
        check_slots(slots, sums.shape[0])


_REFERENCE: dict[str, Callable[..., Any]] = {
    "score_step": _reference_step,
    "rms_norm": _reference_rms_norm,
    "rms_norm_score": _reference_rms_norm_score,
    "project": _reference_project,
    "project_backward": _reference_project_backward,
    "pool": _reference_pool,
    "pool_backward": _reference_pool_backward,
}


_EAGER: dict[str, Callable[..., Any] | None] = {}
"""`<op>_eager` of the ops that Triton has run, where there is one: it runs the op past the dispatcher, or returns
NotImplemented where something has to see the op."""


def _dispatch(op: str, first: Tensor | Sequence[Tensor], *args: Any) -> Any:
    if not isinstance(first, Tensor):
        if not first:
            raise ValueError("hidden_states is empty: expected one [rows, width] tensor per selected layer")
        device_type = first[0].device.type
    else:
        device_type = first.device.type
    implementation, functions = _select(device_type)
    if implementation == "triton" and op not in _EAGER:
        _EAGER[op] = getattr(importlib.import_module(f"swift_kernels.ops.{_TRITON[op]}"), f"{op}_eager", None)
    return functions[op](first, *args)


# The C++ library registers for the CPU key, which is more specific than this one: after it has been loaded by the
# first call, CPU calls no longer pass through Python.
for _op in _TRITON:
    _LIBRARY.impl(_op, functools.partial(_dispatch, _op), "CompositeExplicitAutograd")


def _check_rms_norm_score(
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
    *state: Any,
) -> None:
    check_rms_norm_score(hidden_states, norm_weight, weight, bias, entry, first_feature, *state)


def _fake_rms_norm(hidden_states: Tensor, norm_weight: Tensor, *_: Any) -> Tensor:
    check_rms_norm(hidden_states, norm_weight)
    return torch.empty_like(hidden_states, memory_format=torch.contiguous_format)


def _fake_rms_norm_score(hidden_states: Tensor, norm_weight: Tensor, *args: Any) -> Tensor:
    _check_rms_norm_score(hidden_states, norm_weight, *args)
    return torch.empty_like(hidden_states, memory_format=torch.contiguous_format)


def _fake_project(hidden_states: Sequence[Tensor], weight: Tensor, bias: Tensor) -> Tensor:
    check_project(hidden_states, weight, bias)
    return weight.new_empty(hidden_states[0].shape[0], weight.shape[0], dtype=torch.float32)


def _fake_project_backward(hidden_states: Sequence[Tensor], grad_logits: Tensor) -> Tensor:
    check_project_backward(hidden_states, grad_logits)
    return grad_logits.new_empty(grad_logits.shape[1], sum(entry.shape[1] for entry in hidden_states))


def _fake_pool(logits: Tensor, cu_seqlens: Tensor, gated: bool) -> tuple[Tensor, Tensor]:
    check_pool(logits, cu_seqlens, gated)
    tokens, heads = logits.shape[0], logits.shape[1] // (2 if gated else 1)
    return logits.new_empty(cu_seqlens.shape[0] - 1, heads), logits.new_empty(tokens, heads, 2)


def _fake_pool_backward(
    grad_scores: Tensor, scores: Tensor, gate_reward: Tensor, cu_seqlens: Tensor, gated: bool
) -> Tensor:
    check_pool_backward(grad_scores, scores, gate_reward, cu_seqlens)
    tokens, heads, _ = gate_reward.shape
    return gate_reward.new_empty(tokens, heads * (2 if gated else 1))


_FAKES: dict[str, Callable[..., Any]] = {
    "score_step": check_step,
    "rms_norm": _fake_rms_norm,
    "rms_norm_score": _fake_rms_norm_score,
    "project": _fake_project,
    "project_backward": _fake_project_backward,
    "pool": _fake_pool,
    "pool_backward": _fake_pool_backward,
}
for _op, _fake in _FAKES.items():
    torch.library.register_fake(f"swift_kernels::{_op}", _fake, lib=_LIBRARY)


def _refuse_double_backward(op: str) -> None:
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(
            f"swift_kernels::{op} has no second derivative: call backward without create_graph=True, or use "
            "swift_kernels.reference"
        )


def _save_project(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    hidden_states, weight, _ = inputs
    ctx.save_for_backward(weight, *hidden_states)


def _project_gradients(ctx: Any, grad: Tensor) -> tuple[Any, Tensor | None, Tensor | None]:
    """For the weight a second read of the hidden states; for hidden states that ask for it, what PyTorch makes."""
    _refuse_double_backward("project")
    weight, *hidden_states = ctx.saved_tensors
    grad = grad.contiguous()
    grad_entries: list[Tensor | None] = [None] * len(hidden_states)
    offset = 0
    for index, entry in enumerate(hidden_states):
        if entry.requires_grad:
            columns = weight[:, offset : offset + entry.shape[1]].float()
            with torch.autocast(grad.device.type, enabled=False):
                grad_entries[index] = (grad @ columns).to(entry.dtype)
        offset += entry.shape[1]
    grad_weight = grad_bias = None
    if ctx.needs_input_grad[1]:
        grad_weight = torch.ops.swift_kernels.project_backward(hidden_states, grad).to(weight.dtype)
    if ctx.needs_input_grad[2]:
        grad_bias = grad.sum(0).to(weight.dtype)
    return grad_entries, grad_weight, grad_bias


def _save_pool(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, cu_seqlens, ctx.gated = inputs
    ctx.save_for_backward(cu_seqlens, *output)
    ctx.set_materialize_grads(False)


def _pool_gradients(
    ctx: Any, grad_scores: Tensor | None, grad_gate_reward: Tensor | None
) -> tuple[Tensor | None, None, None]:
    _refuse_double_backward("pool")
    cu_seqlens, scores, gate_reward = ctx.saved_tensors
    grad = None
    if grad_scores is not None:
        grad = torch.ops.swift_kernels.pool_backward(
            grad_scores.contiguous(), scores, gate_reward, cu_seqlens, ctx.gated
        )
    if grad_gate_reward is not None:
        grad_tokens = grad_gate_reward[..., 1]
        if ctx.gated:
            gate = gate_reward[..., 0]
            grad_tokens = torch.stack([grad_gate_reward[..., 0] * gate * (1 - gate), grad_tokens], dim=-1).flatten(1)
        grad = grad_tokens if grad is None else grad + grad_tokens
    return grad, None, None


torch.library.register_autograd("swift_kernels::project", _project_gradients, setup_context=_save_project, lib=_LIBRARY)
torch.library.register_autograd("swift_kernels::pool", _pool_gradients, setup_context=_save_pool, lib=_LIBRARY)
