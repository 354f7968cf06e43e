"""What a model wrote as mathematics is data: no way of writing it reaches Python's evaluator."""

from __future__ import annotations

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
import sys
from swift_kernels.evaluation import math_worker
from sympy.parsing import sympy_parser

# Without the sandbox, and without a guard where `guarded` is not given: what reaches the evaluator is printed.
answers, guarded = sys.argv[2:], sys.argv[1] == "guarded"
evaluate = sympy_parser.eval_expr

def show(code, *scopes):
    if isinstance(code, str) and ("open" in code or "import" in code or "class" in code):
        print("evaluated", code)
    return evaluate(code, *scopes)

sympy_parser.eval_expr = show
if guarded:
    math_worker._prepare()
for text in answers:
    for question in ({"text": text}, {"text": text, "reference": "5"}, {"text": "\\\\boxed{5}", "reference": text}):
        try:
            math_worker.answer(question)
        except Exception as error:
            pass
print("graded", len(answers))
"""


@pytest.mark.parametrize("way", PATHS.values(), ids=PATHS.keys())
def test_no_way_of_writing_an_answer_reaches_the_evaluator(way: str, grader: MathGrader, tmp_path: Path) -> None:
    texts = [way.format(call.format(path=tmp_path / "written")) for call in CALLS]
    for text in texts:
        assert not grader.equal(text, "5")
        grader.extract(text)
        assert not grader.equal("\\boxed{5}", text)
    for mode in ("guarded", "alone"):
        made = subprocess.run(
            [sys.executable, "-c", _UNSANDBOXED, mode, *texts], stdout=subprocess.PIPE, text=True, check=True
        )
        assert made.stdout == f"graded {len(texts)}\n", mode
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
