r"""Finds the final answer of a response and takes it apart: lists, tuples, intervals, numbers, words, units.

math-verify alone reads `\text{east}` as a product that equals `seat`, drops units and bases, and looks for an earlier
expression when the boxed one cannot be read. Here only what has one reading is taken apart; expressions are left whole
for math-verify. What an answer leaves unsaid (unit, base, name of the unknown) is implied by the question; what it does
say must agree.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import lru_cache

from swift_kernels.evaluation.math_units import canonical_unit, multiplied, things

_BOX_TOKENS = re.compile(r"\\(?:boxed|fbox)(?![a-zA-Z])\s*(\{?)|\\.|[{}]", re.DOTALL)
_BARE_BOX = re.compile(r"[^\s$\\{},]+")
_BETWEEN_BOXES = re.compile(r"(?:[\s$,;.]|\\text\{\s*(?:and|or)\s*\}|\b(?:and|or)\b|\\[()\[\]])*")


@dataclass(frozen=True)
class Node:
    """An answer or a part of one.

    Attributes:
        kind: "leaf", "list" (no brackets), "set", "matrix", "row", "union", or a tuple's or interval's two brackets.
        raw: all of it as LaTeX, for math-verify.
        name: what stands left of an equals sign, if that is no expression.
        items: the parts, unless it is a leaf.
        text: a leaf without name and unit.
        value: a leaf's exact value where it is a number; `decimal` says that it was written with a point.
        percent: whether a percent sign followed.
        unit: canonical, None where there is none or it is not in the table of units.
        things: what words say is measured or counted, units among them.
        base: of a number such as 52_8.
        word: a leaf that is no mathematics but a word, or the letter of a choice.
    """

    kind: str
    raw: str
    name: str | None = None
    items: tuple[Node, ...] = ()
    text: str = ""
    value: Fraction | None = None
    decimal: bool = False
    percent: bool = False
    unit: str | None = None
    things: frozenset[str] = frozenset()
    base: str | None = None
    word: str | None = None


def boxed(text: str) -> str | None:
    """The content of the last box that is closed, and of those that nothing but "or" and the like parts from it."""
    return _boxes(text)[0]


def marked_answer(text: str) -> str | None:
    """What the response itself marks as its answer: the last box, or what follows GSM8K's `####`.

    None if nothing is marked; empty if the only box was cut off before its end.
    """
    content, cut_off = _boxes(text)
    if content is not None:
        return content
    return "" if cut_off else _after_marker(text)


def _boxes(text: str) -> tuple[str | None, bool]:
    """The boxed answer, and whether a box was left open."""
    opened: list[tuple[int, int] | None] = []
    boxes: list[tuple[int, int, str]] = []
    for token in _BOX_TOKENS.finditer(text) if "\\boxed" in text or "\\fbox" in text else ():
        if token[1] == "{":
            opened.append((token.start(), token.end()))
        elif token[1] is not None:
            if bare := _BARE_BOX.match(text, token.end()):
                boxes.append((token.start(), bare.end(), bare[0].rstrip(".")))
        elif token[0] == "{":
            opened.append(None)
        elif token[0] == "}" and opened and (box := opened.pop()):
            content = text[box[1] : token.start()].strip()
            within = boxes and boxes[-1][0] > box[0]
            if content and not within:
                boxes.append((box[0], token.end(), content))
    if not boxes:
        return None, any(opened)
    joined = [boxes.pop()]
    while boxes and _BETWEEN_BOXES.fullmatch(text, boxes[-1][1], joined[0][0]):
        joined.append(boxes.pop())
    return ", ".join(dict.fromkeys(content for _, _, content in reversed(joined))), any(opened)


_MARKER = re.compile(r"#{4,}([^\n]*)")
_ANNOUNCED = re.compile(
    r"[\s*_]*(?:(?:so|thus|hence|therefore),?\s+)?(?:the\s+)?(?:final\s+|correct\s+)?answer\b[\s*_]*(?:is\b)?[\s*_:=]*",
    re.IGNORECASE,
)
_HEADING = re.compile(r"[*_]*(?:\d+[.)][*_]*\s+[^\W\d_]|(?:[^\W\d_]{2,}['\w-]*[\s:]+)+(?![=\s]))")


def _after_marker(text: str) -> str | None:
    """What follows the last `####` that GSM8K's mark is: headings of Markdown begin so too."""
    for marker in reversed(list(_MARKER.finditer(text))):
        line = marker[1].strip()
        # The answer may also stand below its mark.
        line = line or text[marker.end() :].strip().partition("\n")[0].strip().lstrip("#")
        if announced := _ANNOUNCED.match(line):
            line = re.sub(r"[*_]+$", "", line[announced.end() :])
        last = not text[marker.end() :].strip()
        words_only = re.search(r"[\d\\$=]|^\W*[a-zA-Z]\W*$", line) is None
        # What ends the response is the heading of nothing: an answer in words.
        if line and (last or not (words_only or _HEADING.match(line))):
            return line
    return None


