from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("math_verify")

from swift_kernels.evaluation.tasks import Task, TaskError, get_task
from tests.evaluation.task_data import FIXTURES, write_lines
from tests.shared_data import shared_data


def test_reads_problem_or_question(tmp_path: Path) -> None:
    rows = [
        {"problem": "2+2?", "answer": "4", "unique_id": "first"},
        {"question": "3+3?", "answer": "add them\n#### 6"},
        {"question": "4+4?", "answer": 8},
        {"question": " 2+2? ", "answer": "4"},
        {"question": "4+5?", "answer": "It is \\boxed{9}, of course."},
    ]
    task = get_task(f"jsonl:{write_lines(tmp_path / 'p.jsonl', rows)}")
    problems = sorted(task.problems("all", None), key=lambda problem: problem.question.strip())
    assert [problem.answer for problem in problems] == ["4", "6", "8", "9"]
    assert task.grade("it is \\boxed{6}", problems[1])
    assert task.extract("it is \\boxed{6}") == "6"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"p\.jsonl:2: not JSON"),
        ("[1]", r"p\.jsonl:2: a list: expected an object"),
        ('{"answer": "4"}', r"p\.jsonl:2: no 'problem' or 'question' that is text"),
        ('{"problem": "2+2?"}', r"p\.jsonl:2: no 'answer'"),
        ('{"problem": "2+2?", "answer": ["4"]}', r"p\.jsonl:2: no 'answer'"),
        ('{"problem": "", "answer": "4"}', r"p\.jsonl:2: no 'problem'"),
        ('{"problem": "2+2?", "answer": "so it is #### "}', r"p\.jsonl:2: nothing after '####'"),
        ('{"problem": "2+2?", "answer": NaN}', r"p\.jsonl:2: 'answer' is nan"),
        ('{"problem": "2+2?", "answer": -Infinity}', r"p\.jsonl:2: 'answer' is -inf"),
        ('{"problem": 1e999, "answer": "4"}', r"p\.jsonl:2: 'problem' is inf: expected a number or text"),
        ('{"problem": "2+\\ud800?", "answer": "4"}', r"p\.jsonl:2: it holds \\ud800, half a character"),
        ('{"problem": "2+2?", "answer": "4", "more": [{"\\udfff": 1}]}', r"p\.jsonl:2: it holds \\udfff, half"),
        ('{"problem": "2+2?", "answer": ' + "4" * 5000 + "}", r"p\.jsonl:2: not JSON \(Exceeds the limit"),
        ('{"problem": ' + "[" * 100_000, r"p\.jsonl:2: not JSON"),
        ('{"problem": "2+2\\u0000?", "answer": "4"}', r"p\.jsonl:2: 'problem' holds a NUL character"),
        ('{"problem": "2+2?", "answer": "\\u00004"}', r"p\.jsonl:2: 'answer' holds a NUL character"),
    ],
    ids=[
        "json", "list", "no-problem", "no-answer", "odd-answer", "empty-problem", "no-mark", "nan", "infinity",
        "overflow", "half", "half-of-a-key", "digits", "deep", "nul", "nul-in-answer",
    ],
)  # fmt: skip
def test_bad_lines_are_named(tmp_path: Path, line: str, message: str) -> None:
    path = write_lines(tmp_path / "p.jsonl", [{"problem": "1+1?", "answer": "2"}, line])
    with pytest.raises(ValueError, match=message):
        get_task(f"jsonl:{path}").problems("all", None)


def test_other_encodings_are_named(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_bytes(b'{"problem": "1+1?", "answer": "2"}\n{"problem": "\xff"}\n' + b"{}\n" * 9000)
    with pytest.raises(ValueError, match=r"p\.jsonl:2: not UTF-8"):
        get_task(f"jsonl:{path}").problems("all", None)


def test_a_problem_knows_its_place(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "p.jsonl", [{"problem": f"{number}+1?", "answer": "2"} for number in range(3)])
    problems = get_task(f"jsonl:{path}").problems("all", None)
    assert {problem.place: problem.id for problem in problems} == {f"{path}:{line}": str(line) for line in (1, 2, 3)}


def test_missing_file() -> None:
    with pytest.raises(TaskError, match="does not exist"):
        get_task("jsonl:/nowhere/problems.jsonl")


@pytest.mark.parametrize(("name", "count"), [("gsm8k_test.jsonl", 1319), ("math500.jsonl", 500)])
def test_known_benchmarks(name: str, count: int) -> None:
    task = get_task(f"jsonl:{shared_data() / name}")
    problems = task.problems("all", None)
    assert len(problems) == count
    for problem in problems[:25]:
        assert task.grade(f"Therefore the answer is $\\boxed{{{problem.answer}}}$.", problem), problem.answer


@pytest.fixture(scope="module")
def gsm8k() -> Task:
    return get_task(f"gsm8k:{FIXTURES / 'gsm8k.jsonl'}")


def test_the_answer_of_math_is_in_its_field_or_the_last_box_of_its_solution() -> None:
    train = get_task(f"math:{FIXTURES / 'math_train.jsonl'}").problems("all", None)
    assert sorted(problem.answer for problem in train) == ["14", "8", "\\frac{3}{4}"]
    test = get_task(f"math:{FIXTURES / 'math_test.jsonl'}").problems("all", None)
    assert sorted(problem.answer for problem in test) == ["14", "3", "\\frac{1}{5}"]


@pytest.mark.parametrize(
    ("response", "right"),
    [
        ("She makes $1,250, so \\boxed{1,250}.", True),
        ("\\boxed{1250}", True),
        ("\\boxed{1250.00}", True),
        ("\\boxed{250}", False),
        ("I do not know.", False),
    ],
    ids=["commas", "plain", "decimals", "wrong", "none"],
)
def test_thousands_of_gsm8k(gsm8k: Task, response: str, right: bool) -> None:
    problem = next(problem for problem in gsm8k.problems("all", None) if "town" in problem.question)
    assert problem.answer == "1250"
    assert gsm8k.grade(response, problem) is right


def test_a_solution_with_several_boxes_is_right_for_itself(tmp_path: Path) -> None:
    solution = "So $x=\\boxed{1}$ or $\\boxed{2}$."
    task = get_task(f"math:{write_lines(tmp_path / 'p.jsonl', [{'problem': 'x?', 'solution': solution}])}")
    (problem,) = task.problems("all", None)
    assert problem.answer == "1, 2"
    assert task.grade(solution, problem)
