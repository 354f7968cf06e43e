"""A child of `Worker` that executes what it is asked, as a scorer does whose guard has a hole."""

from __future__ import annotations

import os
import tempfile
from typing import Any

from swift_kernels.evaluation.worker import serve

NOBODY = 65534

INHERITED = tempfile.TemporaryFile()  # noqa: SIM115


def answer(question: str) -> Any:
    scope: dict[str, Any] = {"inherited": INHERITED.fileno()}
    exec(question, scope)
    return scope.get("result", "done")


def main(user: int | None = None) -> None:
    serve(answer, lambda: None if user is None else os.setuid(user))


if __name__ == "__main__":
    main()
