"""What a model wrote as mathematics is data: no way of writing it reaches Python's evaluator."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("math_verify")

from swift_kernels.evaluation.graders import MathGrader

CALLS = [
    "__import__('pathlib').Path('{path}').touch()",
    "[__import__('pathlib').Path('{path}').touch()]",
    "open('{path}','w')",
    "open(chr(47)+'{path}','w')",
    "().__class__.__base__.__subclasses__()",
    'S(\'open("{path}","w")\')',
    "sympify(\"open('{path}','w')\")",
    "1+open('{path}','w')",
    "(1 #\r+open('{path}','w'))",
]

PATHS = {
    "boxed": "\\boxed{{{}}}",
    "a text in a box": "\\boxed{{\\text{{{}}}}}",
    "an equation in a box": "\\boxed{{x = {}}}",
    "a set in a box": "\\boxed{{\\{{1, {}\\}}}}",
    "a tuple in a box": "\\boxed{{(1, {})}}",
    "a matrix in a box": "\\boxed{{\\begin{{pmatrix}} {} & 1 \\\\ 1 & 2 \\end{{pmatrix}}}}",
    "a fraction in a box": "\\boxed{{\\frac{{{}}}{{2}}}}",
    "an operator's name in a box": "\\boxed{{\\operatorname{{{}}}(x)}}",
    "an operator's argument in a box": "\\boxed{{\\operatorname{{eval}}({})}}",
    "a function's argument in a box": "\\boxed{{f({})}}",
    "an upright name in a box": "\\boxed{{\\mathrm{{{}}}}}",
    "a subscript in a box": "\\boxed{{x_{{{}}}}}",
    "an exponent in a box": "\\boxed{{2^{{{}}}}}",
    "a bound in a box": "\\boxed{{3 < x < {}}}",
    "a number of a base in a box": "\\boxed{{12_{{{}}}}}",
    "a unit in a box": "\\boxed{{5 \\text{{ {}}}}}",
    "a percentage in a box": "\\boxed{{{}\\%}}",
    "a union in a box": "\\boxed{{(1, 2) \\cup {}}}",
    "an integral in a box": "\\boxed{{\\int_0^1 {} dx}}",
    "a sum in a box": "\\boxed{{\\sum_{{i={}}}^5 i}}",
    "dollars": "it is ${}$.",
    "double dollars": "it is $${}$$.",
    "brackets": "it is \\[{}\\].",
    "an announced answer": "The answer is {}",
    "an announced final answer": "The final answer is ${}$. I hope it is correct.",
    "a plain sum": "The answer is 3 + 4*({})",
    "plain text": "{}",
}


@pytest.fixture(scope="module")
def grader() -> Iterator[MathGrader]:
    made = MathGrader(time_limit=60.0)
    yield made
    made.close()


_UNSANDBOXED = """
import json, sys
from swift_kernels.evaluation import math_worker
from sympy.parsing import sympy_parser

evaluate, seen = sympy_parser.eval_expr, []

def note(code, *scopes):
    seen.append(str(code))
    return evaluate(code, *scopes)

sympy_parser.eval_expr = note
if sys.argv[1] == "guarded":
    math_worker._prepare()
evaluated = []
for text in [*json.load(sys.stdin), "control"]:
    seen.clear()
    if text == "control" and sys.argv[1] == "alone":
        sympy_parser.parse_expr("len(open.__doc__)")
    for question in ({"text": text}, {"text": text, "reference": "5"}, {"text": "\\boxed{5}", "reference": text}):
        try:
            math_worker.answer(question)
        except Exception:
            pass
    evaluated.append([code for code in seen if "open" in code or "import" in code or "class" in code])
print(json.dumps(evaluated))
"""


def written(way: str, path: Path) -> list[str]:
    return [way.format(call.format(path=path)) for call in CALLS]


@pytest.mark.parametrize("mode", ["guarded", "alone"])
def test_no_way_of_writing_an_answer_reaches_the_evaluator(mode: str, tmp_path: Path) -> None:
    """Without the sandbox; "alone" is without the guard too, so that it is seen what the libraries pass on."""
    texts = [text for way in PATHS.values() for text in written(way, tmp_path / "written")]
    made = subprocess.run(
        [sys.executable, "-c", _UNSANDBOXED, mode],
        input=json.dumps(texts),
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    *evaluated, control = json.loads(made.stdout)
    assert [(text, codes) for text, codes in zip(texts, evaluated, strict=True) if codes] == []
    assert bool(control) is (mode == "alone")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("way", PATHS.values(), ids=PATHS.keys())
def test_grading_goes_on_after_attacks(way: str, grader: MathGrader, tmp_path: Path) -> None:
    for text in written(way, tmp_path / "written"):
        assert isinstance(grader.equal(text, "5"), bool)
        assert isinstance(grader.extract(text), str | None)
        assert isinstance(grader.equal("\\boxed{5}", text), bool)
    assert list(tmp_path.iterdir()) == []
    assert grader.equal("\\boxed{5}", "5")
    assert not grader.equal("\\boxed{6}", "5")


def test_sympy_parses_only_arithmetic_as_python(tmp_path: Path) -> None:
    code = f"""
from swift_kernels.evaluation import math_worker
math_worker.guard_evaluators()
math_worker.guard_evaluators()
import sympy, math_verify.parser
assert sympy.sympify("1 + 2*3") == 7
for parse in (sympy.sympify, sympy.S, sympy.parse_expr, math_verify.parser.parse_expr, sympy.simplify, sympy.Number):
    for text in ("open({str(tmp_path / "written")!r}, 'w')", "x", "'1'", "[1]", "1 if 1 else 2", "1_0"):
        try:
            parse(text)
        except Exception:
            continue
        raise SystemExit(f"{{parse}} parses {{text}}")
"""
    subprocess.run([sys.executable, "-c", code], check=True)
    assert list(tmp_path.iterdir()) == []
