"""Finding the final answer in prose: what is boxed, which option is meant, yes or no."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import islice
from string import ascii_uppercase

from swift_kernels.evaluation.math_answers import boxed

TAIL = 4_000
"""Characters at the end of a response in which statements are looked for, and of a box that names an option: the
patterns take time by the square of their text."""
STATEMENTS = 20
"""Of what a response states to be its answer, so much is looked at, from its end."""

_FONTS = re.compile(r"\\(?:text|textbf|textit|textrm|texttt|mathrm|mathbf|mathtt|operatorname)\s*\{([^{}]*)\}")
_STATEMENT = re.compile(
    r"\b(?:answer|option|choice|continuation|ending)s?\b"
    r"(?:\s+(?:to|for|of)\s[^.\n]{0,60}?)?"
    r"(?:\s+(?:is|would be|must be|should be)\b\s*:?|\s*[:=])\s*",
    re.IGNORECASE,
)
# What may follow "the answer is A" for A to be no article, and for a small letter to be no word.
_ENDED = re.compile(r"\s*$|[)\].:,;\"'$`}!]|\s*[-\u2013\u2014(=]|\s+(?:because|since|as|with|which)\b")
_ANOTHER = re.compile(r"[)\]]?\s*(?:,|/|\bor\b|\band\b)\s*(?:or\s+|and\s+)?[(\[]?[A-Z]\b")
_BOLD = re.compile(r"(?<![\w*])\*\*(?=\S)(.{1,400}?)(?<=\S)\*\*(?![\w*])")  # 2**2 is none
_BOTH = re.compile(r"\W*(?:yes|no)(?:\s+(?:or|and)\s+|\s*/\s*)\W*(?:yes|no)\b", re.IGNORECASE)
_SEVERAL = re.compile(r"[(\[]?[A-Z]\b")
_LISTED = re.compile(r"\W*[A-Z][).:]\s")


def plain(text: str) -> str:
    """`text` without fonts, dollars, bold type and superfluous space."""
    while (unwrapped := _FONTS.sub(r"\1", text)) != text:
        text = unwrapped
    text = re.sub(r"\\([{}_%#&])", r"\1", re.sub(r"\\[(),;! ]", " ", text))
    return " ".join(_BOLD.sub(r"\1", text).replace("$", "").split())


def choice(text: str, options: Sequence[str] | None = None) -> str | None:
    """The letter of the option that a response ends up with, or None.

    It is looked for in the last box, then in statements such as "the answer is (B)", the last one first, then in the
    last line alone. An option may be named by its letter or, where `options` are known, by its whole text. The article
    "a" is no letter, and of "B or C" neither is meant: a box that holds both leaves no answer.
    """
    letters = ascii_uppercase if options is None else ascii_uppercase[: len(options)]
    content = boxed(text)
    if content is not None and len(content) <= TAIL:
        if letter := _in_box(content, letters, options):
            return letter
        if _several(plain(content)):
            return None
    text = text[-TAIL:]
    for statement in _statements(text):
        if letter := _stated(statement, letters, options):
            return letter
    lines = [line for line in map(plain, text.splitlines()) if line]
    return _last_line(lines, letters, options) if lines else None


def yes_or_no(text: str) -> str | None:
    """ "yes" or "no", looked for as `choice` does, or None."""
    content = boxed(text)
    starts = [] if content is None else [plain(content[:TAIL])]
    text = text[-TAIL:]
    for start in [*starts, *_statements(text)]:
        if _BOTH.match(start):
            return None
        if match := re.match(r"[\"'(]*(yes|no)\b", start, re.IGNORECASE):
            return match[1].lower()
    lines = [line for line in map(plain, text.splitlines()) if line]
    # "No one flips it" is no answer.
    match = re.match(r"(yes|no)(?:[.,;:!]|$)|.*\b(yes|no)[.!]?$", lines[-1] if lines else "", re.IGNORECASE)
    return (match[1] or match[2]).lower() if match else None


def _statements(text: str) -> Iterator[str]:
    """What follows "the answer is" and the like on its line, the last statement first."""
    lines = list(map(plain, text.splitlines()))
    found = ((line, match.end()) for line in reversed(lines) for match in reversed(list(_STATEMENT.finditer(line))))
    for line, end in islice(found, STATEMENTS):
        yield line[end:]


def _several(shown: str) -> bool:
    """Whether letters of several options are given, such as "(A) or (B)"."""
    first = _SEVERAL.match(shown)
    return first is not None and _ANOTHER.match(shown, first.end()) is not None


def _in_box(content: str, letters: str, options: Sequence[str] | None) -> str | None:
    shown = plain(content)
    alone = re.fullmatch(r"(?:(?:option|choice|answer)\s+)?[(\[]?([A-Za-z])[)\].:,]*", shown, re.IGNORECASE)
    if alone and alone[1].upper() in letters:
        return alone[1].upper()
    if letter := _by_text(content, letters, options):
        return letter
    if _several(shown):
        return None
    first = re.match(r"[(\[]?([A-Z])(?:[)\]:]|\.\s)", shown)
    return first[1] if first and first[1] in letters else None


def _stated(statement: str, letters: str, options: Sequence[str] | None) -> str | None:
    # Before letters: ['b', 'a'] is an option, not B. An option that is a letter itself is not meant by it.
    if not re.fullmatch(r"\W*[A-Za-z]\W*", statement):
        for text in (statement, re.split(r"\.\s", statement, maxsplit=1)[0]):
            if letter := _by_text(text, letters, options):
                return letter
    match = re.match(r"(?:(?:option|choice|letter)\s+)?[(\[\"'`]*([A-Za-z])(?!\w|[-'\u2019]\w)", statement)
    if not match or match[1].upper() not in letters:
        return None
    letter, rest = match[1], statement[match.end() :]
    if _ANOTHER.match(rest) or not (_ENDED.match(rest) or letter in "BCDEFGHJKLMNOPQRSTUVWXYZ"):
        return None
    return letter.upper()


def _last_line(lines: Sequence[str], letters: str, options: Sequence[str] | None) -> str | None:
    line = lines[-1]
    alone = re.fullmatch(r"(?:option\s+)?[(\[]?([A-Za-z])[)\].:]*", line, re.IGNORECASE)
    if alone and alone[1].upper() in letters:
        return alone[1].upper()
    # The last of several such lines is the end of a list of the options, not a choice.
    first = re.match(r"[(\[]?([A-Z])[)\].:]+\s*(.+)", line)
    if first and _by_text(first[2], letters, options) == first[1] and sum(map(bool, map(_LISTED.match, lines))) == 1:
        return first[1]
    return _by_text(line, letters, options)


def _by_text(text: str, letters: str, options: Sequence[str] | None) -> str | None:
    """The letter of the only option whose text this is: as it stands, without TeX and full stop, or in any case."""
    for form in (str.strip, _bare, lambda text: _bare(text).casefold()):
        known = list(map(form, options or ()))
        if known.count(form(text)) == 1:
            return letters[known.index(form(text))]
    return None


def _bare(text: str) -> str:
    return plain(text).rstrip(" .")
