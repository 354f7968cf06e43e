"""Finds by reading which scorers of reasoning-gym hand text to an evaluator, so that no list of them can be outdated.

The reading starts at `score_answer`, follows what it calls within the packages that are no known library, and looks for
names that stand for an evaluator, under whatever alias. What it cannot follow counts as one.
"""

from __future__ import annotations

import ast
import builtins
import importlib
import inspect
import sys
import textwrap
from dataclasses import is_dataclass
from functools import cache, partial
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

EVALUATORS = frozenset({"eval", "exec", "compile", "__import__", "globals", "locals", "vars", "open", "input"})
"""Builtins by which text may come to be executed, or reach files."""

TEXT_METHODS = frozenset({"parse_expr", "parse_latex", "sympify", "format_map", "from_string", "read_pickle", "query"})
"""Methods of objects unknown that take code, whatever the object is."""

EXECUTING_MODULES = frozenset(
    {
        *("sympy", "z3", "pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "yaml", "numexpr", "pandas"),
        *("subprocess", "importlib", "runpy", "code", "codeop", "ctypes", "pty", "multiprocessing", "timeit", "socket"),
        *("posix", "nt", "os", "shutil", "jinja2", "asteval", "tempfile", "webbrowser", "urllib", "sys"),
    }
)
"""Packages whose functions execute text, or may: nearly all of sympy's take a string for an expression."""

HARMLESS = frozenset({"Symbol", "Dummy", "Wild"})
"""Of these packages, what takes a string for a name."""

PLAIN_MODULES = frozenset(sys.stdlib_module_names - EXECUTING_MODULES) | {"numpy"}
"""Packages whose functions only compute, but for those in NUMPY."""

NUMPY = frozenset({"load", "fromfile", "memmap", "fromregex", "genfromtxt"})


_FOUND: dict[type, frozenset[str]] = {}


def evaluators(dataset: type) -> frozenset[str]:
    """What the scorer of a dataset's class may hand text to: nothing, or names such as "eval" and "sympy.simplify".

    What the reading cannot follow is described in words that begin with "unknown".
    """
    if dataset not in _FOUND:
        reader = _Reader()
        reader.method(dataset, "score_answer")
        _FOUND[dataset] = frozenset(reader.found)
    return _FOUND[dataset]


class _Reader:
    """Follows functions, each once, and collects the evaluators in `found`."""

    def __init__(self) -> None:
        self.found: set[str] = set()
        self._read: set[Any] = set()

    def method(self, owner: type, name: str) -> None:
        """A method as any class of the hierarchy defines it: `super()` may call each."""
        for base in owner.__mro__:
            if name in vars(base) and base is not object:
                found = vars(base)[name]
                found = found.fget if isinstance(found, property) else getattr(found, "__func__", found)
                self.value(found, owner)

    def value(self, found: Any, owner: type | None = None) -> None:
        """What a name stands for: an evaluator, a function to follow, or something plain."""
        if isinstance(found, dict | list | tuple | set | frozenset):
            for one in filter(callable, list(found.values() if isinstance(found, dict) else found)):
                self.value(one)
        if isinstance(found, partial):
            found = found.func
        if isinstance(found, MethodType):
            found = found.__func__
        found = inspect.unwrap(found) if callable(found) else found
        if isinstance(found, ModuleType) or not callable(found):
            return
        name = getattr(found, "__name__", type(found).__name__)
        module = getattr(found, "__module__", None) or type(found).__module__
        package = module.partition(".")[0].lstrip("_")  # what is in C: _pickle, _io
        if module == "builtins" or found is open:
            if name in EVALUATORS and isinstance(found, BuiltinFunctionType):
                self.found.add(name)
        elif package in EXECUTING_MODULES:
            if name not in HARMLESS:
                self.found.add(f"{module}.{name}")
        elif package == "numpy":
            if name in NUMPY:
                self.found.add(f"{module}.{name}")
        elif package not in PLAIN_MODULES:
            self._source(found, owner)

    def _source(self, found: Any, owner: type | None) -> None:
        if (id(found), owner) in self._read:
            return
        self._read.add((id(found), owner))
        if isinstance(found, type):
            for name in ("__new__", "__init__", "__post_init__", "__call__"):
                self.method(found, name)
            return
        if not isinstance(found, FunctionType):
            # Made by C or by a call: of a class instance, read its class.
            if isinstance(found, BuiltinFunctionType) or not hasattr(type(found), "__call__"):  # noqa: B004
                self.found.add(f"unknown: {getattr(found, '__name__', type(found).__name__)} has no source")
                return
            self.method(type(found), "__call__")
            return
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(found)))
        except (OSError, TypeError, SyntaxError):
            if is_dataclass(owner) and found.__name__.startswith("__"):
                return  # written by `dataclass`: it sets fields, or compares them
            self.found.add(f"unknown: {found.__qualname__} has no source")
            return
        _Body(self, found, owner).visit(tree)


