from __future__ import annotations

import json
import math
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest

pytest.importorskip("matplotlib")

from swift_kernels.evaluation import report
from swift_kernels.evaluation.study import Study, TaskStudy, Transfer, transfer
from tests.evaluation.test_study import make_rollouts, make_study, noisy

ABLATION: dict[str, Any] = {
    "task": "t",
    "train_problems": 100,
    "test_problems": 30,
    "baselines": {"vote": {"4": {"mean": 0.4, "low": 0.3, "high": 0.5}}},
    "results": [
        {
            "variant": {"axis": None if problems is None else "problems", "problems": problems},
            "accuracy": {"4": {"mean": mean, "low": mean - 0.1, "high": mean + 0.1}},
            "auc": {"mean": mean, "low": mean, "high": mean},
        }
        for problems, mean in ((None, 0.6), (25, 0.4), (50, 0.5))
    ],
}


@pytest.fixture(scope="module")
def task() -> TaskStudy:
    return make_study(rewards=True, task="tags <script>alert(1)</script> & such")


@pytest.fixture(scope="module")
def study(task: TaskStudy) -> Study:
    rollouts = make_rollouts(10)
    crossed: Transfer = transfer(["a", "b"], ["x"], [0], [rollouts], [[noisy(rollouts, 1.0, s)] for s in (1, 2)])
    return Study("a model", [task], crossed, 1.0)


def test_the_page_holds_everything_and_opens_without_complaints(study: Study, tmp_path: Path) -> None:
    from tests.browser import launch

    path = tmp_path / "report.html"
    report.write_html(replace(study, tasks=[*study.tasks, replace(study.tasks[0], task="another")]), path, ABLATION)
    with launch() as browser:
        page = browser.open(path)
        assert page.complaints == []
        assert page.evaluate("document.querySelectorAll('figure svg').length") == 5 * 2 + 2
        assert page.evaluate("document.querySelectorAll('tr.ours').length") == 2
        # A picture that is wider than the page would be cut.
        assert page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")


def test_text_is_escaped(study: Study, tmp_path: Path) -> None:
    report.write_html(study, tmp_path / "r.html")
    text = (tmp_path / "r.html").read_text()
    assert "<script" not in text
    assert "tags &lt;script&gt;" in text


def test_figures_of_the_json_are_in_both(study: Study, tmp_path: Path) -> None:
    report.write_html(study, tmp_path / "r.html")
    report.write_markdown(study, tmp_path / "r.md")
    evaluation = study.tasks[0].evaluation
    best = evaluation.accuracy[evaluation.n]["swift"]
    for path in (tmp_path / "r.html", tmp_path / "r.md"):
        text = path.read_text()
        assert f"{100 * best.mean:.1f} ({100 * best.low:.1f}-{100 * best.high:.1f})" in text
        assert "Cost of judge, cpu: 1,000,000 parameters" in text
        assert "a note" in text


def test_markdown_names_pictures_that_are_there(study: Study, tmp_path: Path) -> None:
    report.write_markdown(study, tmp_path / "r.md", ABLATION)
    named = re.findall(r"\]\((r-pictures/[^)]+)\)", (tmp_path / "r.md").read_text())
    assert len(named) == len(set(named)) == 5 + 2
    assert {f"r-pictures/{path.name}" for path in (tmp_path / "r-pictures").iterdir()} == set(named)
    assert all((tmp_path / name).read_text().startswith("<svg") for name in named)


def test_names_are_shown_as_they_are_in_markdown(task: TaskStudy, tmp_path: Path) -> None:
    own = replace(task, task="a|b <i>\n# c* " + "x" * 300)
    report.write_markdown(Study("m", [own], None, 1.0), tmp_path / "my report (1).md")
    text = (tmp_path / "my report (1).md").read_text()
    assert "## a\\|b \\<i\\> \\# c\\* x" in text
    named = re.findall(r"\]\(([^)]+)\)", text)
    assert named
    assert all((tmp_path / unquote(name)).is_file() for name in named)


def test_a_damaged_ablation_is_refused(study: Study, tmp_path: Path) -> None:
    with pytest.raises(report.ReportError, match="the ablation is damaged"):
        report.write_html(study, tmp_path / "r.html", {**ABLATION, "results": [{}]})


def test_the_same_figures_give_the_same_page(study: Study, tmp_path: Path) -> None:
    for name in ("a.html", "b.html"):
        report.write_html(study, tmp_path / name)
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()


@pytest.mark.parametrize("missing", ["calibration", "over_optimization", "one-n"])
def test_what_the_data_do_not_allow_is_left_out(task: TaskStudy, tmp_path: Path, missing: str) -> None:
    own = make_study(ns=[1]) if missing == "one-n" else replace(task, **{missing: None})
    report.write_html(Study("m", [own], None, 1.0), tmp_path / "r.html")
    assert (tmp_path / "r.html").read_text().count("<figure>") == {
        "calibration": 3,
        "over_optimization": 4,
        "one-n": 3,
    }[missing]


def test_without_a_right_and_a_wrong_answer_there_is_a_report(tmp_path: Path) -> None:
    rollouts = [replace(r, candidates=[replace(c, correct=True) for c in r.candidates]) for r in make_rollouts(5)]
    own = make_study(rollouts=rollouts)
    assert math.isnan(own.evaluation.auc.mean)
    report.write_html(Study("m", [own], None, 1.0), tmp_path / "r.html")
    assert "all answers are right" in (tmp_path / "r.html").read_text()


def test_an_ablation_of_something_else_is_said(study: Study, tmp_path: Path) -> None:
    report.write_markdown(study, tmp_path / "r.md", {**ABLATION, "results": ABLATION["results"][:1]})
    assert "did not vary the number of training problems" in (tmp_path / "r.md").read_text()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON, is it truncated"),
        ("[]", "holds a list"),
        ("{}", "is no evaluation"),
        (json.dumps({"format": "swift_kernels.evaluation", "version": 1}), "a damaged evaluation"),
    ],
    ids=["torn", "list", "empty", "damaged"],
)
def test_other_files_are_refused(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "e.json"
    path.write_text(content)
    with pytest.raises(report.ReportError, match=message):
        report.read(path)


def test_other_files_are_no_ablations(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text("{}")
    with pytest.raises(report.ReportError, match="ablate --output"):
        report.read_ablation(path)


def test_what_drawing_needs_is_named(study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"swift_kernels\[report\]"):
        report.write_html(study, tmp_path / "r.html")
    assert list(tmp_path.iterdir()) == []
