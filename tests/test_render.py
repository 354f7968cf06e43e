from __future__ import annotations

import pytest

from swift_kernels.cli import render
from swift_kernels.evaluation.compare import SELECTOR_NAMES
from swift_kernels.evaluation.evaluate import Evaluation, evaluate
from swift_kernels.training.rollouts import Confidence, Response, Rollout


def make_evaluation(candidates: int, recorded: bool = True, ns: list[int] | None = None) -> Evaluation:
    """Of a head that is right wherever an answer is."""
    confidence = Confidence([-1.0], [0.0], [2.0]) if recorded else None
    rollouts = [
        Rollout(
            str(number),
            str(number),
            "prompt",
            "1",
            [3],
            [Response([5], "", True, index == 0, str(index), confidence) for index in range(candidates)],
        )
        for number in range(12)
    ]
    return evaluate(rollouts, [[float(index == 0) for index in range(candidates)]] * 12, ns)


def shown(evaluation: Evaluation, capsys: pytest.CaptureFixture[str]) -> list[str]:
    render.emit({}, False, render.evaluation_table(evaluation, "title"), render.evaluation_lines(evaluation))
    return [line.rstrip() for line in capsys.readouterr().out.splitlines()]


def test_a_selector_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    title, heads, *lines = shown(make_evaluation(16), capsys)
    assert title == "title"
    assert heads.split("  ")[0] == "picked by"
    assert [f"N={n} " in heads for n in (1, 2, 4, 8, 16)] == [True] * 5
    shown_names = ["random", "vote", "length", "longest", "logprob", "self_certainty", "swift", "oracle"]
    rows = dict(zip(shown_names, lines, strict=False))
    for key in shown_names:
        assert rows[key].startswith(SELECTOR_NAMES[key])
        assert rows[key].endswith("100.0)" if key in ("swift", "oracle") else "0.004")
    assert "6.2 (6.2-6.2)  +93.8 (+93.8 to +93.8)" in rows["self_certainty"]
    assert max(map(len, [heads, *lines])) <= render.PIPE_WIDTH


def test_selectors_that_are_left_out_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    lines = shown(make_evaluation(4, recorded=False), capsys)
    assert not any(line.startswith("self-certainty") for line in lines)
    assert any(line.startswith("No per-token confidence in these rollouts") for line in lines)
    assert max(map(len, lines)) <= render.PIPE_WIDTH


@pytest.mark.parametrize(
    ("ns", "columns"),
    [([4], [4]), ([1, 2, 4, 8, 16, 32, 64], [1, 4, 8, 16, 64]), (list(range(1, 65)), [1, 17, 33, 48, 64])],
    ids=["one", "seven", "all"],
)
def test_columns_of_n_that_fit(capsys: pytest.CaptureFixture[str], ns: list[int], columns: list[int]) -> None:
    evaluation = make_evaluation(64, ns=ns)
    _, heads, *lines = shown(evaluation, capsys)
    assert [int(head[2:]) for head in heads.split() if head.startswith("N=")] == columns
    assert max(map(len, [heads, *lines])) <= render.PIPE_WIDTH
    assert (f"5 of {len(ns)} N are shown; --json has all" in lines) == (len(ns) > len(columns))
    assert list(evaluation.to_dict()["accuracy"]) == ns
