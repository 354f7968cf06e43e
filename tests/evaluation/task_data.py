"""Rows in the formats of the Hub, and a stand-in for `datasets.load_dataset` that reads them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

FIXTURES = Path(__file__).parent / "fixtures"

Key = tuple[str, str | None, str]
"""Id, configuration and split."""

SUBJECTS = (
    "algebra",
    "counting_and_probability",
    "geometry",
    "intermediate_algebra",
    "number_theory",
    "prealgebra",
    "precalculus",
)

FILES = {
    "math": "math_train",
    "gsm8k": "gsm8k",
    "aqua": "aqua",
    "imbue-code": "imbue_code",
    "hellaswag": "hellaswag",
    "coinflip": "coinflip",
    "pku-saferlhf:helpful": "pku_saferlhf",
    "pku-saferlhf:safe": "pku_saferlhf",
}
"""The fixture of each task of the Hub."""

SOURCES: dict[str, tuple[list[Key], list[Key]]] = {
    "math": (
        [("EleutherAI/hendrycks_math", subject, "train") for subject in SUBJECTS],
        [("HuggingFaceH4/MATH-500", None, "test")],
    ),
    "gsm8k": ([("openai/gsm8k", "main", "train")], [("openai/gsm8k", "main", "test")]),
    "aqua": (
        [("deepmind/aqua_rat", "raw", "train")],
        [("deepmind/aqua_rat", "raw", "validation"), ("deepmind/aqua_rat", "raw", "test")],
    ),
    "imbue-code": ([("imbue/code-comprehension", None, "train")], []),
    "hellaswag": ([("Rowan/hellaswag", None, "train")], [("Rowan/hellaswag", None, "validation")]),
    "coinflip": ([("skrishna/coin_flip", None, "train")], [("skrishna/coin_flip", None, "validation")]),
    **{
        f"pku-saferlhf:{aspect}": (
            [("PKU-Alignment/PKU-SafeRLHF", None, "train")],
            [("PKU-Alignment/PKU-SafeRLHF", None, "test")],
        )
        for aspect in ("helpful", "safe")
    },
}
"""What each task asks the Hub for: for training, and for the test."""


def rows_of(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (FIXTURES / f"{name}.jsonl").read_text().splitlines()]


class FakeDatasets:
    """Serves rows through the real `datasets`, which reads them as JSON, and remembers what it was asked for."""

    def __init__(self, folder: Path) -> None:
        import datasets

        self._load = datasets.load_dataset
        self._folder = folder
        self.rows: dict[Key, list[dict[str, Any]]] = {}
        self.asked: list[Key] = []

    def load_dataset(self, id: str, config: str | None = None, *, split: str) -> Any:
        key = (id, config, split)
        self.asked.append(key)
        path = write_lines(self._folder / f"{len(self.asked)}.jsonl", list(self.rows[key]))
        return self._load("json", data_files=str(path), split="train", cache_dir=str(self._folder / "cache"))


def write_lines(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path
