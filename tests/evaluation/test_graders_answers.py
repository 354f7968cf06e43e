from __future__ import annotations

import re
from collections.abc import Iterator

import pytest

pytest.importorskip("math_verify")

from swift_kernels.evaluation import math_worker
from swift_kernels.evaluation.graders import MathGrader
from swift_kernels.evaluation.math_answers import marked_answer, parse_answer
from swift_kernels.evaluation.math_units import canonical_unit
from tests.evaluation import rewrites
from tests.shared_data import shared_rows


@pytest.fixture(scope="module")
def grader() -> Iterator[MathGrader]:
    made = MathGrader(time_limit=20.0)
    yield made
    made.close()


class TestTables:
    def test_hold_enough(self) -> None:
        assert len(set(rewrites.pairs(rewrites.EQUIVALENT))) >= 200
        assert len(set(rewrites.pairs(rewrites.NEAR_MISSES))) >= 200

    def test_equivalent_answers_are_right(self, grader: MathGrader) -> None:
        assert rewrites.report(grader, "rewrites", rewrites.pairs(rewrites.EQUIVALENT), True) == []

    def test_near_misses_are_wrong(self, grader: MathGrader) -> None:
        assert rewrites.report(grader, "near misses", rewrites.pairs(rewrites.NEAR_MISSES), False) == []

    def test_every_reference_is_right_for_itself(self, grader: MathGrader) -> None:
        lines = (rewrites.EQUIVALENT + rewrites.NEAR_MISSES).strip().splitlines()
        references = {line.split(" | ")[0] for line in lines if line}
        assert rewrites.misgraded(grader, [(reference, reference) for reference in references], True) == []


class TestBenchmarks:
    @pytest.mark.parametrize(("name", "count"), [("gsm8k_test.jsonl", 1319), ("math500.jsonl", 500)])
    def test_references_and_their_solutions_are_right(self, grader: MathGrader, name: str, count: int) -> None:
        rows = shared_rows(name)
        assert len(rows) == count
        wrong = []
        for row in rows:
            reference = row["answer"].rpartition("####")[2].strip()
            solution = row.get("solution", row["answer"])
            for text in (f"So we are done. The answer is \\boxed{{{reference}}}.", solution):
                if not grader.equal(text, reference):
                    wrong.append((reference, text[-80:]))
        assert wrong == []

    def test_verdicts_are_those_of_the_human_labels(self, grader: MathGrader) -> None:
        graded = list(rewrites.graded_solutions(grader, shared_rows("gsm8k_model_solutions.jsonl")))
        assert len(graded) == 5276
        assert [one for one in graded if one.label is not one.verdict] == []
        assert grader.timeouts == 0

    @pytest.mark.slow
    @pytest.mark.parametrize("name", ["gsm8k_test.jsonl", "math500.jsonl"])
    def test_rewrites_by_rule(self, grader: MathGrader, name: str) -> None:
        references = sorted(set(rewrites.references(name)))
        # Of the integers a few do: the rules make the same of each.
        integers = [reference for reference in references if re.fullmatch(r"-?\d+", reference)]
        others = [reference for reference in references if reference not in integers]
        same, other = rewrites.from_references(integers[::15] + others)
        assert min(len(same), len(other)) >= 200
        assert rewrites.report(grader, f"{name}, rewrites", same, True) == []
        assert rewrites.report(grader, f"{name}, near misses", other, False) == []

    def test_the_last_number_is_what_a_search_finds(self, monkeypatch: pytest.MonkeyPatch) -> None:
        rows = shared_rows("gsm8k_model_solutions.jsonl")[::25]
        texts = [made["solution"] for row in rows for made in row.values() if isinstance(made, dict)]
        short = [text for text in texts if math_worker._LAST_NUMBER.search(text) and "answer" not in text.lower()]
        assert len(short) > 150
        quick = [parse_answer(math_worker.final_answer(text)).value for text in short]
        monkeypatch.setattr(math_worker, "_LAST_NUMBER", re.compile(r"(?!)"))
        searched = [parse_answer(math_worker.final_answer(text)) for text in short]
        assert quick == [answer.value for answer in searched]


