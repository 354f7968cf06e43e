"""The process behind `graders.MathGrader`: finds answers in responses, and compares them."""

from __future__ import annotations

import re
import sys
from contextlib import suppress
from fractions import Fraction
from functools import lru_cache, wraps
from typing import Any

from swift_kernels.evaluation.math_answers import Node, marked_answer, parse_answer, plain_prose
from swift_kernels.evaluation.worker import serve

TAIL = 20_000
"""Characters at the end of a response in which an answer that nothing marks is looked for."""

LONGEST = 2_000
"""Characters of an answer; what is longer is none."""

ABSOLUTE, RELATIVE = Fraction(1, 10**6), Fraction(5, 10**6)
"""How far a decimal may be from the exact value: six decimals, and six significant digits."""

_LAST_NUMBER = re.compile(r":\s+(-?\d{1,100}(?:\.\d{1,100})?)\s*\Z")
"""What math-verify takes in any case where no "answer" is announced: it prefers what ends last."""


def answer(question: dict[str, str]) -> Any:
    """The canonical answer in `question["text"]`; with a reference, whether the two are equal."""
    found = final_answer(question["text"])
    if len(found) > LONGEST:
        return None
    if "reference" not in question:
        return canonical(parse_answer(found)) or None if found else None
    return bool(found) and equal(parse_answer(question["reference"]), parse_answer(found))


def final_answer(text: str) -> str:
    """The answer as it stands in a response, empty if there is none."""
    marked = marked_answer(text)
    if marked is not None:
        return marked
    text = plain_prose(text[-TAIL:])
    if "answer" not in text.casefold() and (last := _LAST_NUMBER.search(text)):
        return last[1]
    from math_verify import parse
    from math_verify.grader import get_pct_val

    # None switches math-verify's own alarm off: the parent process keeps the time.
    found = parse(text, _configs(), parsing_timeout=None)
    if not found or not isinstance(found[-1], str):
        return str(found[0]) if found else ""
    return found[-1] + ("\\%" if get_pct_val(found[0]) is not None and "%" not in found[-1] else "")


def equal(reference: Node, found: Node) -> bool:
    """Whether an answer equals the reference; see `math_answers` for what counts as said."""
    if reference.name and found.name and reference.name != found.name:
        # y = 2x and x = y/2 are one line; x = 5 and y = 5 are not.
        return bool(re.search(r"[a-zA-Z]", _right(reference) + _right(found))) and _same(reference.raw, found.raw)
    if reference.kind == found.kind == "leaf":
        if "=" in reference.text + found.text:
            return _same(reference.raw, found.raw)
        return _equal_leaves(reference, found)
    for one, other in ((reference, found), (found, reference)):
        # The same number in two boxes, as a fraction and as a decimal, is one answer.
        if one.kind in ("list", "set") and other.kind == "leaf" and one.items:
            # 5 cm and 5 m both equal 5, but not each other.
            alike = all(equal(one.items[0], item) for item in one.items[1:])
            return alike and all(equal(item, other) if one is reference else equal(other, item) for item in one.items)
    kinds = {reference.kind, found.kind}
    # Of a union, the parts may also come as inequalities: x < 2 or x > 3.
    if kinds <= {"list", "set"} or kinds == {"union"} or kinds == {"union", "list"}:
        return _matched(reference.items, found.items)
    if len(kinds) == 1 or kinds == {"list", "()"}:
        return _in_order(reference.items, found.items)
    if kinds == {"matrix", "()"}:
        return _in_order(_column(reference), _column(found))
    # (2, 5) is 2 < x < 5, and 2A is a matrix.
    if "leaf" in kinds and any(sign in reference.raw + found.raw for sign in ("<", ">", "\\le", "\\ge", "\\begin")):
        return _same(_unnamed(reference), _unnamed(found))
    return False


def canonical(node: Node) -> str:
    """One text for most of the ways to write an answer."""
    if node.kind in ("list", "set"):
        return "{" + ", ".join(sorted(map(canonical, node.items))) + "}"
    if node.kind == "union":
        return " U ".join(sorted(map(canonical, node.items)))
    if node.kind != "leaf":
        brackets = node.kind if len(node.kind) == 2 else "()"
        return brackets[0] + ", ".join(map(canonical, _column(node))) + brackets[1]
    if node.word is not None or node.base is not None:
        return node.word or f"{node.text}_{node.base}"
    if node.value is not None:
        return str(node.value)
    with suppress(Exception):
        return str(_expression(node.text)[0].doit())
    return _unspaced(node.text)


def _right(node: Node) -> str:
    return node.raw.rpartition("=")[2]


def _unnamed(node: Node) -> str:
    return _right(node).rpartition("\\in")[2] if node.name and "\\infty" not in node.raw else node.raw


def _column(node: Node) -> tuple[Node, ...]:
    """A matrix of one column reads like a tuple."""
    if node.kind == "matrix" and all(len(row.items) == 1 for row in node.items):
        return tuple(row.items[0] for row in node.items)
    return node.items


def _in_order(references: tuple[Node, ...], found: tuple[Node, ...]) -> bool:
    return len(references) == len(found) and all(map(equal, references, found))


def _matched(references: tuple[Node, ...], found: tuple[Node, ...]) -> bool:
    left = list(found)
    for reference in references:
        match = next((item for item in left if equal(reference, item)), None)
        if match is None:
            return False
        left.remove(match)
    return not left


