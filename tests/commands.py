"""Running `swift-kernels` in the process of a test."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from swift_kernels.cli import main


def rollout_args(model: Path, output: Path, problems: int = 4, **options: Any) -> list[str]:
    given = {"model": model, "task": "sums", "output": output, "problems": problems, "n": 3, "max-new-tokens": 6}
    return ["rollout", *(part for name, value in {**given, **options}.items() for part in (f"--{name}", str(value)))]


def run(capsys: pytest.CaptureFixture[str], *args: object) -> tuple[int, str, str]:
    capsys.readouterr()
    code = main([str(argument) for argument in args])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def assert_refused(result: tuple[int, str, str], message: str, code: int = 2) -> None:
    """The exit code, one line on stderr that says why, and nothing on stdout."""
    assert result[0] == code, result
    assert result[1] == ""
    assert message in result[2]
    assert result[2].count("\n") == 1
    assert result[2].startswith("swift-kernels: ")
