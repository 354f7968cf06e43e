"""The page on a head: exact text, harmless text, readable colours, and nothing asked of a network."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("jinja2")
pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")

from swift_kernels.evaluation import colours, inspection
from swift_kernels.evaluation.inspection import (
    Inspection,
    Shown,
    choose_answers,
    choose_problems,
    make_answers,
    segments,
)
from swift_kernels.evaluation.metrics import Estimate
from swift_kernels.evaluation.probe import EntryProbe, Probe
from swift_kernels.evaluation.traces import Trace
from swift_kernels.evaluation.weights import EntryWeight
from swift_kernels.training.rollouts import Response, Rollout
from tests.browser import Browser, launch

HOSTILE = [
    "<script>window.stolen = 1</script>",
    "</span></div>",
    " \"'><img src='http://example.com/x.png' onerror='window.stolen = 1'>",
    "\n",
    "  ",
    "",
    "👍🏽",
    "a\tb\n",
    "&amp;",
    "{{ 7 * 7 }}",
    "\u200b",
    "<|im_end|>",
]
ESTIMATE = Estimate(0.7, 0.6, 0.8)


def make_trace(pairs: list[tuple[float, float]]) -> Trace:
    gate_reward = torch.tensor(pairs).reshape(-1, 2)
    gate, reward = gate_reward.unbind(1)
    return Trace(float((gate * reward).sum() / gate.sum()), gate_reward)


def make_shown(tokens: list[str], identity: str = "p1") -> Shown:
    """A right answer of these tokens, of which all but the last are scored, a wrong one, and one without a score."""
    count = len(tokens)
    answers = [
        Response(list(range(10, 10 + count)), "".join(tokens), True, True, "42"),
        Response([7, 8, 9], "no.", False, False, None),
        Response([7], "n", False, False, None),
    ]
    traces = [
        make_trace([((place + 1) / count, place - 3.5) for place in range(count - 1)]),
        make_trace([(0.001, -80.0), (0.999, -1.0)]),
        make_trace([]),
    ]
    rollout = Rollout(identity, identity, "</script><img src=http://example.com/p.png>", "<b>42</b>", [1], answers)
    positions = [list(range(count - 1)), [0, 1], []]
    texts = [tokens, ["n", "o", "."], ["n"]]
    return Shown(rollout, make_answers(rollout, traces, positions, texts, {10 + count - 1}))


def make_inspection(**changes: Any) -> Inspection:
    entries: list[int | str] = [0, 3, "logits"]
    probe = Probe(
        [EntryProbe(entry, ESTIMATE, ESTIMATE, ESTIMATE, ESTIMATE, 32) for entry in entries],
        0.6,
        90,
        2,
        9,
        7,
        5,
        32,
        "mean",
    )
    weights = [EntryWeight(entry, 0.2, 0.3) for entry in entries]
    whole = Inspection(
        {"Head": "<i>head</i>"},
        weights,
        True,
        True,
        probe,
        ESTIMATE,
        [make_shown(HOSTILE)],
        "by the model",
        ["a <u>note"],
    )
    return replace(whole, **changes)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with launch() as found:
        yield found


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("whole") / "page.html"
    path.write_text(inspection.render(make_inspection()), encoding="utf-8")
    return path


def test_text_is_exact_and_harmless(browser: Browser, whole: Path) -> None:
    page = browser.open(whole)
    assert page.complaints == []
    assert page.evaluate("typeof window.stolen") == "undefined"
    assert page.evaluate("document.querySelectorAll('img').length") == 0
    tokens = page.evaluate("[...document.querySelectorAll('.tokens')].map(line => line.textContent)")
    assert tokens == ["".join(HOSTILE), "no."]
    each = page.evaluate("[...document.querySelector('.tokens').children].map(token => token.textContent)")
    assert each == HOSTILE
    assert (
        page.evaluate("document.querySelector('.prompt').textContent") == "</script><img src=http://example.com/p.png>"
    )
    assert page.evaluate("document.querySelector('h3').textContent") == "Problem p1: the answer is <b>42</b>"
    assert page.evaluate("document.querySelector('.note').textContent") == "a <u>note"
    first, *_, last = page.evaluate("[...document.querySelector('.tokens').children].map(token => token.title)")
    assert first.splitlines()[0] == f"token 1, id 10: {HOSTILE[0]!r}"
    assert first.splitlines()[1:3] == ["gate 0.0833", "reward -3.5000"]
    assert first.splitlines()[-1] == "score so far -3.5000"
    assert "not scored" in last
    marks = "[...document.querySelectorAll('.m')].map(mark => getComputedStyle(mark, '::before').content)"
    assert page.evaluate(marks) == ['"↵"', '"␣␣"', '"·"', '"⇥"', '"↵"', '"U+200B"']


def test_colours_follow_the_view_and_the_text_on_them_is_readable(browser: Browser, whole: Path) -> None:
    page = browser.open(whole)
    look = """[...document.querySelectorAll('.t')].map(token => {
        const style = getComputedStyle(token);
        return [style.color, style.backgroundColor];
    })"""
    seen = set()
    for view in ("gate", "pull", "reward"):
        page.evaluate(f"document.querySelector('button[data-view={view}]').click()")
        styles = page.evaluate(look)
        seen.add(tuple(background for _, background in styles))
        assert min(colours.contrast(_hex(text), _hex(background)) for text, background in styles) > 4.5
        pressed = page.evaluate("document.querySelector('button[aria-pressed=true]').dataset.view")
        shown = page.evaluate(
            "[...document.querySelectorAll('.legend')].filter(own => own.offsetHeight).map(own => own.dataset.for)"
        )
        assert (pressed, shown) == (view, [view])
    assert len(seen) == 3
    assert page.complaints == []


def _hex(colour: str) -> str:
    numbers = colour.removeprefix("rgb(").removesuffix(")").split(", ")
    return "#" + "".join(f"{int(number):02x}" for number in numbers)


@pytest.mark.parametrize("stops", [colours.DIVERGING, colours.SEQUENTIAL], ids=["diverging", "sequential"])
def test_text_is_readable_on_every_colour(stops: tuple[str, ...]) -> None:
    scale = [colours.mix(stops, share / 200) for share in range(-20, 221)]
    assert min(colours.contrast(colours.INK, colour) for colour in scale) > 4.5
    assert (scale[0], scale[-1]) == (stops[0], stops[-1])
    assert tuple(colours.mix(stops, place / (len(stops) - 1)) for place in range(len(stops))) == stops


def test_contrast_is_that_of_wcag() -> None:
    assert colours.contrast("#000000", "#ffffff") == pytest.approx(21)
    assert colours.contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.005)


PAGES: dict[str, dict[str, Any]] = {
    "weights alone": {"probe": None, "head_auc": None, "shown": [], "scaled": False},
    "no gate, no problem with both kinds": {
        "gate": False,
        "weights": [EntryWeight("logits", None, 1.0)],
        "head_auc": Estimate(math.nan, math.nan, math.nan),
    },
    "nothing scored": {"shown": [Shown(make_shown(["x"]).rollout, make_shown(["x"]).answers[2:])]},
    "sixty layers": {"weights": [EntryWeight(layer, 0.01, 0.01) for layer in range(60)]},
}


@pytest.mark.parametrize("changes", PAGES.values(), ids=PAGES)
def test_pages_of_less_are_whole(browser: Browser, tmp_path: Path, changes: dict[str, Any]) -> None:
    made = make_inspection(**changes)
    path = tmp_path / "page.html"
    path.write_text(inspection.render(made), encoding="utf-8")
    page = browser.open(path)
    assert page.complaints == []
    headings = page.evaluate("[...document.querySelectorAll('h2')].map(heading => heading.textContent)")
    expected = ["Where its weight lies", *(["What each layer knows"] if made.probe else [])]
    assert headings == expected + (["Token by token"] if made.shown else [])
    assert page.evaluate("document.querySelectorAll('button[data-view=gate]').length") == (
        made.gate and bool(made.shown)
    )
    json.dumps(made.to_dict(), allow_nan=False)


def test_the_same_inspection_gives_the_same_page(whole: Path) -> None:
    assert inspection.render(make_inspection()) == whole.read_text(encoding="utf-8")


SEGMENTS = {
    "text": (" word", [("text", " word", "")]),
    "part of a character": ("", [("part", "", "·")]),
    "spaces": ("   ", [("space", "   ", "␣␣␣")]),
    "line": (".\n\n", [("text", ".", ""), ("newline", "\n", "↵"), ("newline", "\n", "↵")]),
    "return": ("\r\n", [("return", "", "␍"), ("newline", "\n", "↵")]),
    "control": (
        "a\x00\x1bb",
        [("text", "a", ""), ("hidden", "", "U+0000"), ("hidden", "", "U+001B"), ("text", "b", "")],
    ),
    "joined emoji": ("👩‍👧", [("text", "👩‍👧", "")]),
}


@pytest.mark.parametrize(("text", "expected"), SEGMENTS.values(), ids=SEGMENTS)
def test_what_is_not_seen_gets_a_mark(text: str, expected: list[tuple[str, str, str]]) -> None:
    assert segments(text) == expected


def test_the_best_and_the_worst_of_each_kind_are_chosen() -> None:
    def answer(token: int, correct: bool) -> Response:
        return Response([token], "", True, correct, None)

    # The worst right answer is the best one's text again, so the one before it is shown.
    responses = [
        answer(1, True),
        answer(2, False),
        answer(3, True),
        answer(1, True),
        answer(4, False),
        answer(5, False),
    ]
    scores = [3.0, 2.5, 2.0, 3.0, 1.0, math.nan]
    rollout = Rollout("p", "p", "?", "1", [1], responses)
    traces = [Trace(score, torch.ones(1, 2)) for score in scores]
    answers = make_answers(rollout, traces, [[0]] * 6, [["x"]] * 6, set())
    assert [own.rank for own in answers] == [1, 3, 4, 2, 5, 6]
    assert [own.response.token_ids for own in choose_answers(answers)] == [[1], [2], [3], [4]]


def test_problems_with_both_kinds_come_first() -> None:
    def rollout(identity: str, grades: list[bool]) -> Rollout:
        return Rollout(identity, identity, "?", "1", [1], [Response([5], "", True, grade, None) for grade in grades])

    rollouts = [
        rollout("a", [True] * 2),
        rollout("b", [True, False]),
        rollout("c", [False] * 2),
        rollout("d", [False, True]),
    ]
    assert [own.id for own in choose_problems(rollouts, 3)] == ["b", "d", "a"]
