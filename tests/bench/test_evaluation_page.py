"""The report among the results says what the JSON files hold that it was made from."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("matplotlib")

from swift_kernels.evaluation import report

RESULTS = Path(__file__).parents[2] / "bench" / "results"
FOLDER = RESULTS / "evaluation"


def test_the_report_is_made_from_the_file_beside_it(tmp_path: Path) -> None:
    ablation = report.read_ablation(RESULTS / "training" / "6-sums-problems.json")
    report.write_markdown(report.read(FOLDER / "evaluation.json"), tmp_path / "README.md", ablation)
    assert (FOLDER / "README.md").read_text(encoding="utf-8") == (tmp_path / "README.md").read_text(encoding="utf-8")
    drawn = {path.name for path in (tmp_path / "README-pictures").iterdir()}
    assert {path.name for path in (FOLDER / "README-pictures").iterdir()} == drawn
