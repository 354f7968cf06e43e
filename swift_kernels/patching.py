"""Reversible changes to one module, which no other module, and no deep copy of it, takes part in."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any

from torch import nn

_MISSING: Any = object()


def patch(module: nn.Module, name: str, wrapper: Callable[..., Any]) -> Callable[[], None]:
    """Replaces the method `name` of this instance by `wrapper(original, *args, **kwargs)`; returns what restores it.

    Unlike a hook, a method of its own fails the guards of torch.compile: what was compiled before is traced again.
    A deep copy of the module runs the original method on itself.
    """
    original = getattr(module, name)
    before = module.__dict__.get(name, _MISSING)

    def method(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if self is module:
            return wrapper(original, *args, **kwargs)
        if before is _MISSING:
            return getattr(type(self), name)(self, *args, **kwargs)
        if isinstance(before, types.MethodType) and before.__self__ is module:  # an earlier patch
            return before.__func__(self, *args, **kwargs)
        return before(*args, **kwargs)

    # The signature stays, which transformers inspects.
    bound = types.MethodType(functools.wraps(original)(method), module)
    restore = set_aside(module, name)
    module.__dict__[name] = bound
    return restore


def set_aside(module: nn.Module, name: str) -> Callable[[], None]:
    """Takes an attribute off this instance, if it has it; returns what puts it back, or leaves none."""
    attributes = module.__dict__
    value = attributes.pop(name, _MISSING)

    def restore() -> None:
        attributes.pop(name, None)
        if value is not _MISSING:
            attributes[name] = value

    return restore
