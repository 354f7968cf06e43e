from __future__ import annotations

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


def test_an_answer_that_hangs_is_wrong_and_the_next_one_is_graded() -> None:
    grader = MathGrader(time_limit=0.5)
    try:
        assert grader.equal("\\boxed{100000000!}", "5") is False
        assert grader.timeouts == 1
        grader.time_limit = 10.0
        assert grader.equal("\\boxed{4}", "4") is True
    finally:
        grader.close()


def test_a_worker_that_died_is_replaced(grader: MathGrader) -> None:
    assert grader.equal("\\boxed{4}", "4")
    assert grader._worker is not None
    grader._worker.kill()
    grader._worker.wait()
    assert grader.equal("\\boxed{5}", "5")
