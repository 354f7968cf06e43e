"""Which answers may reach a scorer that executes them: literals and arithmetic, by grammars that know nothing else.

A text that is refused is never handed to Python's or sympy's evaluator. What is accepted has no way to name an
attribute, a string, a module or any function but the mathematical ones here, and its numbers are bounded, so that
evaluating it takes no time to speak of.
"""

from __future__ import annotations

import ast
import builtins
import keyword
import math
import re
from collections.abc import Callable
from functools import cache
from typing import Any

LONGEST = 4_000
"""Characters of an answer."""

DEEPEST = 40
"""Brackets within each other."""

DIGITS = 1_000
"""Digits that a number of an expression, or any of its intermediate results, may have."""

POWER = 1_000
"""How large an exponent of a symbol may be: derivatives and simplification write powers of sums out."""

_LITERAL = re.compile(r"[^\\\0\r\f]*")
"""An escape in a string, or another kind of line end, is read in more than one way."""

_EXPRESSION = re.compile(r"[0-9A-Za-z_+\-*/%^!()., \n\t]+")
_NUMBER = re.compile(r"(?<![\w.])(?:[0-9]{1,100}(?:\.[0-9]{0,100})?|\.[0-9]{1,100})(?:[eE][+-]?[0-9]{1,2})?(?![\w.])")
_NAME = re.compile(r"[A-Za-z_]\w*")
_PLAIN_NAME = re.compile(r"[A-Za-z][A-Za-z0-9]{0,30}|[A-Za-z]_[0-9A-Za-z]{1,8}")
_QUOTED = re.compile(r"""(["'])([^"']*)\1""")
_WORDS = re.compile(r"[0-9A-Za-z_]+(?:[ \n]+[0-9A-Za-z_]+)+")

CONSTANTS = frozenset({"pi", "E", "I", "oo", "C"})
FUNCTIONS = frozenset(
    {
        *("sin", "cos", "tan", "cot", "sec", "csc", "asin", "acos", "atan", "acot", "asec", "acsc", "atan2"),
        *("sinh", "cosh", "tanh", "coth", "sech", "csch", "asinh", "acosh", "atanh", "acoth", "asech", "acsch"),
        *("exp", "log", "ln", "sqrt", "cbrt", "root", "abs", "Abs", "sign", "floor", "ceiling", "Max", "Min"),
        *("max", "min", "erf", "erfi", "erfc", "Ei", "li", "Si", "Ci", "fresnels", "fresnelc", "Rational"),
        *("Pow", "pow", "factorial", "factorial2", "conjugate", "re", "im", "Integral"),
    }
)
"""What an expression may call, of sympy and of Python."""


def may_be_executed(text: str, evaluators: frozenset[str]) -> bool:
    """Whether an answer may reach a scorer that uses these evaluators; see `evaluators.evaluators`."""
    if not evaluators:
        return True
    if evaluators == {"eval"}:
        return is_words(text) if _WORDS.fullmatch(text.strip(" \n")) else is_literal(text)
    # A string that sympy's parser returns would be parsed again.
    if all(name.startswith("sympy.") for name in evaluators):
        return is_expression(text)
    return is_literal(text, strings=False) or is_words(text)


def is_literal(text: str, strings: bool = True) -> bool:
    """Whether a text is a bounded literal of Python: numbers, strings (or none) and nested collections of them."""
    if len(text) > LONGEST or not _LITERAL.fullmatch(text) or _depth(text) > DEEPEST:
        return False
    try:
        return _bounded(ast.literal_eval(text.strip()), strings)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return False


def is_words(text: str) -> bool:
    """Whether a text is several words or numbers that are no Python: evaluating it can only raise.

    Such are the rows of a matrix without commas; a single word names a variable, and is refused.
    """
    text = text.strip(" \n")
    if len(text) > LONGEST or not _WORDS.fullmatch(text):
        return False
    try:
        ast.parse(text)
    except SyntaxError:
        return True
    return False


def is_expression(text: str) -> bool:
    """Whether a text is arithmetic of bounded numbers, symbols and mathematical functions, as sympy writes it.

    What is judged is the code that sympy makes of the text and then evaluates, by its own first step, so that there is
    no second reading of the text. The characters are few before that: no quote, index or comment.
    """
    if quoted := _QUOTED.fullmatch(text.strip()):
        # sympy reads what its parser made of it once more, and takes ^ for a power then.
        return all(map(is_expression, {quoted[2], quoted[2].replace("^", "**")}))
    if len(text) > LONGEST or not _EXPRESSION.fullmatch(text) or _depth(text) > DEEPEST:
        return False
    rest = _NUMBER.sub(" ", text)
    if re.search(r"(?<!\w)[0-9]|\.", rest):
        return False  # a number of another form, or an attribute
    if not all(map(_is_symbol, _NAME.findall(rest))):
        return False
    from sympy.parsing.sympy_parser import standard_transformations, stringify_expr

    try:
        code = stringify_expr(text, {}, _names(), standard_transformations)
        _size(ast.parse(code.strip(), mode="eval").body)
    except Exception:
        # Neither can what is no code be evaluated, nor what sympy's first step already fails at.
        return False
    return True


def _depth(text: str) -> int:
    depth = deepest = 0
    for character in text:
        depth += (character in "([{") - (character in ")]}")
        deepest = max(deepest, depth)
    return deepest


