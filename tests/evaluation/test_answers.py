from __future__ import annotations

import time

import pytest

from swift_kernels.evaluation.math_answers import boxed
from swift_kernels.evaluation.tasks.answers import choice, yes_or_no

OPTIONS = ("a car", "21 km", "$\\frac{1}{2}$", "True", "true")


@pytest.mark.parametrize(
    ("text", "content"),
    [
        (r"so \boxed{3}", "3"),
        (r"first \boxed{3}, then \boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\fbox{ x }", "x"),
        (r"it is $\boxed 8$.", "8"),
        (r"it is \boxed 8.", "8"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{\left\{ x \right.}", r"\left\{ x \right."),
        (r"\boxed{3} and \boxed{4", "3"),
        ("no box", None),
        (r"\boxed{", None),
        (r"\boxed", None),
    ],
    ids=[
        "one",
        "last",
        "fbox",
        "no braces",
        "no braces, full stop",
        "set",
        "odd brace",
        "cut off",
        "none",
        "open",
        "empty",
    ],
)
def test_boxed(text: str, content: str | None) -> None:
    assert boxed(text) == content


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        (r"\boxed{B}", "B"),
        (r"\boxed{(B)}", "B"),
        (r"\boxed{b}", "B"),
        (r"\boxed{\text{B}}", "B"),
        (r"\boxed{\textbf{(B)}}", "B"),
        (r"\boxed{B) 21 km}", "B"),
        (r"\boxed{B. 21 km}", "B"),
        (r"\boxed{\text{Option B}}", "B"),
        (r"\boxed{21 km}", "B"),
        (r"\boxed{\frac{1}{2}}", "C"),
        (r"Not \boxed{A} but \boxed{B}.", "B"),
        (r"\boxed{B} since the answer is A.", "B"),
        ("The answer is (B)", "B"),
        ("The answer is B", "B"),
        ("the answer is b.", "B"),
        ("The correct answer is B because it is longest.", "B"),
        ("So the right option is **B**.", "B"),
        ("**Answer:** B", "B"),
        ("Answer: $B$", "B"),
        ("Final answer: option B", "B"),
        ("The answer to this question would be B) 21 km.", "B"),
        ("The best ending is (B).\nIt fits.", "B"),
        ("The answer is A at first, but then the answer is B.", "B"),
        ("The answer is A.", "A"),
        ("The answer is A, since it has wheels.", "A"),
        ("The answer is 21 km.", "B"),
        ("The answer is a car.", "A"),
        ("The answer is True.", "D"),
        ("The answer is true.", "E"),
        ("It is long.\n\n(B)", "B"),
        ("It is long.\nB)", "B"),
        ("B.", "B"),
        ("**B**", "B"),
        ("B) 21 km", "B"),
        ("Let me see.\n21 km", "B"),
    ],
)
def test_choice(text: str, letter: str) -> None:
    assert choice(text, OPTIONS) == letter


@pytest.mark.parametrize(
    "text",
    [
        "",
        "I cannot say",
        "A car would fit here.",
        "The answer is a matter of taste",
        "The answer is A car that is red",
        "The answer is either A or B",
        "The answer is B or C",
        "The answer is A, B or C",
        "The answer is not A",
        "The answer is A-level maths",
        "The answer is Because",
        "The answer is F",
        r"\boxed{F}",
        r"\boxed{42}",
        r"\boxed{TRUE}",
        r"The answer is (A). \boxed{(A) or (B)}",
        r"\boxed{A, B}",
        r"\boxed{A} or \boxed{B}",
        "A) a car\nB) 21 km",
        "A. That was easy",
        "I think that A",
    ],
)
def test_no_choice(text: str) -> None:
    assert choice(text, OPTIONS) is None


@pytest.mark.parametrize("text", ["The answer is ['b', 'a'].", "\\boxed{['b', 'a']}", "['b', 'a']"])
def test_letters_within_an_option_are_none(text: str) -> None:
    assert choice(text, ["2**2", "22", "['b', 'a']", "B"]) == "C"
    assert choice(text.replace("['b', 'a']", "2**2"), ["2**2", "22", "['b', 'a']", "B"]) == "A"
    assert choice(text.replace("['b', 'a']", "B"), ["2**2", "22", "['b', 'a']", "B"]) == "B"


def test_letters_alone_are_found_where_the_options_are_not_known() -> None:
    assert choice(r"\boxed{B}") == "B"
    assert choice("the answer is 21 km") is None


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"\boxed{Yes}", "yes"),
        (r"\boxed{\text{no}}", "no"),
        (r"\boxed{No, it is not}", "no"),
        (r"\boxed{No} although one may think the answer is yes.", "no"),
        ("The answer is **Yes**.", "yes"),
        ("Answer: no", "no"),
        ("Two flips.\nYes, the coin is still heads up.", "yes"),
        ("Two flips, therefore yes.", "yes"),
        ("One flip.\n**No**", "no"),
        ("No one flips the coin", None),
        ("There is no way to know it", None),
        (r"\boxed{heads}", None),
        ("Yes or no?\nHeads.", None),
        (r"\boxed{Yes or No}", None),
        (r"\boxed{\text{yes/no}}", None),
        ("The answer is yes or no.", None),
        ("The answer is yes. No flip undoes it.", "yes"),
        ("", None),
    ],
)
def test_yes_or_no(text: str, answer: str | None) -> None:
    assert yes_or_no(text) == answer


@pytest.mark.parametrize(
    "text",
    [
        *(one * 4000 for one in ("\\boxed{", "\\boxed ", "answer is ", "the answer is A or ", "**a ", "\\text{", "(A")),
        "\\text{" * 4000 + "}" * 4000,
        "\\boxed{" + "\\text{" * 4000 + "}" * 4001,
        "answer is: yes\n" * 4000,
    ],
    ids=[*("boxes", "bare", "statements", "letters", "bold", "fonts", "brackets"), *("nested", "in a box", "lines")],
)
def test_no_text_takes_long(text: str) -> None:
    begin = time.monotonic()
    choice(text, OPTIONS)
    yes_or_no(text)
    assert time.monotonic() - begin < 1
