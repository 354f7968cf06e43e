"""Which RMSNorms of a model can score on the way: found by what they are fed and what they compute, never by name.

The norm that begins layer l takes the layer's input, `hidden_states[l]`; the norm that ends the model returns
`hidden_states[L]`. One traced forward shows which modules do, and a probe shows whether they are an RMSNorm.
"""

from __future__ import annotations

import functools
from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from swift_kernels import features, reference
from swift_kernels.checks import HIDDEN_STATE_DTYPES
from swift_kernels.replica import replicate

PROBE_ROWS = 8
_KINDS = ((False, True), (False, False), (True, False))
"""unit_offset and round_first of `reference.rms_norm`: Llama and most others, OLMo2, Gemma."""


@dataclass(frozen=True)
class FusableNorm:
    """An RMSNorm of a model whose kernel can take the dot products of an entry as well.

    Attributes:
        module: the module, whose only parameter is the weight.
        owner, name: the module that holds this parameter, itself or one inside, and its name there.
        eps, unit_offset, round_first: as in `reference.rms_norm`.
        scores_output: whether the entry is what the norm returns (the last one), not what it takes.
    """

    module: nn.Module
    owner: nn.Module
    name: str
    eps: float
    unit_offset: bool
    round_first: bool
    scores_output: bool

    @property
    def weight(self) -> Tensor:
        weight = self.owner._parameters.get(self.name)  # `module.parameters()` would take ten times as long
        if weight is None:
            raise RuntimeError(
                f"the {self.name} of a fused {type(self.module).__name__} was taken away or parametrised while a "
                "scorer was attached: detach before, and attach again"
            )
        return weight


@dataclass(frozen=True)
class Norms:
    """What a model has of norms.

    Attributes:
        entries: for each entry 0..L of `hidden_states` the norm that can score it, or the reason why none can.
        others: further norms of these kinds over the tokens of a batch, which read no entry, as after an attention.
    """

    entries: list[FusableNorm | str]
    others: list[FusableNorm]