class _Body(ast.NodeVisitor):
    """The names and attributes in one function."""

    def __init__(self, reader: _Reader, function: FunctionType, owner: type | None) -> None:
        self._reader, self._owner = reader, owner
        self._names = {**vars(builtins), **function.__globals__, **_closure(function)}
        code = function.__code__
        self._locals = set(code.co_varnames) | set(code.co_cellvars)
        self._self = code.co_varnames[0] if owner is not None and code.co_argcount else None

    def visit_Import(self, node: ast.Import) -> None:
        for one in node.names:
            imported = one.name if one.asname else one.name.partition(".")[0]
            if (module := _imported(imported)) is None:
                self._reader.found.add(f"unknown: {imported} is not found")
            self._bind(one.asname or imported, module)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        package = self._names.get("__package__")
        module = _imported("." * node.level + (node.module or ""), package)
        for one in node.names:
            if not hasattr(module, one.name):
                self._reader.found.add(f"unknown: {one.name} of {node.module} is not found")
            self._bind(one.asname or one.name, getattr(module, one.name, None))

    def _bind(self, name: str, value: Any) -> None:
        self._names[name] = value
        self._locals.discard(name)

    def visit_Name(self, node: ast.Name) -> None:
        if isinstance(node.ctx, ast.Load):
            known, value = self._value(node)
            if known:
                self._reader.value(value)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        known, value = self._value(node)
        if known:
            self._reader.value(value)
            return
        if node.attr in TEXT_METHODS or node.attr in EVALUATORS | {"score_answer"}:
            self._reader.found.add(f"unknown: .{node.attr} of something")
        known, value = self._value(node.value)
        if self._is_self(node.value):
            assert self._owner is not None
            self._reader.method(self._owner, node.attr)
        elif known and type(value).__module__.partition(".")[0] not in PLAIN_MODULES | {"builtins"}:
            self._reader.method(type(value), node.attr)
        else:
            self._of_any_class(node.attr)
        self.visit(node.value)

    def visit_Call(self, node: ast.Call) -> None:
        match node:
            case ast.Call(ast.Name("getattr" | "setattr" | "delattr"), [_, name, *_]):
                if not (isinstance(name, ast.Constant) and isinstance(name.value, str)):
                    self._reader.found.add("unknown: getattr of a name that is computed")
                else:
                    self.visit_Attribute(ast.Attribute(node.args[0], name.value, ast.Load()))
            # A template of one's own is a constant; that of an answer reads any attribute.
            case ast.Call(ast.Attribute(ast.Name(text), "format")) if text in self._locals:
                self._reader.found.add("unknown: str.format of what may be the answer")
        self.generic_visit(node)

    def _is_self(self, node: ast.expr) -> bool:
        match node:
            case ast.Name(name):
                return name == self._self
            case ast.Call(ast.Name("super")):
                return self._owner is not None
        return False

    def _value(self, node: ast.expr) -> tuple[bool, Any]:
        """What a dotted name stands for, where that is known without running anything."""
        match node:
            case ast.Name(name):
                return (name in self._names and name not in self._locals), self._names.get(name)
            case ast.Attribute(below, name):
                known, value = self._value(below)
                if known and isinstance(value, ModuleType | type) and hasattr(value, name):
                    return True, getattr(value, name)
        return False, None

    def _of_any_class(self, name: str) -> None:
        """A method of an object unknown: of every class that the function's module knows and that has it."""
        for value in list(self._names.values()):
            if isinstance(value, type) and value.__module__.partition(".")[0] not in PLAIN_MODULES | {"builtins"}:
                if value.__module__.partition(".")[0] in EXECUTING_MODULES:
                    continue  # made by its constructor, which is found by name
                self._reader.method(value, name)


def _closure(function: FunctionType) -> dict[str, Any]:
    return dict(inspect.getclosurevars(function).nonlocals) if function.__closure__ else {}


@cache
def _imported(name: str, package: str | None = None) -> Any:
    try:
        return importlib.import_module(name, package)
    except Exception:  # whatever a module raises when it is imported
        return None
