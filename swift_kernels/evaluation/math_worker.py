"""The process behind `graders.MathGrader`: one JSON question a line in, one JSON answer a line out."""

from __future__ import annotations

import json
import logging
import os
import sys
from typing import Any


def answer(question: dict[str, str]) -> Any:
    """The canonical answer in `question["text"]`; with a reference, whether the two are equal."""
    from math_verify import parse, verify

    # None switches math-verify's own alarm off: the parent process keeps the time.
    found = parse(question["text"], parsing_timeout=None)
    if "reference" not in question:
        return str(found[0]) if found else None
    # Without an environment around it, LaTeX such as \frac{1}{2} is not recognised as an expression.
    reference = question["reference"]
    expected = parse(f"${reference}$", parsing_timeout=None) or parse(reference, parsing_timeout=None)
    return bool(verify(expected, found, timeout_seconds=None))


def main() -> None:
    # Whatever a library prints must not be taken for an answer.
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    sys.stdout = sys.stderr
    import math_verify  # noqa: F401  (the parent waits for this import once, not in its first question)

    logging.disable(logging.CRITICAL)
    print(json.dumps("ready"), file=replies, flush=True)
    for line in sys.stdin:
        try:
            reply = answer(json.loads(line))
        except Exception:  # what cannot be parsed or compared has no answer
            reply = None
        print(json.dumps(reply), file=replies, flush=True)


if __name__ == "__main__":
    main()
