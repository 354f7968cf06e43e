"""Which answers may reach a scorer that executes them."""

from __future__ import annotations

import pytest

from swift_kernels.evaluation.answer_grammar import is_expression, is_literal, is_words, may_be_executed

LITERALS = ["[1, 2]", '["a", "b"]', "('a',)", "1", "-1", " 1.5 ", "0x1f", "{'a': [1, None]}", "'A'", "[[0, 1], [1, 0]]"]
NO_LITERALS = [
    *("x", "exit", "print(1)", "[x]", "[print(1)]", "9**9", "1 + 1", "[1] * 9", "f'{x}'", "f'{print(1)}'", "not 1"),
    *("[].append", "{1: [].append}", "(lambda: 1)()", "[i for i in (1, 2)]", "x if y else z", "'a'.upper()", "...()"),
    *("1; 2", "1\r2", "'\\x41'", "[1, 2", "", "(1 #\r+print())", "1" * 2000, "[" * 100 + "]" * 100, "[" * 4000),
    *("\uff4fpen('x')", "1 # \x00", "{**x}", "[*x]", "__import__('os')"),
]

WORDS = ["1 2 3", "0 1\n1 0", "_ Q _ _\n_ _ _ Q", " 2 3 ", "I do not know", "print x", "a b"]
NO_WORDS = [
    "x",
    "exit",
    "not self",
    "a and b",
    "x if y else z",
    "import os",
    "a in b",
    "del x",
    "1,2",
    "f (x)",
    "a.b c",
]

EXPRESSIONS = [
    *("4 + 5", "(10 - 4) * 4", "x**3/3 + C", "-x**2*exp(x) + 2*log(x)/3", "4!", "4!!", "2**(3!)", "2**(2**3)", "9**9"),
    *("2*(2 - 8*x)**(Rational(3, 2))/3 + C_1", "x^2", "2**sqrt(16) + 8", "sqrt(x**2 + 1)", "atan(x/2)", "E**x", "C!"),
    *("1.5e3*x", "pi/2", "x**-1", "3**(1/3)", "constant + x", "'x + 1'", '"x^2"', "5**3**2", "Integral(x*sin(x), x)"),
    *("(1 +\n2)", "x1 + alpha", "-(-x)", "abs(-3)", "max(1, 2)", "7//2", "7 % 2", "(1/2)**3", ".5*x", "2.*x"),
    "1**" * 60 + "1",
]
NO_EXPRESSIONS = [
    *("2**(10**200)", "2**10**200", "pow(2,10**400)", "x**(10**200)", "(10**150)**(10**150)", "2**(3**400)"),
    *("9**9**9**9", "2**2**2**2**2**2", "10**10000", "100000!", "(9!)!", "x**1001", "pow(9, pow(9, 9))", "exp(9999)"),
    *("2**floor(E**600)", "factorial(10**9)", "floor(x)", "9**(10**9/2)", "1e999", "9" * 200, "2**(2**(2**10))"),
    *("x.__class__", "x._y", "_x", "__import__('os')", "a_b_c", "C__1", "exp_polar(x)", "1 .real", "1..real", "x.y"),
    *("f(x)", "print(1)", "exec", "eval", "S(1)", "N(x)", "sympify(x)", "Symbol(x)", "Lambda(x, x)", "sin", "open"),
    *("[x]", "x[0]", "{x}", "lambda x: x", "x if y else z", "not x", "x and y", "x in y", "x for x in y", "x == 1"),
    *("(x := 1)", "x = 1", "sin(x=1)", "sin(*x)", "sin(**x)", "f'{1}'", "''", "'a' + 'b'", "'x.y'", "'open(x)'"),
    *("x # y", "(1 #\r+x)", "x\\\n+1", "x;y", "`x`", "1j", "0x1f", "1_000", "2x", "()", "\uff4fpen(1)", "x\x0c", "π"),
    *("(" * 100 + "1" + ")" * 100, "1+" * 4000 + "1", "4(5)", "(x)(1)", "await x", "yield", "True", "1 if 1 else 2"),
]


@pytest.mark.parametrize("text", LITERALS)
def test_literals(text: str) -> None:
    assert is_literal(text)


@pytest.mark.parametrize("text", NO_LITERALS, ids=range(len(NO_LITERALS)))
def test_what_is_no_literal(text: str) -> None:
    assert not is_literal(text)


@pytest.mark.parametrize("text", WORDS)
def test_words(text: str) -> None:
    assert is_words(text)
    with pytest.raises(SyntaxError):
        eval(text)


@pytest.mark.parametrize("text", NO_WORDS)
def test_what_is_no_words(text: str) -> None:
    assert not is_words(text)


class TestExpressions:
    @pytest.fixture(autouse=True)
    def _needs_sympy(self) -> None:
        pytest.importorskip("sympy")

    @pytest.mark.parametrize("text", EXPRESSIONS, ids=range(len(EXPRESSIONS)))
    def test_expressions(self, text: str) -> None:
        assert is_expression(text)

    @pytest.mark.parametrize("text", NO_EXPRESSIONS, ids=range(len(NO_EXPRESSIONS)))
    def test_what_is_no_expression(self, text: str) -> None:
        assert not is_expression(text)


@pytest.mark.parametrize(
    ("text", "evaluators", "fed"),
    [
        ("print(1)", set(), True),
        ("['a']", {"eval"}, True),
        ("x + 1", {"eval"}, False),
        ("0 1\n1 0", {"eval"}, True),
        ("x + 1", {"sympy.parse_expr", "sympy.diff"}, True),
        ("['a']", {"sympy.parse_expr"}, False),
        ("'open(1)'", {"sympy.parse_expr"}, False),
        ("x + 1", {"sympy.parse_expr", "eval"}, False),
        ("['a']", {"sympy.parse_expr", "eval"}, False),
        ("'a'", {"unknown: f has no source"}, False),
        ("[1, 2]", {"unknown: f has no source"}, True),
        ("a b", {"exec"}, True),
        ("import os", {"exec"}, False),
    ],
    ids=[
        *("any text where nothing is executed", "a list to eval", "a sum to eval", "rows to eval", "a sum to sympy"),
        *("strings to sympy", "a call in a string to sympy", "a sum to both", "strings to both", "a string to unknown"),
        *("numbers to unknown", "words to exec", "a statement to exec"),
    ],
)
def test_each_evaluator_has_its_grammar(text: str, evaluators: set[str], fed: bool) -> None:
    pytest.importorskip("sympy")
    assert may_be_executed(text, frozenset(evaluators)) is fed
