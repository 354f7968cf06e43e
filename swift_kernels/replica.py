"""A replica of a model: modules of its own over the same weights.

What looks into a model (hooks, another mode, weights exchanged for a probe) does so in a replica, so that the model
itself, which another thread may be running, does not change; only what its forwards themselves write into buffers does.
"""

from __future__ import annotations

import copyreg
import functools
from collections.abc import Set
from types import CellType, FunctionType, MethodType
from typing import Any, NamedTuple

from torch import nn

_CONTAINERS = (dict, list, set)


class Replica(NamedTuple):
    """A replica in evaluation mode, and the module of the model that each of its modules stands for."""

    model: Any
    originals: dict[nn.Module, nn.Module]


def replicate(model: nn.Module) -> Replica:
    """Makes a replica that shares all tensors with `model`; hooks run in it as well, and nothing of it is compiled.

    A model that `fully_shard` (FSDP2) has taken stands for itself, in the mode that it is in: its weights are gathered
    into the very modules that were sharded.
    """
    if any(hasattr(module, "unshard") for module in model.modules()):
        return Replica(model, {module: module for module in model.modules()})
    replicas = {module: object.__new__(type(module)) for module in model.modules()}
    for module, replica in replicas.items():
        # Containers are copied one level deep: hooks, and what else a module registers.
        attributes = {
            name: value.copy() if isinstance(value, _CONTAINERS) else _rebound(value, replicas)
            for name, value in vars(module).copy().items()
        }
        attributes["_modules"] = {name: _rebound(child, replicas) for name, child in module._modules.items()}
        attributes["training"] = False
        attributes.pop("_compiled_call_impl", None)
        vars(replica).update(attributes)
        for name in copyreg._slotnames(type(module)):  # type: ignore[attr-defined]
            if hasattr(module, name):
                object.__setattr__(replica, name, getattr(module, name))
    return Replica(replicas[model], {replica: module for module, replica in replicas.items()})


def _rebound(value: Any, replicas: dict[nn.Module, nn.Module], seen: Set[int] = frozenset()) -> Any:
    """What belongs to a module of the model, such as a `forward` of its own, made to belong to its replica."""
    if isinstance(value, nn.Module):
        return replicas.get(value, value)
    value = getattr(value, "_torchdynamo_orig_callable", value)  # what torch.compile was given
    if isinstance(value, MethodType):
        return MethodType(value.__func__, _rebound(value.__self__, replicas, seen))
    if isinstance(value, FunctionType) and value.__closure__ and id(value) not in seen:
        # As decorators make them: what they go around is in a cell.
        cells = tuple(_rebound_cell(cell, replicas, {*seen, id(value)}) for cell in value.__closure__)
        rebound = FunctionType(value.__code__, value.__globals__, value.__name__, value.__defaults__, cells)
        rebound.__kwdefaults__ = value.__kwdefaults__
        vars(rebound).update(vars(value))
        return rebound
    if isinstance(value, functools.partial):
        arguments = [_rebound(argument, replicas, seen) for argument in value.args]
        partial = functools.partial(_rebound(value.func, replicas, seen), *arguments, **value.keywords)
        vars(partial).update(vars(value))
        return partial
    return value


def _rebound_cell(cell: CellType, replicas: dict[nn.Module, nn.Module], seen: Set[int]) -> CellType:
    try:
        return CellType(_rebound(cell.cell_contents, replicas, seen))
    except ValueError:  # it is empty as yet
        return CellType()
