from __future__ import annotations

import threading

import pytest

pytest.importorskip("reasoning_gym")

from swift_kernels.evaluation.tasks import Problem, TaskError, get_task, split_of


def test_problems_are_graded_by_their_dataset() -> None:
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


def test_solved_problems_stand_before_the_question() -> None:
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


def test_numbers_in_another_order_make_no_other_problem() -> None:
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
def test_options_that_cannot_be(name: str, message: str) -> None:
    with pytest.raises(TaskError, match=message):
        get_task(f"reasoning-gym:{name}")


def test_unknown_dataset() -> None:
    with pytest.raises(TaskError, match=r"no dataset 'nope': expected one of .*chain_sum"):
        get_task("reasoning-gym:nope")


class TestScorer:
    def test_a_scorer_that_raises_makes_the_answer_wrong(self) -> None:
        task = get_task("reasoning-gym:chain_sum")
        assert task.grade("<answer>7</answer>", Problem("0", "k", "?", "7", {"answer": "7"}))
        assert not task.grade("<answer>7</answer>", Problem("0", "k", "?", "7", {"no": "answer"}))

    def test_works_off_the_main_thread(self) -> None:
        task = get_task("reasoning-gym:chain_sum")
        problems = task.problems("all", 8)
        grades: dict[str, bool] = {}

        def grade(own: list[Problem]) -> None:
            for problem in own:
                grades[problem.id] = task.grade(f"<answer>{problem.answer}</answer>", problem)

        threads = [threading.Thread(target=grade, args=(problems[start::2],)) for start in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert grades == {problem.id: True for problem in problems}