def _bounded(value: Any, strings: bool) -> bool:
    if isinstance(value, dict):
        return all(_bounded(one, strings) for one in (*value.keys(), *value.values()))
    if isinstance(value, tuple | list | set):
        return all(_bounded(one, strings) for one in value)
    if isinstance(value, str | bytes):
        return strings
    # Python writes longer integers only if told to, after a time that grows with the square.
    return not isinstance(value, int) or abs(value) < 10**DIGITS


@cache
def _names() -> dict[str, Any]:
    """What a text's names mean to sympy, as it looks them up; others become symbols."""
    import sympy

    known = {name: getattr(sympy, name) for name in sympy.__all__}
    return {**vars(builtins), **known}


def _is_symbol(name: str) -> bool:
    """Whether a name stands for a number, a function of numbers, or nothing that is known: a symbol."""
    if len(name) == 1 or name in CONSTANTS or name in FUNCTIONS:
        return True
    return _PLAIN_NAME.fullmatch(name) is not None and name not in _names() and not keyword.iskeyword(name)


class _RefusedError(ValueError):
    pass


_INFINITE = math.inf


def _once(bound: Callable[[ast.expr], float]) -> Callable[[ast.expr], float]:
    """Finds a bound once for each node: the two kinds ask for each other, and would double the work at each level."""

    def known(node: ast.expr) -> float:
        found = vars(node).setdefault("bounds", {})
        if bound not in found:
            found[bound] = bound(node)
        return float(found[bound])

    return known


@_once
def _size(node: ast.expr) -> float:
    """A bound of the digits that a value and its intermediate results have; infinite with a symbol in it."""
    match node:
        case ast.BinOp(left, ast.Pow(), right) | ast.Call(ast.Name("pow" | "Pow"), [left, right], []):
            return _power(left, right)
        case ast.BinOp(left, ast.Add() | ast.Sub(), right):
            return _held(max(_size(left), _size(right)) + 1)
        case ast.BinOp(left, ast.Mult() | ast.Div() | ast.BitXor(), right):
            return _held(_size(left) + _size(right) + 1)
        case ast.BinOp(left, ast.FloorDiv() | ast.Mod(), right):
            return _finite(_held(_size(left) + _size(right) + 1))
        case ast.UnaryOp(ast.UAdd() | ast.USub(), operand):
            return _size(operand)
        # What sympy's first step wraps: no string of the text's own comes this far.
        case ast.Call(ast.Name("Integer" | "Float"), [ast.Constant(value)], []):
            return len(str(value)) + (100 if "e" in str(value).lower() else 0)
        case ast.Call(ast.Name("Symbol"), [ast.Constant(str())], []):
            return _INFINITE
        case ast.Call(ast.Name("factorial" | "factorial2"), [ast.Name() | ast.Call(ast.Name("Symbol"))], []):
            return _INFINITE
        case ast.Call(ast.Name("factorial" | "factorial2"), [argument], []):
            return _held(math.lgamma(_finite(_value(argument)) + 2) / math.log(10) + 1)
        case ast.Call(ast.Name("floor" | "ceiling"), [argument], []):
            return _finite(_size(argument))
        case ast.Call(ast.Name("exp" | "sinh" | "cosh"), [argument], []):
            return _held(_value(argument) + 20)
        case ast.Call(ast.Name(name), arguments, []) if name in FUNCTIONS and arguments:
            return _held(sum(map(_size, arguments)) + 20)
        case ast.Name(name) if len(name) == 1 or name in CONSTANTS:
            return _INFINITE
    raise _RefusedError(ast.dump(node))


def _held(size: float) -> float:
    if DIGITS < size < _INFINITE:
        raise _RefusedError(f"{size} digits")
    return size


def _finite(size: float) -> float:
    """Of what sympy would work out to the last digit, symbol or not."""
    if size == _INFINITE:
        raise _RefusedError("a whole number of unknown size")
    return size


def _power(base: ast.expr, exponent: ast.expr) -> float:
    power, size = _value(exponent), _size(base)
    if size == _INFINITE or power == _INFINITE:
        if POWER < power < _INFINITE:
            raise _RefusedError(f"a power of {power}")
        return _INFINITE
    return _held(max(size, 1) * max(power, 1))


@_once
def _value(node: ast.expr) -> float:
    """A bound of a value's magnitude; infinite with a symbol in it."""
    size = _size(node)
    if size == _INFINITE:
        return _INFINITE
    match node:
        case ast.Call(ast.Name("Integer" | "Float"), [ast.Constant(value)], []):
            return abs(float(value))  # type: ignore[arg-type]
        case ast.UnaryOp(_, operand):
            return _value(operand)
        case ast.BinOp(left, ast.Add() | ast.Sub(), right):
            return _value(left) + _value(right)
        case ast.BinOp(left, ast.Mult(), right):
            return _value(left) * _value(right)
        case ast.BinOp(left, ast.Div(), ast.Call(ast.Name("Integer"), [ast.Constant(int())], [])) | ast.Call(
            ast.Name("Rational"), [left, ast.Call(ast.Name("Integer"), [ast.Constant(int())], [])], []
        ):
            return _value(left)
        case ast.BinOp(ast.Call(ast.Name("Integer"), [ast.Constant(int())], []) as left, ast.Pow(), right) if (
            size < 300
        ):
            return _value(left) ** _value(right)
        case ast.Call(ast.Name("sqrt" | "cbrt" | "abs" | "Abs"), [argument], []):
            return max(1.0, _value(argument))
        case ast.Call(ast.Name("factorial" | "factorial2"), [argument], []) if size < 300:
            return math.gamma(_value(argument) + 2)
    if size > 300:
        raise _RefusedError(f"an exponent of {size} digits")
    return float(10**size)