_CHARACTERS = str.maketrans(
    {
        "\N{MINUS SIGN}": "-",
        "\N{EN DASH}": "-",
        "\N{MULTIPLICATION SIGN}": r"\times ",
        "·": r"\cdot ",
        "÷": "/",
        "π": r"\pi ",
        "∞": r"\infty ",
        "\N{UNION}": r"\cup ",
        "±": r"\pm ",
        "≤": r"\le ",
        "≥": r"\ge ",
        "≠": r"\ne ",
        "∈": r"\in ",
        "°": r"^\circ",
        "√": r"\sqrt ",
        "²": "^2",
        "³": "^3",
        "½": r"\frac{1}{2}",
        "¼": r"\frac{1}{4}",
        "¾": r"\frac{3}{4}",
        "\N{NO-BREAK SPACE}": " ",
        "\N{THIN SPACE}": " ",
        "\N{NARROW NO-BREAK SPACE}": " ",
        "\n": " ",
        "\t": " ",
    }
)

_REWRITES = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        # Rows of a matrix end in \\cr from here on: half of \\\\ must not be read as a command.
        (r"\\\\\s*(?:\[[^\]]*\])?", r"\\cr "),
        (r"\\(?:text(?:bf|it|rm|sf|tt|normal)|mbox|hbox|mathrm|operatorname)\s*(?=\{)", r"\\text"),
        (r"\\math(?:bf|it|sf)\s*\{([^{}]*)\}", r"\1"),
        # TeX's ways to set a separator of thousands; a plain comma is judged where lists are split.
        (r"(?<=\d)(?:,\\!\s*|\{,\}|\\,)(?=\d{3}(?!\d))", ""),
        (r"\\(?:left|right)\s*\.|\\(?:left|right|[bB]igg?[lr]?)(?![a-zA-Z])", ""),
        (r"\\displaystyle|\\limits|\\!|\*\*(?=$)|^\*\*", ""),
        (r"\\[,;: ]|~|\\q?quad(?![a-zA-Z])", " "),
        (r"\\[()\[\]]", ""),
        (r"\\lbrace(?![a-zA-Z])", r"\\{"),
        (r"\\rbrace(?![a-zA-Z])", r"\\}"),
        (r"\\lbrack(?![a-zA-Z])", "["),
        (r"\\rbrack(?![a-zA-Z])", "]"),
        (r"\\varnothing(?![a-zA-Z])|\\\{\s*\\\}", r"\\emptyset"),
        (r"\\langle(?![a-zA-Z])", "("),
        (r"\\rangle(?![a-zA-Z])", ")"),
        (r"\\[dtc]frac(?![a-zA-Z])", r"\\frac"),
        (r"\\leqslant|\\leq(?![a-zA-Z])", r"\\le "),
        (r"\\geqslant|\\geq(?![a-zA-Z])", r"\\ge "),
        (r"\\frac\s*(\d)\s*(\d)", r"\\frac{\1}{\2}"),
        (r"\\frac\s*(\d)\s*\{", r"\\frac{\1}{"),
        (r"(\\frac\s*\{[^{}]*\})\s*(\d)", r"\1{\2}"),
        (r"\\text\s*\{\s*\}", ""),
        (r"\s*,?\s*(?:\\text\s*\{\s*(?:and|or)\s*\}|(?<![a-zA-Z\\])(?:and|or)(?![a-zA-Z]))\s*", ", "),
        (r"\^\s*\{\s*\\circ\s*\}|\^\s*\\circ|\\degree(?![a-zA-Z])", r"^\\circ"),
        (r"(?<![a-zA-Z\\])(?:infinity|inf)(?![a-zA-Z])", r"\\infty"),
        (r"(?<![a-zA-Z\\])pi(?![a-zA-Z])", r"\\pi"),
        (r"(?<![a-zA-Z\\])sqrt\s*\(([^()]*)\)", r"\\sqrt{\1}"),
        (r"(?<![a-zA-Z\\])sqrt\s*(?=[\d{])", r"\\sqrt "),
        (r"\\sqrt\s*\(([^()]*)\)", r"\\sqrt{\1}"),
        # All digits under the root: \sqrt13 of a model is no \sqrt{1}3.
        (r"\\sqrt\s*(\d+)", r"\\sqrt{\1}"),
        (r"(?<=[\w)}])\s*\*\*\s*(?=[\w({-])", "^"),
        (r"<=|=<", r"\\le "),
        (r">=", r"\\ge "),
        (r"\\(?:approx|coloneqq)(?![a-zA-Z])|:=", "="),
    )
]


