from __future__ import annotations

import json
from pathlib import Path

import pytest

from swift_kernels.evaluation.tasks import Problem, Sums, TaskError, get_task, split_of
from tests.shared_data import shared_data


def write_lines(path: Path, rows: list[object]) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


class TestSums:
    def test_no_pair_crosses_the_split_in_either_order(self) -> None:
        train = {frozenset(map(int, p.id.split("+"))) for p in Sums().problems("train", None, seed=0)}
        test = {frozenset(map(int, p.id.split("+"))) for p in Sums().problems("test", None, seed=1)}
        assert not train & test
        # All pairs of 1..50 but the two of the prompt.
        assert len(train) + len(test) == 50 * 51 // 2 - 2
        assert 0.2 < len(test) / (len(train) + len(test)) < 0.3

    def test_problems_do_not_depend_on_how_many_are_asked_for(self) -> None:
        assert Sums().problems("test", 20, seed=3) == Sums().problems("test", 50, seed=3)[:20]
        assert Sums().problems("test", 20, seed=3) != Sums().problems("test", 20, seed=4)

    def test_prompt_ends_where_the_answer_begins(self) -> None:
        prompt = Sums().prompt("What is 3 + 4?")
        assert prompt.startswith("Question: What is 12 + 5?\nAnswer: 12 + 5 = 17\n")
        assert prompt.endswith("Question: What is 3 + 4?\nAnswer:")

    @pytest.mark.parametrize(
        ("text", "answer"),
        [(" 36 + 7 = 43", "43"), (" 43", "43"), (" 36 + 7 = 043 apples", "43"), (" no idea", None), ("", None)],
        ids=["worked", "bare", "zeros-and-words", "words", "empty"],
    )
    def test_extract(self, text: str, answer: str | None) -> None:
        problem = Problem("36+7", "7+36", "What is 36 + 7?", "43")
        assert Sums().extract(text) == answer
        assert Sums().grade(text, problem) is (answer == "43")

    @pytest.mark.parametrize(
        ("split", "count", "message"),
        [
            ("heldout", 3, "expected one of train, test, all"),
            ("test", 0, "expected at least 1"),
            ("test", 5000, r"sums has \d+ distinct problems in split 'test', 5000 are asked for"),
        ],
    )
    def test_impossible_requests(self, split: str, count: int, message: str) -> None:
        with pytest.raises(TaskError, match=message):
            Sums().problems(split, count)


@pytest.mark.parametrize("name", ["", "sum", "sums:", "reasoning-gym", "jsonl:", "gsm8k"])
def test_unknown_task_lists_the_known(name: str) -> None:
    with pytest.raises(TaskError, match="expected sums, reasoning-gym:<dataset> or jsonl:<path>"):
        get_task(name)