@pytest.mark.parametrize(
    ("text", "marked"),
    [
        ("first \\boxed{3}, no: \\boxed{4}.", "4"),
        ("\\boxed{x = \\frac{1}{2}}", "x = \\frac{1}{2}"),
        ("\\boxed{\\{1, 2\\}} as said", "\\{1, 2\\}"),
        ("\\boxed{\\boxed{7}}", "7"),
        ("$\\boxed{1}$ and $\\boxed{2}$", "1, 2"),
        ("$\\boxed{2}$, that is $\\boxed{2}$", "2"),
        ("\\fbox{8}", "8"),
        ("\\boxed 9$", "9"),
        ("\\boxed{5} and then \\boxed{6", "5"),
        ("it is 5, so \\boxed{\\frac{5}{", ""),
        ("2 + 3\n#### 5\n", "5"),
        ("2 + 3\n#### 1,234 apples\nbye", "1,234 apples"),
        ("#### 5\n#### Check\nIt is so.", "5"),
        ("2 + 3\n#### Final Answer\n5", None),
        ("#### Step 1: compute\nThe answer is 5.", None),
        ("#### 1. Compute\nThe answer is 5.", None),
        ("#### Answer: 5\n", "5"),
        ("#### **Final Answer: 5**\nbye", "5"),
        ("#### The answer is 5.", "5."),
        ("#### x = 5\nbye", "x = 5"),
        ("#### \\frac{1}{2}\nbye", "\\frac{1}{2}"),
        ("It rises there.\n#### east", "east"),
        ("####\n5", "5"),
        ("\\boxed{} is 5", None),
        ("the answer is 5", None),
        ("", None),
    ],
    ids=[
        *("last", "nested-braces", "escaped-braces", "nested-boxes", "two-boxes", "repeated", "fbox", "bare"),
        *("cut-off-later", "cut-off", "gsm8k", "gsm8k-words"),
        *("heading-after", "heading", "step", "numbered", "announced", "bold", "sentence", "equation", "latex"),
        *("word", "below", "empty-box", "prose", "empty"),
    ],
)
def test_marked_answer(text: str, marked: str | None) -> None:
    assert marked_answer(text) == marked


@pytest.mark.parametrize(
    ("text", "reference", "equal"),
    [
        ("We need 3 more.\n#### 18", "18", True),
        ("We need 3 more.\n#### 18 eggs a day", "18", True),
        ("So:\n#### Final Answer\n18", "18", True),
        ("#### Step 1: compute\n3 times 6. The answer is 18.", "18", True),
        ("The answer is 18.\n\n#### Verification\nok", "18", True),
        ("#### The answer is 18.", "18", True),
        ("The answer is $\\frac{3}{4}$.", "0.75", True),
        ("The answer is 50%", "0.5", True),
        ("The answer is **18**.", "18", True),
        ("The answer is `18`.", "18", True),
        ("The answer is *18*", "18", True),
        ("2*3*4 is it.\n**Answer: 24**", "24", True),
        ("The answer is \N{MINUS SIGN}5.", "-5", True),
        ("The answer is \N{MINUS SIGN}5.", "5", False),
        ("The answer is ½.", "0.5", True),
        ("The answer is 2½.", "5/2", True),
        ("So x is $3c$", "3", False),
        ("There are 7.\nWe find \\boxed{\\heartsuit(}", "7", False),
        ("There are 7.\nWe find \\boxed{\\frac{7}{", "7", False),
        ("That makes 40: 20 each", "20", True),
        ("\\boxed{(-\N{INFINITY},2)\N{UNION}(3,\N{INFINITY})}", "(-\\infty,2) \\cup (3,\\infty)", True),
        ("\\boxed{\N{MINUS SIGN}35/9}", "-\\frac{35}{9}", True),
        ("\\boxed{\\\\frac{1}{2}}", "\\frac12", True),
    ],
    ids=[
        *(
            "gsm8k",
            "gsm8k-words",
            "heading",
            "step",
            "verification",
            "sentence",
            "prose",
            "percent",
            *("bold", "code", "italic", "product", "minus", "sign", "half", "mixed"),
            "variable",
            "unreadable-box",
            "cut-off-box",
            "colon",
        ),
        *("unicode-union", "unicode-minus", "escaped-twice"),
    ],
)
def test_responses(grader: MathGrader, text: str, reference: str, equal: bool) -> None:
    assert grader.equal(text, reference) is equal


@pytest.mark.parametrize(
    "answers",
    [
        ("\\frac{2}{4}", "\\frac12", "0.5", "1/2"),
        ("1, -2", "\\{-2, 1\\}", "x=-2 \\text{ or } x=1"),
        ("(3, 4]", "\\left(3,4\\right]", "x \\in (3,4]"),
        ("\\text{East}", "east", "\\textbf{east}"),
        ("2\\sqrt{5}", "\\sqrt{20}"),
        ("\\begin{pmatrix}1\\\\2\\end{pmatrix}", "(1,2)"),
        ("90^\\circ", "90", "90\\text{ degrees}"),
        ("(2,3) \\cup (5,7)", "(5,7)\\cup(2,3)"),
        ("52_8", "52_{8}"),
    ],
    ids=["number", "set", "interval", "word", "root", "vector", "degrees", "union", "base"],
)
def test_equal_answers_vote_together(grader: MathGrader, answers: tuple[str, ...]) -> None:
    forms = {grader.extract(f"\\boxed{{{answer}}}") for answer in answers}
    assert len(forms) == 1
    assert None not in forms


@pytest.mark.parametrize(
    ("phrase", "power", "unit"),
    [
        ("cm", None, "centimeter"),
        ("Centimetres", None, "centimeter"),
        ("square inches", None, "inch^2"),
        ("ft", "2", "foot^2"),
        ("cu. ft.", None, "foot^3"),
        ("cm^{3}", None, "centimeter^3"),
        ("miles per hour", None, "mile/hour"),
        ("mph", None, "mile/hour"),
        ("m/s", None, "meter/second"),
        ("apples", None, None),
        ("apples per day", None, None),
        ("square units", None, None),
        ("", None, None),
    ],
)
def test_units(phrase: str, power: str | None, unit: str | None) -> None:
    assert canonical_unit(phrase, power) == unit