_EMPHASIS = re.compile(r"(?<![\w*`^\\)}])(\*{1,3}|`{1,3})(?=[^\s*`])([^*`\n]{0,400}[^\s*`])\1(?![\w*`({])")
_VULGAR = re.compile(r"(\d*) ?([½¼¾])")
_SIGNS = str.maketrans({"\N{MINUS SIGN}": "-", "\N{NO-BREAK SPACE}": " ", "\N{NARROW NO-BREAK SPACE}": " "})


def plain_prose(text: str) -> str:
    """A response without emphasis, and without the characters that a search for numbers does not know."""
    text = _EMPHASIS.sub(r"\2", text.translate(_SIGNS))
    if _VULGAR.search(text):
        # Inside of dollars these are LaTeX already.
        parts = text.split("$")
        parts[::2] = [
            _VULGAR.sub(lambda one: f"${one[1]}{one[2]}$".translate(_CHARACTERS), part) for part in parts[::2]
        ]
        text = "$".join(parts)
    return text


def normalised(answer: str) -> str:
    """One way of writing for what LaTeX and plain text can write in several."""
    answer = _EMPHASIS.sub(r"\2", answer).translate(_CHARACTERS).strip()
    if len(answer) > 1 and answer[0] == answer[-1] == "$":
        answer = answer.strip("$")
    if "\\begin" not in answer:
        answer = re.sub(r"\\\\(?=[a-zA-Z])", r"\\", answer)  # escaped twice
    for pattern, replacement in _REWRITES:
        answer = pattern.sub(replacement, answer)
    answer = re.sub(r"\s+", " ", answer).strip(" ,;:")
    return answer.rstrip(".").strip() if not answer.endswith("..") else answer


@lru_cache(maxsize=256)
def parse_answer(answer: str) -> Node:
    """The parts of an answer in LaTeX or plain text."""
    return _parse(normalised(answer))


_SPLIT_TOKENS = re.compile(r"\\begin|\\end|\\cup(?![a-zA-Z])|\\[{}]|\\.|[()\[\]{},;]", re.DOTALL)
_OPENING, _CLOSING = frozenset({"(", "[", "{", "\\{", "\\begin"}), frozenset({")", "]", "}", "\\}", "\\end"})
_LARGE_NUMBER = re.compile(r"(?<![\d.])\d{1,3}(?:,\d{3})*$")
_SOLIDUS = re.compile(r"(?<![\\<>!])=")
_NAME = re.compile(r"(?:\\?[a-zA-Z]|\\text\s*\{[^{}]*\}|[ (),']|_\s*(?:\{[^{}]*\}|\w)|[({]\d[)}])+")
_MATRIX = re.compile(r"\\begin\s*\{([pb]?matrix|array)\}(?:\{[lcr|]*\})?(.*)\\end\s*\{\1\}")


