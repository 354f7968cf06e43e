"""Rows of JSONL files and of the Hub, and the fields that a task needs of them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from swift_kernels.files import parse_json

Row = Mapping[str, Any]


def read_jsonl(path: str | Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields each object of a JSONL file with its place, `file:line`; blank lines are skipped."""
    with open(path, "rb") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield f"{path}:{number}", parse_object(line, f"{path}:{number}")


def parse_object(line: bytes, place: str) -> dict[str, Any]:
    """One JSON object, or an error that names the place it was read from."""
    try:
        row = parse_json(line.decode())
    except UnicodeDecodeError as error:
        raise ValueError(f"{place}: not UTF-8 text ({error.reason})") from None
    except ValueError as error:
        raise ValueError(f"{place}: {error}: expected one object a line") from None
    if not isinstance(row, dict):
        raise ValueError(f"{place}: a {type(row).__name__}: expected an object")
    return row


def text_of(row: Row, *names: str) -> str:
    """The first of these fields that is text, or a number as text.

    Raises:
        ValueError: none is; the caller says where the row stands.
    """
    for name in names:
        value = row.get(name)
        if isinstance(value, int | float) and not isinstance(value, bool):
            if not abs(value) < math.inf:
                raise ValueError(f"{name!r} is {value}: expected a number or text")
            value = str(value)
        if isinstance(value, str) and value.strip():
            return _checked(value, name)
    raise ValueError(f"no {' or '.join(map(repr, names))} that is text: the object has {sorted(row)}")


def texts_of(row: Row, name: str, least: int = 2) -> list[str]:
    """A field that is a list of texts, at least so many, none empty; raises as `text_of` does."""
    values = row.get(name)
    if not isinstance(values, list | tuple) or len(values) < least:
        raise ValueError(f"no {name!r} that is a list of {least} texts or more: the object has {sorted(row)}")
    for value in values:
        if not isinstance(value, str) or not value.strip():
            raise ValueError(f"{name!r} holds {value!r}: expected text")
    return [_checked(value.strip(), name) for value in values]


def _checked(text: str, name: str) -> str:
    # It ends a text for what is written in C: for some tokenizers, and for programs that grade.
    if "\0" in text:
        raise ValueError(f"{name!r} holds a NUL character: expected text without")
    return text
