from __future__ import annotations

import pytest

from swift_kernels.evaluation.tasks import Problem, Sums, TaskError, get_task


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


@pytest.mark.parametrize(
    "name", ["", "sum", "sums:", "reasoning-gym", "jsonl:", "gsm8k:", "gsm", "pku-saferlhf", "pku-saferlhf:kind"]
)
def test_unknown_task_lists_the_known(name: str) -> None:
    known = (
        "expected sums, reasoning-gym:<dataset>, jsonl:<path>, or math, gsm8k, aqua, imbue-code, hellaswag, coinflip, "
        "pku-saferlhf:helpful, pku-saferlhf:safe, each of these also with :<path>"
    )
    with pytest.raises(TaskError, match=known):
        get_task(name)
