"""Reversible changes to one module, which no other module, and no copy of it, takes part in."""

from __future__ import annotations

import functools
import threading
import types
import weakref
from collections.abc import Callable
from typing import Any

from torch import nn

_MISSING: Any = object()
_lock = threading.Lock()


class _Patched:
    """A method of a module that is replaced for now.

    Attributes:
        before: what the module's own attributes held under its name, if anything.
        original: the method.
        wrappers: what runs around it, the innermost first, each under a key of its own.
    """

    def __init__(self, module: nn.Module, name: str) -> None:
        self.before = module.__dict__.get(name, _MISSING)
        self.original = getattr(module, name)
        self.wrappers: dict[object, Callable[..., Any]] = {}

    def install(self, module: nn.Module, name: str) -> None:
        """Makes the module's attribute what the wrappers call for. A call that is running goes on as it began."""
        if not self.wrappers:
            if self.before is _MISSING:
                module.__dict__.pop(name, None)
            else:
                module.__dict__[name] = self.before
            return
        original, call = self.original, self.original
        for wrapper in self.wrappers.values():
            # The signature stays, which transformers inspects.
            call = functools.update_wrapper(functools.partial(wrapper, call), original)
        before = self.before

        def method(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            if self is module:
                return call(*args, **kwargs)
            if before is _MISSING:
                return getattr(type(self), name)(self, *args, **kwargs)
            return before(*args, **kwargs)

        module.__dict__[name] = types.MethodType(functools.wraps(original)(method), module)


_PATCHED: weakref.WeakKeyDictionary[nn.Module, dict[str, _Patched]] = weakref.WeakKeyDictionary()


def patch(module: nn.Module, name: str, wrapper: Callable[..., Any]) -> Callable[[], None]:
    """Replaces the method `name` of this instance by `wrapper(original, *args, **kwargs)`; returns what restores it.

    Patches may overlap, in one thread or in several, and end in any order: later ones run around earlier ones, and when
    the last has ended the module is as it was. Unlike a hook, a method of its own fails the guards of torch.compile:
    what was compiled before is traced again. A copy of the module runs the original method on itself.
    """
    key = object()
    with _lock:
        patched = _PATCHED.setdefault(module, {}).setdefault(name, _Patched(module, name))
        patched.wrappers[key] = wrapper
        patched.install(module, name)

    def restore() -> None:
        with _lock:
            if patched.wrappers.pop(key, None) is not None:
                patched.install(module, name)
                if not patched.wrappers:
                    del _PATCHED[module][name]

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