class TestReasoningGym:
    @pytest.fixture(autouse=True)
    def _installed(self) -> None:
        pytest.importorskip("reasoning_gym")

    def test_problems_are_graded_by_their_dataset(self) -> None:
        task = get_task("reasoning-gym:chain_sum")
        problems = task.problems("test", 5, seed=0)
        assert len({problem.key for problem in problems}) == 5
        assert all(split_of(problem.key) == "test" for problem in problems)
        for problem in problems:
            assert problem.question in task.prompt(problem.question)
            assert task.grade(f"I think\n<answer> {problem.answer} </answer>", problem)
            assert task.grade(f"so the result is\n{problem.answer}", problem)
            assert not task.grade(f"<answer>{int(problem.answer) + 1}</answer>", problem)
            assert not task.grade("", problem)

    def test_solved_problems_stand_before_the_question(self) -> None:
        task = get_task("reasoning-gym:gcd,shots=3,max_numbers=2,min_value=2,max_value=9")
        problems = task.problems("all", 20)
        assert all(int(problem.answer) < 10 for problem in problems)
        prompt = task.prompt(problems[0].question)
        assert prompt.count("Question: ") == prompt.count("Answer:") == 4
        assert prompt.endswith(f"\n\nQuestion: {problems[0].question}\nAnswer:")
        assert not any(problem.question in prompt for problem in problems[1:])
        assert task.prompt("?") == get_task(task.name).prompt("?")
        assert task.grade(f" {problems[0].answer}", problems[0])
        assert not task.grade(f" {problems[0].answer}0", problems[0])
        assert (task.chat, task.stop) == (False, ("\n\n",))

    def test_numbers_in_another_order_make_no_other_problem(self) -> None:
        problems = get_task("reasoning-gym:chain_sum,min_terms=2,max_terms=2,max_digits=1").problems("all", 40)
        pairs = [sorted(int(word) for word in problem.key.split() if word.isdecimal()) for problem in problems]
        assert len({tuple(pair) for pair in pairs}) == len(pairs) == 40

    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("chain_sum,shots=-1", "shots is -1"),
            ("chain_sum,shots=many", "shots is 'many'"),
            ("chain_sum,terms=2", r"option 'terms' is unknown: expected shots, min_terms, .*max_digits"),
            ("chain_sum,shots", "'shots' is no option: expected name=value"),
            ("chain_sum,min_terms=5,max_terms=2", "the dataset refuses its options"),
            ("chain_sum,min_terms=two", "the dataset refuses its options"),
        ],
        ids=["negative shots", "shots in words", "unknown option", "no value", "impossible", "wrong type"],
    )
    def test_options_that_cannot_be(self, name: str, message: str) -> None:
        with pytest.raises(TaskError, match=message):
            get_task(f"reasoning-gym:{name}")

    def test_unknown_dataset(self) -> None:
        with pytest.raises(TaskError, match=r"no dataset 'nope': expected one of .*chain_sum"):
            get_task("reasoning-gym:nope")


class TestJsonl:
    @pytest.fixture(autouse=True)
    def _installed(self) -> None:
        pytest.importorskip("math_verify")

    def test_reads_problem_or_question(self, tmp_path: Path) -> None:
        rows = [
            {"problem": "2+2?", "answer": "4", "unique_id": "first"},
            {"question": "3+3?", "answer": "add them\n#### 6"},
            {"question": "4+4?", "answer": 8},
            {"question": " 2+2? ", "answer": "4"},
        ]
        task = get_task(f"jsonl:{write_lines(tmp_path / 'p.jsonl', rows)}")
        problems = sorted(task.problems("all", None), key=lambda problem: problem.question.strip())
        assert [problem.answer for problem in problems] == ["4", "6", "8"]
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
        ],
        ids=["json", "list", "no-problem", "no-answer", "odd-answer", "empty-problem"],
    )
    def test_bad_lines_are_named(self, tmp_path: Path, line: str, message: str) -> None:
        path = write_lines(tmp_path / "p.jsonl", [{"problem": "1+1?", "answer": "2"}, line])
        with pytest.raises(ValueError, match=message):
            get_task(f"jsonl:{path}").problems("all", None)

    def test_other_encodings_are_named(self, tmp_path: Path) -> None:
        path = tmp_path / "p.jsonl"
        path.write_bytes(b'{"problem": "1+1?", "answer": "2"}\n{"problem": "\xff"}\n')
        with pytest.raises(ValueError, match=r"p\.jsonl:\d: not UTF-8"):
            get_task(f"jsonl:{path}").problems("all", None)

    def test_missing_file(self) -> None:
        with pytest.raises(TaskError, match="does not exist"):
            get_task("jsonl:/nowhere/problems.jsonl")

    @pytest.mark.parametrize(("name", "count"), [("gsm8k_test.jsonl", 1319), ("math500.jsonl", 500)])
    def test_known_benchmarks(self, name: str, count: int) -> None:
        task = get_task(f"jsonl:{shared_data() / name}")
        problems = task.problems("all", None)
        assert len(problems) == count
        for problem in problems[:25]:
            assert task.grade(f"Therefore the answer is $\\boxed{{{problem.answer}}}$.", problem), problem.answer
