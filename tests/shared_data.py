from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest


def shared_data() -> Path:
    folder = Path(os.environ.get("SWIFT_KERNELS_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"{folder} is missing: set SWIFT_KERNELS_DATA to a folder with gsm8k_test.jsonl and math500.jsonl")
    return folder


def shared_rows(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (shared_data() / name).read_text().splitlines()]