def _parse(text: str) -> Node:
    items = _split(text, ",;", bracketed=False)
    if len(items) > 1:
        return Node("list", text, items=_flat(items))
    left, equals, right = _equation(text)
    if equals and right:
        return replace(_parse(right), raw=text, name=re.sub(r"\s+|[{}]", "", left))
    if len(parts := _split(text, ("\\cup",))) > 1:
        return Node("union", text, items=tuple(map(_parse, parts)))
    if (matrix := _MATRIX.fullmatch(text)) and "\\begin" not in matrix[2]:
        rows = [row for row in matrix[2].split("\\cr ") if row.strip()]
        return Node("matrix", text, items=tuple(map(_row, rows)))
    if inner := _enclosed(text):
        opening, content, closing = inner
        if opening == "\\{":
            return Node("set", text, items=_flat(_split(content, ",;")))
        parts = _split(content, ",;")
        if len(parts) > 1:
            return Node(opening + closing, text, items=tuple(map(_parse, parts)))
        if (opening, closing) == ("(", ")") and content:
            return replace(_parse(content), raw=text)
    if re.search(r"\\(?:pm|mp)(?![a-zA-Z])", text):
        signs = [{"pm": "+", "mp": "-"}, {"pm": "-", "mp": "+"}]
        both = [re.sub(r"\\(pm|mp)(?![a-zA-Z])", lambda sign, s=s: s[sign[1]], text) for s in signs]  # type: ignore[misc]
        return Node("list", text, items=tuple(_parse(one.strip().removeprefix("+").strip()) for one in both))
    return _leaf(text)


def _equation(text: str) -> tuple[str, str, str]:
    """Splits `x = 5`, `x \\in A` and chains such as `x = 2 + 3 = 5` into a name and what it stands for."""
    left, member, right = re.sub(r"\\in(?![a-zA-Z])", "\\\\in ", text).partition("\\in ")
    if member and _NAME.fullmatch(left.strip()):
        return left, member, right.strip()
    parts = [part.strip() for part in _SOLIDUS.split(text)]
    if len(parts) > 1 and _NAME.fullmatch(parts[0]) and parts[0]:
        return parts[0], "=", parts[-1]
    return "", "", text


def _flat(items: list[str]) -> tuple[Node, ...]:
    """Parsed, with `1 \\pm 2` among them spread out."""
    flat: list[Node] = []
    for item in map(_parse, items):
        flat.extend(item.items if item.kind == "list" else (item,))
    return tuple(flat)


def _row(text: str) -> Node:
    return Node("row", text, items=tuple(_parse(cell.strip()) for cell in text.split("&")))


def _split(text: str, separators: str | tuple[str, ...], bracketed: bool = True) -> list[str]:
    """Splits where no bracket is open. `1,234` without a space is one number, unless it stands in brackets that
    nothing else shows to hold such numbers: (1,234) is a pair, (1,234, 5) is not a triple."""
    parts, depth, begin = [], 0, 0
    joins = not bracketed or re.search(r",\s", text) is not None
    for token in _SPLIT_TOKENS.finditer(text):
        if token[0] in _OPENING:
            depth += 1
        elif token[0] in _CLOSING:
            depth -= 1
        elif depth == 0 and token[0] in separators:
            thousands = joins and token[0] == "," and re.match(r"\d{3}(?!\d)", text[token.end() :])
            if not (thousands and _LARGE_NUMBER.search(text[begin : token.start()])):
                parts.append(text[begin : token.start()].strip())
                begin = token.end()
    return [part for part in (*parts, text[begin:].strip()) if part]