def find_norms(model: Any) -> Norms:
    """The RMSNorms of a model that one kernel can compute.

    Runs one short forward, and each candidate on a few random rows, in a replica of the model: afresh each time, as
    modules, weights and dtypes may have changed.
    """
    layout = features.model_layout(model)
    replica, originals = replicate(features.unwrapped(model))
    replicas = {module: copy for copy, module in originals.items()}
    layers, decoder = [replicas[layer] for layer in layout.layers], replicas[layout.decoder]
    last = layout.num_hidden_layers
    takers: dict[int, list[nn.Module]] = {index: [] for index in range(last)}
    makers: list[tuple[nn.Module, Tensor]] = []
    calls: Counter[nn.Module] = Counter()
    dtypes: dict[nn.Module, torch.dtype] = {}
    over_tokens: list[nn.Module] = []
    current: list[tuple[int, Tensor]] = []
    final: list[Tensor] = []

    def enter_layer(index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        current[:] = [(index, features.layer_input(args, kwargs))]

    def enter_module(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls[module] += 1
        if args and isinstance(args[0], Tensor):
            dtypes[module] = args[0].dtype
            if (
                len(args) == 1
                and not kwargs
                and args[0].dim() == 3
                and args[0].shape[:2] == (1, features.SHORT_FORWARD)
            ):
                over_tokens.append(module)
        if current and len(args) == 1 and not kwargs and args[0] is current[0][1]:
            takers[current[0][0]].append(module)

    def leave_module(module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
        if isinstance(output, Tensor):
            makers.append((module, output))

    inner = {module: None for layer in layers for module in layer.modules() if module is not layer}
    outer = [module for module in decoder.modules() if module not in inner]
    handles = [
        layer.register_forward_pre_hook(
            lambda _module, args, kwargs, index=index: enter_layer(index, args, kwargs), with_kwargs=True
        )
        for index, layer in enumerate(layers)
    ]
    handles += [module.register_forward_pre_hook(enter_module, with_kwargs=True) for module in (*inner, *outer)]
    handles += [module.register_forward_hook(leave_module) for module in outer]
    handles.append(
        decoder.register_forward_hook(lambda _module, _args, output: final.append(features.last_hidden_state(output)))
    )
    try:
        features.run_short_forward(replica)
    finally:
        for handle in handles:  # the probes below run these modules once more
            handle.remove()

    found: list[FusableNorm | str] = []
    for index in range(last):
        if not layout.readable[index]:
            found.append(f"hidden_states[{index}] is not the input of its layer")
        else:
            found.append(_first_norm(takers[index], calls, dtypes, f"layer {index}'s input", scores_output=False))
    if layout.last != "decoder":
        found.append(f"hidden_states[{last}] is not what the model returns")
    else:
        candidates = [module for module, output in makers if output is final[0]]
        found.append(_first_norm(candidates, calls, dtypes, "the model's last hidden state", scores_output=True))
    of_entries = [norm for norm in found if isinstance(norm, FusableNorm)]
    kinds, taken = {type(norm.module) for norm in of_entries}, {norm.module for norm in of_entries}
    others = [
        _identify(module, dtypes[module], scores_output=False)
        for module in over_tokens
        if calls[module] == 1 and type(module) in kinds and module not in taken
    ]
    own = functools.partial(_of_model, originals)
    return Norms(list(map(own, found)), [norm for norm in map(own, others) if isinstance(norm, FusableNorm)])


def _of_model(originals: dict[nn.Module, nn.Module], norm: FusableNorm | str) -> FusableNorm | str:
    """A norm that was found in a replica, in the model."""
    if isinstance(norm, str):
        return norm
    return replace(norm, module=originals[norm.module], owner=originals[norm.owner])


def _first_norm(
    candidates: list[nn.Module],
    calls: Counter[nn.Module],
    dtypes: dict[nn.Module, torch.dtype],
    what: str,
    scores_output: bool,
) -> FusableNorm | str:
    verb = "returns" if scores_output else "takes"
    if not candidates:
        return f"no module {verb} {what} as it is"
    reasons = []
    for module in candidates:
        norm = (
            _identify(module, dtypes[module], scores_output)
            if calls[module] == 1
            else f"it runs {calls[module]} times in a forward"
        )
        if isinstance(norm, FusableNorm):
            return norm
        reasons.append(f"{type(module).__name__} {verb} {what}, but {norm}")
    return reasons[0]


@torch.no_grad()
def _identify(module: nn.Module, dtype: torch.dtype, scores_output: bool) -> FusableNorm | str:
    """Which RMSNorm the module computes, found by comparing it with the reference on random rows."""
    parameters = dict(module.named_parameters())
    if len(parameters) != 1 or next(iter(parameters.values())).dim() != 1:
        return "it does not have one vector as its only parameter, as an RMSNorm has"
    [(name, parameter)] = parameters.items()
    if parameter.dtype not in HIDDEN_STATE_DTYPES or parameter.dtype != dtype:
        return f"its weight is {parameter.dtype}, what it takes {dtype}"
    # Small rows tell one epsilon from another; random weights tell how it rounds, which weights of one would not.
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(PROBE_ROWS, parameter.shape[0], generator=generator)
    rows *= torch.logspace(-4, 2, PROBE_ROWS)[:, None]
    rows = rows.to(parameter.device, parameter.dtype)
    weight = torch.randn(parameter.shape, generator=generator).to(rows)
    output = torch.func.functional_call(module, {name: weight}, (rows[:, None],))
    if not isinstance(output, Tensor) or output.shape != rows[:, None].shape or output.dtype != rows.dtype:
        return "it does not return one tensor of the shape and dtype it takes"
    output = output[:, 0]
    floats = [value for value in vars(module).values() if isinstance(value, float) and 0 <= value < 0.1]
    owner, _, own_name = name.rpartition(".")
    place = (module, module.get_submodule(owner), own_name)
    best: tuple[int, FusableNorm] | None = None
    for eps in dict.fromkeys([*floats, torch.finfo(torch.float32).eps, torch.finfo(weight.dtype).eps]):
        for unit_offset, round_first in _KINDS:
            expected = reference.rms_norm(rows, weight, eps, unit_offset, round_first)
            # A norm that adds up in another order differs in the last bit of the reciprocal root, and then by one
            # rounding of the output.
            tolerance = max(torch.finfo(weight.dtype).eps, 1e-5)
            if not torch.allclose(output.float(), expected.float(), rtol=tolerance, atol=1e-30):
                continue
            wrong = int((output != expected).sum())
            if best is None or wrong < best[0]:
                best = (wrong, FusableNorm(*place, eps, unit_offset, round_first, scores_output))
    return "it does not compute an RMSNorm" if best is None else best[1]
