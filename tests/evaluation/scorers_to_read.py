"""Classes whose `score_answer` hands text to an evaluator in some way, and some where it does not."""

from __future__ import annotations

import ast
import builtins
import builtins as b
import functools
import json
import subprocess as sp
from typing import Any

import sympy
import sympy as sy
from sympy import sympify as harmless_name
from sympy.parsing.sympy_parser import parse_expr as pe

TEMPLATE = "{}"
evaluate = eval


def helper(text: str) -> Any:
    return second_helper(text)


def second_helper(text: str) -> Any:
    return eval(text)


class Tool:
    def run(self, text: str) -> Any:
        return eval(text)

    def plain(self, text: str) -> int:
        return len(text)


TABLE = {"a": helper}
PARTIAL = functools.partial(eval)


def _hidden() -> Any:
    class Hidden:
        def run(self, text: str) -> Any:
            return eval(text)

    return Hidden()


TOOL_ELSEWHERE = _hidden()


class Calls:
    def score_answer(self, answer: str, entry: Any) -> Any:
        return eval(answer)


class CallsByAlias:
    def score_answer(self, answer: str, entry: Any) -> Any:
        return evaluate(answer)


class CallsByLocalAlias:
    def score_answer(self, answer: str, entry: Any) -> Any:
        f = exec
        return f(answer)


class PassesIt:
    def score_answer(self, answer: str, entry: Any) -> Any:
        return list(map(eval, [answer]))


class CallsOfAModule:
    def score_answer(self, answer: str, entry: Any) -> Any:
        return b.eval(answer)


class CallsByGetattr:
    def score_answer(self, answer: str, entry: Any) -> Any:
        return getattr(builtins, "ev" + answer[:2])(answer)


class CallsByGetattrOfAConstant:
    def score_answer(self, answer: str, entry: Any) -> Any:
        return getattr(builtins, "eval")(answer)  # noqa: B009


class CallsHelpers:
    def score_answer(self, answer: str, entry: Any) -> Any:
        return helper(answer)


class CallsMethods:
    def score_answer(self, answer: str, entry: Any) -> Any:
        return self._first(answer)

    def _first(self, answer: str) -> Any:
        return self._second(answer)

    @staticmethod
    def _second(answer: str) -> Any:
        return eval(answer)


class Inherits(CallsMethods):
    pass


class Overrides(CallsMethods):
    def _first(self, answer: str) -> Any:
        return super()._first(answer)


class CallsSuper(Calls):
    def score_answer(self, answer: str, entry: Any) -> Any:
        return super().score_answer(answer, entry)


class UsesAnotherClass:
    def score_answer(self, answer: str, entry: Any) -> Any:
        tool = Tool()
        return tool.run(answer)


class HoldsAnotherClass:
    def __init__(self, tool: Tool) -> None:
        self.tool = tool

    def score_answer(self, answer: str, entry: Any) -> Any:
        return self.tool.run(answer)


class Delegates:
    members: dict[str, Any] = {}  # noqa: RUF012

    def score_answer(self, answer: str, entry: Any) -> Any:
        return self.members[entry].score_answer(answer, entry)


class ImportsInside:
    def score_answer(self, answer: str, entry: Any) -> Any:
        from sympy.parsing.sympy_parser import parse_expr

        return parse_expr(answer)


class ImportsAnAliasInside:
    def score_answer(self, answer: str, entry: Any) -> Any:
        import pickle as p

        return p.loads(answer.encode())


class ParsesByAlias:
    def score_answer(self, answer: str, entry: Any) -> Any:
        return pe(answer)


class ParsesByDots:
    def score_answer(self, answer: str, entry: Any) -> Any:
        return sy.parsing.sympy_parser.parse_expr(answer)


class ParsesByAnotherName:
    def score_answer(self, answer: str, entry: Any) -> Any:
        return harmless_name(answer)


class Simplifies:
    def score_answer(self, answer: str, entry: Any) -> Any:
        return sympy.simplify(answer) == 0


class Shorthand:
    def score_answer(self, answer: str, entry: Any) -> Any:
        return sympy.S(answer)


class MakesAPolynomial:
    def score_answer(self, answer: str, entry: Any) -> Any:
        return sympy.Poly(answer)


class MakesAnEquation:
    def score_answer(self, answer: str, entry: Any) -> Any:
        return sympy.Eq(answer, 0)


class StartsAProcess:
    def score_answer(self, answer: str, entry: Any) -> Any:
        return sp.run([answer])


class Formats:
    def score_answer(self, answer: str, entry: Any) -> Any:
        return answer.format(entry)


class Compiles:
    def score_answer(self, answer: str, entry: Any) -> Any:
        return compile(answer, "", "exec")


class CallsOutOfATable:
    def score_answer(self, answer: str, entry: Any) -> Any:
        return TABLE[entry](answer)


class CallsAPartialFunction:
    def score_answer(self, answer: str, entry: Any) -> Any:
        return PARTIAL(answer)


class CallsAnInstanceOfAClassElsewhere:
    def score_answer(self, answer: str, entry: Any) -> Any:
        return TOOL_ELSEWHERE.run(answer)


class Opens:
    def score_answer(self, answer: str, entry: Any) -> Any:
        return open(answer).read()


class InALambda:
    def score_answer(self, answer: str, entry: Any) -> Any:
        return (lambda text: eval(text))(answer)


class Plain:
    def score_answer(self, answer: str, entry: Any) -> Any:
        data = json.loads(answer) if answer else ast.literal_eval(answer)
        return float(data == entry["answer"].strip()) + len(TEMPLATE.format(answer))


class PlainByHelpers:
    def score_answer(self, answer: str, entry: Any) -> Any:
        return self._compared(answer, sympy.Symbol("x")) + Tool().plain(answer)

    def _compared(self, answer: str, symbol: Any) -> float:
        return float(answer.lower() == str(symbol))


class PlainBesideMethodsThatExecute(Plain):
    def make(self, text: str) -> Any:
        return eval(text)


EXECUTING: list[type] = [
    *(Calls, CallsByAlias, CallsByLocalAlias, PassesIt, CallsOfAModule, CallsByGetattr, CallsByGetattrOfAConstant),
    *(CallsHelpers, CallsMethods, Inherits, Overrides, CallsSuper, UsesAnotherClass, HoldsAnotherClass, Delegates),
    *(ImportsInside, ImportsAnAliasInside, ParsesByAlias, ParsesByDots, ParsesByAnotherName, Simplifies, Shorthand),
    *(MakesAPolynomial, MakesAnEquation, StartsAProcess, Formats, Compiles, Opens, InALambda),
    *(CallsOutOfATable, CallsAPartialFunction, CallsAnInstanceOfAClassElsewhere),
]
PLAIN: list[type] = [Plain, PlainByHelpers, PlainBesideMethodsThatExecute]