def _enclosed(text: str) -> tuple[str, str, str] | None:
    """Opening bracket, content and closing bracket of a text that one pair of brackets holds."""
    depth, first = 0, None
    for token in _SPLIT_TOKENS.finditer(text):
        if token[0] in _OPENING:
            first = first or token
            depth += 1
            if first.start() != 0:
                return None
        elif token[0] in _CLOSING:
            depth -= 1
            if depth == 0:
                whole = first is not None and token.end() == len(text) and first[0] in ("(", "[", "\\{")
                return (first[0], text[first.end() : token.start()].strip(), token[0]) if first and whole else None
    return None


_TEXT = re.compile(r"\\text\s*\{([^{}]*)\}")
_CHOICE = re.compile(r"\(\s*([A-Z])\s*\)(?:[^,]*)|([A-Z])[.:)]?")
_LETTERS = re.compile(r"[^\W\d_]+(?:(?:'|-| +)[^\W\d_]+)*\.?")
_PLAIN_WORDS = re.compile(r"[^\W\d_]{4,}(?: [^\W\d_]+)*")
_PERCENT = re.compile(r"(.*[^\s\\])\s*(?:\\?%|\\text\s*\{\s*(?:percent|\\?%)\s*\}|\s(?:percent|pct))")
_DEGREES = re.compile(r"(.*\S)\s*\^\\circ(?:\s*(?:\\text\s*\{\s*)?[CF]\s*\}?)?")
_UNIT_IN_TEXT = re.compile(r"(.*\S)\s*\\text\s*\{([^{}]*)\}\s*(?:\^\s*\{?\s*(\d)\s*\}?)?")
_UNIT_IN_WORDS = re.compile(r"(.*[\d})])(\s*)([a-zA-Z][a-zA-Z./ ]*?)(?:\^\{?(\d)\}?)?")
_BASE = re.compile(r"\(?(?:\\text\{)?([0-9A-Z]+)\}?\)?_\s*\{?\s*(\d+)\s*\}?")


def _leaf(text: str) -> Node:
    leaf = Node("leaf", text, text=text)
    if word := _word(text):
        return replace(leaf, word=word)
    # \text{12 cm} is no word; a letter in an upright font is a symbol.
    if (whole := _TEXT.fullmatch(text)) and whole[1].strip():
        return replace(_leaf(whole[1].strip()), raw=text)
    if base := _BASE.fullmatch(text):
        return replace(leaf, text=base[1].lstrip("0") or "0", base=base[2])
    if money := re.match(r"(-?)\s*(?:\\\$|\$)\s*", text):
        leaf = replace(leaf, text=money[1] + text[money.end() :], unit="dollar")
    leaf = replace(leaf, text=leaf.text.replace("\\$", "").replace("$", "").strip())
    leaf = _without_unit(leaf)
    if leaf.word:
        return leaf
    if unit := leaf.unit or (leaf.percent and "percent"):
        leaf = replace(leaf, things=leaf.things | things(unit))
    value, decimal = number(leaf.text)
    return replace(leaf, value=value, decimal=decimal)


def _word(text: str) -> str | None:
    marked = "\\text" in text
    plain = _TEXT.sub(r"\1", text).strip() if marked else text
    if choice := _CHOICE.fullmatch(plain):
        return (choice[1] or choice[2]).casefold()
    # Unmarked, up to three letters may be a product: abc is cba.
    if (len(plain) > 1 and _TEXT.fullmatch(text) and _LETTERS.fullmatch(plain)) or _PLAIN_WORDS.fullmatch(text):
        words = plain.rstrip(".").casefold().split()
        return " ".join(words[1:] if len(words) > 1 and words[0] in ("a", "an", "the") else words)
    return None