def _equal_leaves(reference: Node, found: Node) -> bool:
    if reference.word is not None or found.word is not None:
        return (reference.word or _plain(reference)) == (found.word or _plain(found))
    if reference.base or found.base:
        bases = {reference.base, found.base} - {None}
        return len(bases) == 1 and _plain(reference) == _plain(found)
    said = {leaf.unit or (leaf.percent and "percent") for leaf in (reference, found)} - {None, False}
    if len(said) > 1 or (reference.things and found.things and not reference.things & found.things):
        return False
    if reference.value is not None and found.value is not None:
        return _equal_numbers(reference, found)
    if _unspaced(reference.text) == _unspaced(found.text) != "":
        return reference.percent == found.percent
    if reference.percent or found.percent:
        return False
    if not _same(reference.text, found.text):
        return False
    # math-verify compares decimals at six places whatever their size: 0.0000012 would be 10^{-6}.
    written = next((leaf.value for leaf in (reference, found) if leaf.decimal), None)
    exact = next((leaf.text for leaf in (reference, found) if not leaf.decimal), None)
    return written is None or exact is None or _close(written, Fraction(str(_expression(exact)[0].evalf(30))))


def _unspaced(text: str) -> str:
    """Without the space that says nothing: 1 8 is not 18."""
    return re.sub(r"(?<!\d)\s+|\s+(?!\d)", "", text)


def _plain(node: Node) -> str:
    return " ".join(node.text.lstrip("0").casefold().split()) or "0"


def _equal_numbers(reference: Node, found: Node) -> bool:
    decimal = reference.decimal or found.decimal
    assert reference.value is not None
    assert found.value is not None
    pairs = [(reference.value, found.value)]
    if reference.percent != found.percent:
        percent, other = (reference.value, found.value) if reference.percent else (found.value, reference.value)
        # "What percentage": 50 is 50%, as is 0.5. Below 1 a number is no number of percent: 0.5% is not 0.5.
        pairs = [(percent / 100, other), *([(percent, other)] if abs(percent) >= 1 else [])]
    return any(a == b or (decimal and _close(a, b)) for a, b in pairs)


def _close(a: Fraction, b: Fraction) -> bool:
    return abs(a - b) <= min(ABSOLUTE, RELATIVE * max(abs(a), abs(b)))


def _same(reference: str, found: str) -> bool:
    """Whether math-verify takes two expressions for equal."""
    from math_verify import verify

    gold, target = _expression(reference), _expression(found)
    return bool(gold and target) and bool(verify(gold, target, allow_set_relation_comp=True, timeout_seconds=None))


_UNREAD = re.compile(r"\d\s*_|\d\s+\d|\\text|[:;?@#&\"`]")
"""What the LaTeX parser drops in silence, as it does the end of 5:6, or joins: 1 8 is neither 9 nor 18."""

_GROUPS = re.compile(r"(?<![\d.])(?<!\d )\d{1,3}(?: \d{3})+(?! ?\d)")
_MIXED = re.compile(r"(?<![\d.])(?<!\d )(\d+) (\d+)\s*/\s*(\d+)(?! ?\d)")


@lru_cache(maxsize=512)
def _expression(latex: str) -> list[Any]:
    from math_verify import parse

    latex = re.sub(r"\\text\s*\{([a-zA-Z])\}", r"\1", latex).replace("\\cr ", r"\\ ")
    latex = _MIXED.sub(r"(\1+\\frac{\2}{\3})", latex)
    latex = _GROUPS.sub(lambda groups: groups[0].replace(" ", ""), latex)
    if not latex or (_UNREAD.search(latex) and "\\begin" not in latex):
        return []
    return [found for found in parse(f"${latex}$", _configs()[:1], parsing_timeout=None) if not isinstance(found, str)]


@lru_cache(maxsize=1)
def _configs() -> Any:
    from latex2sympy2_extended import NormalizationConfig
    from math_verify import ExprExtractionConfig, LatexExtractionConfig

    # Units are told apart here; math-verify would also drop the variable of 3c as one.
    normalization = NormalizationConfig(
        basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="none"
    )
    return (LatexExtractionConfig(normalization_config=normalization), ExprExtractionConfig())


_ARITHMETIC = re.compile(r"[\d\s.+\-*/^()]*")
"""What math-verify takes for a plain expression: no letter, no quote and no bracket, so that nothing can be named."""


def guard_evaluators() -> None:
    """Lets sympy's parser of text, which evaluates it as Python, see nothing but arithmetic.

    math-verify gives it no more; but many functions of sympy call it for a string, and nobody promises that none of
    LaTeX's conversions ever passes one on.
    """
    import math_verify  # noqa: F401
    import sympy.physics.units  # noqa: F401  # has sympy parse names of its own, when a solver first needs it
    from sympy.parsing import sympy_parser

    evaluate = sympy_parser.parse_expr
    if hasattr(evaluate, "__wrapped__"):
        return

    @wraps(evaluate)
    def parse_expr(text: str, *args: Any, **options: Any) -> Any:
        if not isinstance(text, str) or not _ARITHMETIC.fullmatch(text):
            raise ValueError("only arithmetic is parsed as Python")
        return evaluate(text, *args, **options)

    for module in list(sys.modules.values()):
        if getattr(module, "parse_expr", None) is evaluate:
            module.parse_expr = parse_expr  # type: ignore[attr-defined]


def _prepare() -> None:
    guard_evaluators()
    # What is set up when first used, every fork would set up anew.
    equal(parse_answer("\\frac{1}{2} + \\sqrt{x}"), parse_answer("\\sqrt{x} + 2^{-1}"))
    final_answer("so it is $2x^2$ or 3/4")


def main() -> None:
    serve(answer, _prepare)


if __name__ == "__main__":
    main()
