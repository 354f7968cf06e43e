from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

pytest.importorskip("math_verify")

from swift_kernels.evaluation.graders import MathGrader


@pytest.fixture(scope="module")
def grader() -> Iterator[MathGrader]:
    made = MathGrader(time_limit=10.0)
    yield made
    made.close()


@pytest.mark.parametrize(
    ("text", "reference", "equal"),
    [
        ("so it is $\\boxed{\\frac{1}{2}}$.", "0.5", True),
        ("The answer is \\boxed{0.5}", "\\frac{1}{2}", True),
        ("She makes $1,234 a day.\nA: 1234", "1,234", True),
        ("\\boxed{\\left( 3, \\frac{\\pi}{2} \\right)}", "\\left( 3, \\frac{\\pi}{2} \\right)", True),
        ("\\boxed{\\left( \\frac{\\pi}{2}, 3 \\right)}", "\\left( 3, \\frac{\\pi}{2} \\right)", False),
        ("\\boxed{-7}", "7", False),
        ("\\boxed{17}", "18", False),
        ("I do not know", "18", False),
        ("", "18", False),
        ("\\boxed{\\frac{1}{", "18", False),
    ],
    ids=["fraction", "decimal", "separator", "tuple", "permuted", "sign", "off-by-one", "none", "empty", "broken"],
)
def test_equal(grader: MathGrader, text: str, reference: str, equal: bool) -> None:
    assert grader.equal(text, reference) is equal


def test_extract_gives_equal_answers_one_form(grader: MathGrader) -> None:
    assert grader.extract("thus \\boxed{\\frac{2}{4}}") == grader.extract("$\\boxed{\\frac12}$")
    assert grader.extract("no answer here") is None


@pytest.mark.parametrize(
    "answer",
    ["9^{9^{9^{9}}}", "10^{10^{10}} + \\frac{1}{3}", "\\binom{10^9}{5 \\cdot 10^8}"],
    ids=["tower", "power", "binomial"],
)
def test_an_answer_that_hangs_is_wrong(grader: MathGrader, monkeypatch: pytest.MonkeyPatch, answer: str) -> None:
    assert grader.equal("\\boxed{2}", "2")
    monkeypatch.setattr(grader, "time_limit", 0.3)
    begin = time.monotonic()
    assert grader.equal(f"\\boxed{{{answer}}}", "5") is False
    assert time.monotonic() - begin < 5


MEGABYTE = 2**20


@pytest.mark.parametrize(
    "text",
    [
        "",
        "\\boxed{}",
        "\\boxed{\\frac{18}{0}}",
        "\\boxed{\\sqrt}",
        "\\boxed{\ud80018}",
        "\\boxed{\x0018\x00}",
        "\\boxed{" + "(" * 500 + "17" + ")" * 500 + "}",
        "\\boxed{" + "{" * 500 + "17" + "}" * 500 + "}",
        "\\boxed{" + "9" * 1900 + "}",
        "\\boxed{" + "a" * 1900 + "1=18}",
        "\\boxed{" + "1," * 900 + "18}",
        "\\boxed{" + "18 " * (MEGABYTE // 3) + "}",
        "\\boxed{18" * (MEGABYTE // 9),
        "{" * MEGABYTE,
        "$" * MEGABYTE,
        "word " * (MEGABYTE // 5),
        "18" * (MEGABYTE // 2),
    ],
    ids=[
        *("empty", "empty-box", "zero-division", "no-root", "surrogate", "null", "parentheses", "braces"),
        *("digits", "letters", "list", "long-box", "unclosed-boxes", "long-braces", "long-dollars", "long-prose"),
        "long-number",
    ],
)
def test_what_cannot_be_parsed_is_wrong(grader: MathGrader, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setattr(grader, "time_limit", 1.0)
    assert grader.equal(text, "18") is False
    assert isinstance(grader.extract(text), str | None)


@pytest.mark.parametrize(
    "around",
    ["\ud800 {}", "\x00{}\x00", "word " * (MEGABYTE // 5) + "{}", "{}" + " and so on" * (MEGABYTE // 10)],
    ids=["surrogate", "null", "long-before", "long-after"],
)
def test_an_answer_is_found_among_anything(grader: MathGrader, around: str) -> None:
    assert grader.equal(around.replace("{}", "\\boxed{18}"), "18") is True
    assert grader.extract(around.replace("{}", "\\boxed{18}")) == "18"


@pytest.mark.parametrize("reference", ["", "\ud800", "\x00", "\\frac{1}{0}", "}{"])
def test_no_reference_is_too_odd(grader: MathGrader, reference: str) -> None:
    assert grader.equal("\\boxed{18}", reference) is False