def _without_unit(leaf: Node) -> Node:
    text = leaf.text
    if percent := _PERCENT.fullmatch(text):
        return replace(leaf, text=percent[1], percent=True)
    if degrees := _DEGREES.fullmatch(text):
        return replace(leaf, text=degrees[1], unit="degree")
    if unit := _UNIT_IN_TEXT.fullmatch(text):
        return _measured(leaf, unit[1], unit[2], unit[3])
    if (unit := _UNIT_IN_WORDS.fullmatch(text)) and (value := unit[1].strip()):
        phrase = unit[3].strip()
        # One letter may be a variable: 5m is a product, 5 m a length.
        known = canonical_unit(phrase, unit[4]) and (len(phrase) > 1 or unit[2])
        words = len(phrase) > 3 and max(map(len, phrase.split())) > 1
        if (known or words) and number(value)[0] is not None:
            return _measured(leaf, value, phrase, unit[4])
    return leaf


def _measured(leaf: Node, text: str, phrase: str, power: str | None) -> Node:
    """A leaf whose words are split into what multiplies `text` and what it counts or measures."""
    unit = canonical_unit(phrase, power)
    read = (Fraction(1), phrase) if unit else multiplied(phrase)
    value = number(text)[0]
    if read is None or (read[0] != 1 and value is None):
        # No unit to be dropped: it equals only what says the same.
        return replace(leaf, word=" ".join(_TEXT.sub(r" \1 ", leaf.text).casefold().split()))
    factor, phrase = read
    if factor != 1 and value is not None:
        value *= factor
        text = str(value.numerator) if value.denominator == 1 else rf"\frac{{{value.numerator}}}{{{value.denominator}}}"
    unit = unit or canonical_unit(phrase, power) or leaf.unit
    return replace(leaf, text=text, unit=unit, things=things(phrase))


_DIGITS = r"(?:\d+(?:,\d{3})*(?:\.\d+)?|\.\d+|\d+\.)"
_DECIMAL = re.compile(
    rf"({_DIGITS})(?:\s*(?:\\times|\\cdot|\*)\s*10\s*\^\s*\{{?\s*(-?\d{{1,3}})\s*\}}?|[eE]([+-]?\d{{1,3}}))?"
)
_FRACTION = re.compile(rf"\\frac\s*\{{\s*(-?{_DIGITS})\s*\}}\s*\{{\s*(-?{_DIGITS})\s*\}}|({_DIGITS})\s*/\s*({_DIGITS})")
_MIXED = re.compile(r"(\d+)\s*(\\frac\s*\{\d+\}\s*\{\d+\})|(\d+)\s+(\d+/\d+)")
_REPEATING = re.compile(r"(\d*)\.(\d*)\\overline\s*\{?(\d+)\}?")
_SPACED = re.compile(r"\d{1,3}(?: \d{3})+")
_LONGEST = 4000
"""Characters of a number that is compared exactly; Python refuses to read integers a little longer."""


def number(text: str) -> tuple[Fraction | None, bool]:
    """The exact value of a plain number, fraction or mixed number, and whether it was written as a decimal."""
    if len(text) > _LONGEST:
        return None, False
    text = text.strip()
    sign = 1
    if text[:1] in ("-", "+"):
        sign = -1 if text[0] == "-" else 1
        text = text[1:].strip()
    value, decimal = _unsigned(text)
    return (None if value is None else sign * value), decimal


def _unsigned(text: str) -> tuple[Fraction | None, bool]:
    if _SPACED.fullmatch(text):
        text = text.replace(" ", "")
    if found := _DECIMAL.fullmatch(text):
        value = Fraction(found[1].replace(",", "")) * Fraction(10) ** int(found[2] or found[3] or 0)
        return value, "." in found[1]
    if found := _FRACTION.fullmatch(text):
        above, below = (Fraction((found[i] or found[i + 2]).replace(",", "")) for i in (1, 2))
        return (above / below if below else None), "." in text
    if found := _MIXED.fullmatch(text):
        part, _ = _unsigned(found[2] or found[4])
        return (None if part is None else int(found[1] or found[3]) + part), False
    if found := _REPEATING.fullmatch(text):
        whole, fixed, repeated = found.groups()
        tail = Fraction(int(repeated), 10 ** len(repeated) - 1) / 10 ** len(fixed)
        return Fraction(f"{whole or 0}.{fixed or 0}") + tail, False
    return None, False
