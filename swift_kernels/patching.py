"""Reversible changes to one module, which no other module, and no copy of it, takes part in."""

from __future__ import annotations

import functools
import sys
import threading
import types
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from torch import nn

_MISSING: Any = object()
_lock = threading.Lock()


@contextmanager
def _changing() -> Iterator[None]:
    """Held while methods change: by one thread at a time, and by none while another one traces for torch.compile."""
    dynamo = sys.modules.get("torch._dynamo.convert_frame")  # until it is imported, nobody traces
    with getattr(dynamo, "compile_lock", nullcontext()), _lock:
        yield


class _Patched:
    """A method of a module that is replaced for now.

    Attributes:
        before: what the module's own attributes held under its name, if anything.
        original: the method.
        wrappers: what runs around it, the innermost first, each under a key of its own.
        installed: what the module's attribute is while there are any, unless somebody else replaces it.
    """

    def __init__(self, module: nn.Module, name: str) -> None:
        self.before = module.__dict__.get(name, _MISSING)
        self.original = getattr(module, name)
        self.wrappers: dict[object, Callable[..., Any]] = {}
        self.installed: Any = self.before

    def is_installed(self, module: nn.Module, name: str) -> bool:
        return module.__dict__.get(name, _MISSING) is self.installed

    def install(self, module: nn.Module, name: str) -> None:
        """Makes the module's attribute what the wrappers call for. A call that is running goes on as it began."""
        if not self.wrappers:
            self.installed = self.before
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

        self.installed = types.MethodType(functools.wraps(original)(method), module)
        module.__dict__[name] = self.installed


_PATCHED: weakref.WeakKeyDictionary[nn.Module, dict[str, _Patched]] = weakref.WeakKeyDictionary()


def patch(module: nn.Module, name: str, wrapper: Callable[..., Any]) -> Callable[[], None]:
    """Replaces the method `name` of this instance by `wrapper(original, *args, **kwargs)`; returns what restores it.

    Patches may overlap, in one thread or in several, and end in any order: later ones run around earlier ones, and when
    the last has ended the module is as it was. Unlike a hook, a method of its own fails the guards of torch.compile:
    what was compiled before is traced again. A copy of the module runs the original method on itself.
    """
    key = object()
    with _changing():
        methods = _PATCHED.setdefault(module, {})
        if name not in methods or not methods[name].is_installed(module, name):
            # What a user put there meanwhile, around earlier patches or in their place, is what this one goes around.
            methods[name] = _Patched(module, name)
        patched = methods[name]
        patched.wrappers[key] = wrapper
        patched.install(module, name)

    def restore() -> None:
        with _changing():
            if patched.wrappers.pop(key, None) is None:
                return
            if patched.is_installed(module, name):
                patched.install(module, name)
            if not patched.wrappers and methods.get(name) is patched:
                del methods[name]

    return restore
