"""The tasks of the paper's data sets on rows in the Hub's formats, from local files and through `datasets`."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("math_verify")
pytest.importorskip("datasets")

import datasets

from swift_kernels.evaluation.tasks import HUB_TASKS, PkuSafeRlhf, Problem, TaskError, get_task, split_of, timeouts
from swift_kernels.evaluation.tasks.gym_scorer import SCORER
from swift_kernels.hub import HubError
from tests.evaluation.task_data import FILES, FIXTURES, SOURCES, FakeDatasets, rows_of, write_lines

GENERATED = [name for name in FILES if not name.startswith("pku")]

RESPONSES = {
    "math": ("thus $\\boxed{{{answer}}}$", "thus $\\boxed{{5}}$"),
    "gsm8k": ("so it is \\boxed{{{answer}}}", "so it is \\boxed{{7}}"),
    "aqua": ("The answer is ({answer}).", "The answer is (E)."),
    "imbue-code": ("\\boxed{{\\text{{{answer}}}}}", "\\boxed{{Z}}"),
    "hellaswag": ("I choose\n{answer})", "I choose\nC)"),
    "coinflip": ("The coin was flipped. {answer}.", "The coin was flipped. Heads."),
}
"""A right and a wrong response to every problem of a fixture."""


def local(name: str) -> Any:
    return get_task(f"{name}:{FIXTURES / FILES[name]}.jsonl")


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeDatasets]:
    served = FakeDatasets(tmp_path)
    monkeypatch.setattr(datasets, "load_dataset", served.load_dataset)
    datasets.disable_progress_bars()
    yield served
    datasets.enable_progress_bars()


@pytest.mark.parametrize("name", GENERATED)
def test_prompts_answers_and_grades(name: str) -> None:
    task = local(name)
    problems = task.problems("all", None)
    right, wrong = RESPONSES[name]
    assert len(problems) == 3
    assert (task.chat, task.stop) == (True, ())
    for problem in problems:
        prompt = task.prompt(problem.question)
        assert prompt.endswith(problem.question)
        assert "\\boxed{" in prompt.removesuffix(problem.question)
        response = right.format(answer=problem.answer)
        assert task.grade(response, problem)
        assert task.extract(response, problem) is not None
        assert not task.grade(wrong.format(), problem)
        assert not task.grade("", problem)
        assert task.extract("I do not know", problem) is None


def test_every_task_of_the_hub_is_tested() -> None:
    assert list(HUB_TASKS) == list(FILES) == list(SOURCES)


QUESTIONS = {
    "aqua": "How many primes are below 10?\nA) 4\nB) 5\nC) 3\nD) 2\nE) 6",
    "hellaswag": ("A boy ties his skates. he\nA) eats the ice.\nB) melts.\nC) becomes a bird.\nD) steps onto the ice."),
    "coinflip": "A coin is heads up. olin flips the coin. tess flips the coin. Is the coin still heads up?",
}


@pytest.mark.parametrize("name", QUESTIONS)
def test_questions_show_what_there_is_to_choose_from(name: str) -> None:
    assert QUESTIONS[name] in [problem.question for problem in local(name).problems("all", None)]


@pytest.mark.parametrize("name", ["aqua", "imbue-code", "hellaswag"])
def test_options_may_be_named_by_their_text(name: str) -> None:
    task = local(name)
    for problem in task.problems("all", None):
        for letter, option in zip("ABCDE", problem.data, strict=False):
            for response in (f"\\boxed{{{option}}}", f"The answer is {option}", f"Well.\n{option}"):
                assert task.extract(response, problem) == letter
                assert task.grade(response, problem) is (letter == problem.answer)


def test_choices_of_code_are_shuffled_alike_every_time(tmp_path: Path) -> None:
    rows = [{"question": f"print({n})", "choices": list("1234"), "correct_answer": "1"} for n in range(40)]
    task = get_task(f"imbue-code:{write_lines(tmp_path / 'p.jsonl', rows)}")
    problems = task.problems("all", None)
    assert {problem.answer for problem in problems} == set("ABCD")
    assert all(problem.data["ABCD".index(problem.answer)] == "1" for problem in problems)
    assert sorted(task.problems("all", None, seed=1), key=lambda p: p.id) == sorted(problems, key=lambda p: p.id)


class TestHub:
    @pytest.mark.parametrize("name", SOURCES)
    def test_asks_for_id_configuration_and_split(self, fake: FakeDatasets, name: str) -> None:
        train, test = SOURCES[name]
        rows = rows_of(FILES[name])
        fake.rows = dict.fromkeys(train + test, rows)
        task: Any = get_task(name)
        assert task.hub == train[0][0]
        assert task.problems("all", 1)[0] in task.problems("all", None)
        assert set(fake.asked) == set(train + test)
        if test:
            fake.asked.clear()
            task.problems("test", 1)
            assert fake.asked == test

    @pytest.mark.parametrize("name", [name for name, (_, test) in SOURCES.items() if test])
    def test_splits_are_those_of_the_data_set_without_training_on_the_test(self, fake: FakeDatasets, name: str) -> None:
        train, test = SOURCES[name]
        rows = rows_of(FILES[name])
        fake.rows = dict.fromkeys(test, rows[:1]) | dict.fromkeys(train, rows)
        keys = {split: {p.key for p in get_task(name).problems(split, None)} for split in ("train", "test", "all")}
        assert len(keys["test"]) == 1
        assert keys["train"] == keys["all"] - keys["test"]
        assert len(keys["train"]) == 2

    def test_the_test_of_math_is_math_500(self, fake: FakeDatasets) -> None:
        train, test = SOURCES["math"]
        fake.rows = {key: rows_of("math_train")[:1] for key in train} | {test[0]: rows_of("math_test")}
        fake.rows[train[1]] = rows_of("math_train")[1:]
        task = get_task("math")
        assert sorted(problem.answer for problem in task.problems("test", None)) == ["14", "3", "\\frac{1}{5}"]
        # "Half of a number" is in both, in other spacing.
        assert {problem.id for problem in task.problems("train", None)} == {
            "train/counting_and_probability/0",
            "train/counting_and_probability/1",
        }

    def test_one_split_is_divided_by_the_question(self, fake: FakeDatasets) -> None:
        rows = [{"question": f"print({n % 30})", "choices": ["1", "2"], "correct_answer": "1"} for n in range(60)]
        fake.rows = {SOURCES["imbue-code"][0][0]: rows}
        sides = {split: get_task("imbue-code").problems(split, None) for split in ("train", "test")}
        assert sum(map(len, sides.values())) == 30
        assert all(split_of(problem.key) == split for split, problems in sides.items() for problem in problems)

    def test_problems_do_not_depend_on_how_many_are_asked_for(self, fake: FakeDatasets) -> None:
        train, test = SOURCES["gsm8k"]
        rows = [{"question": f"{n}?", "answer": f"#### {n}"} for n in range(20)]
        fake.rows = {train[0]: rows, test[0]: rows[:5]}
        task = get_task("gsm8k")
        assert task.problems("train", 4, seed=3) == task.problems("train", 15, seed=3)[:4]
        assert task.problems("train", 15, seed=3) != task.problems("train", 15, seed=4)
        with pytest.raises(TaskError, match="gsm8k has 15 distinct problems in split 'train', 16 are asked for"):
            task.problems("train", 16)

    def test_rows_that_cannot_be_used_are_left_out_and_told(self, fake: FakeDatasets) -> None:
        train, test = SOURCES["hellaswag"]
        rows = rows_of("hellaswag")
        fake.rows = {train[0]: [*rows, {**rows[0], "ctx": "Another", "label": ""}], test[0]: rows[:1]}
        message = r"hellaswag: 1 of 4 rows are left out, such as row 3 of Rowan/hellaswag \(train\): 'label' is ''"
        with pytest.warns(UserWarning, match=message):
            assert len(get_task("hellaswag").problems("train", None)) == 2

    def test_another_format_is_an_error(self, fake: FakeDatasets) -> None:
        fake.rows = {SOURCES["gsm8k"][1][0]: [{"input": "1?", "target": "1"}]}
        with pytest.raises(TaskError, match=r"no row of the Hub is as expected.* row 0 of openai/gsm8k \(main, test\)"):
            get_task("gsm8k").problems("test", None)

    @pytest.mark.parametrize("name", SOURCES)
    def test_without_a_network_a_local_file_is_proposed(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str
    ) -> None:
        monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
        monkeypatch.setattr(importlib.import_module("huggingface_hub").constants, "HF_HUB_OFFLINE", True)
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
        message = rf"{HUB_TASKS[name](None).hub}.* cannot be loaded from the Hub.* local file .*: {name}:FILE"
        if name == "math":
            message = message.replace("EleutherAI/hendrycks_math", "HuggingFaceH4/MATH-500")
        with pytest.raises(HubError, match=message):
            get_task(name).problems("all", 1)

    def test_without_datasets_its_extra_is_named(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "datasets", None)
        with pytest.raises(ImportError, match=r"openai/gsm8k .*pip install 'swift_kernels\[tasks\]'.* gsm8k:FILE"):
            get_task("gsm8k").problems("test", 1)


def changed(fixture: str, **fields: Any) -> dict[str, Any]:
    row = {**rows_of(fixture)[0], **fields}
    return {name: value for name, value in row.items() if value is not None}


BAD_ROWS = {
    "math without problem": ("math", changed("math_test", problem=None), "no 'problem' that is text"),
    "math without box": ("math", changed("math_train", solution="14"), "no 'answer', and nothing in .*boxed"),
    "math with empty answer": ("math", changed("math_test", answer=""), "no 'answer' that is text"),
    "gsm8k without mark": ("gsm8k", changed("gsm8k", answer="18"), "no '####' with a number"),
    "gsm8k without number": ("gsm8k", changed("gsm8k", answer="18\n#### "), "no '####' with a number"),
    "aqua without options": ("aqua", changed("aqua", options=None), "no 'options' that is a list"),
    "aqua with one option": ("aqua", changed("aqua", options=["A)1"]), "no 'options' that is a list of 2"),
    "aqua with a number": ("aqua", changed("aqua", options=["A)1", 2]), "'options' holds 2: expected text"),
    "aqua with another letter": (
        "aqua",
        changed("aqua", correct="F"),
        "'correct' is 'F': expected one of A, B, C, D, E",
    ),
    "hellaswag without label": ("hellaswag", changed("hellaswag", label=""), "'label' is '': expected .* 0 to 3"),
    "hellaswag of the far end": ("hellaswag", changed("hellaswag", label="4"), "'label' is '4'"),
    "imbue with another answer": ("imbue-code", changed("imbue_code", correct_answer="7"), "'correct_answer' is '7'"),
    "coinflip maybe": ("coinflip", changed("coinflip", targets="maybe"), "'targets' is 'maybe': expected yes or no"),
    "coinflip without question": ("coinflip", changed("coinflip", inputs=None), "no 'inputs'"),
    "pku with no preference": (
        "pku-saferlhf:helpful",
        changed("pku_saferlhf", better_response_id=-1),
        "'better_response_id' is -1: expected 0 or 1",
    ),
    "pku with equal responses": (
        "pku-saferlhf:safe",
        changed("pku_saferlhf", response_0="Run.", response_1="Run."),
        "the two responses are equal",
    ),
    "pku without response": ("pku-saferlhf:safe", changed("pku_saferlhf", response_1=" "), "no 'response_1'"),
}


@pytest.mark.parametrize("case", BAD_ROWS)
def test_bad_rows_of_a_file_are_named(tmp_path: Path, case: str) -> None:
    name, row, message = BAD_ROWS[case]
    path = write_lines(tmp_path / "p.jsonl", ["", row])
    with pytest.raises(TaskError, match=rf"p\.jsonl:2: {message}"):
        get_task(f"{name}:{path}").problems("all", None)


def test_duplicates_of_a_file_stand_on_one_side(tmp_path: Path) -> None:
    rows = [{"question": f"{'  ' * (n // 30)}{n % 30} apples?", "answer": "#### 1"} for n in range(60)]
    task = get_task(f"gsm8k:{write_lines(tmp_path / 'p.jsonl', rows)}")
    sides = [{problem.key for problem in task.problems(split, None)} for split in ("train", "test")]
    assert not sides[0] & sides[1]
    assert len(sides[0] | sides[1]) == len(task.problems("all", None)) == 30


@pytest.mark.parametrize("name", FILES)
def test_missing_file(name: str) -> None:
    with pytest.raises(TaskError, match=r"/nowhere/rows\.jsonl does not exist"):
        get_task(f"{name}:/nowhere/rows.jsonl")


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match="is no file: expected a JSONL file of problems"):
        get_task(f"gsm8k:{tmp_path}")


@pytest.mark.parametrize("content", ["", " \n\n"])
def test_an_empty_file_is_called_so(tmp_path: Path, content: str) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text(content)
    with pytest.raises(TaskError, match=r"p\.jsonl is empty: expected a problem with its answer a line"):
        get_task(f"gsm8k:{path}").problems("train", None)


def test_what_takes_a_grader_too_long_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    gsm8k, coinflip, gym = local("gsm8k"), local("coinflip"), get_task("reasoning-gym:gcd")
    gsm8k._grader.timeouts = 2
    monkeypatch.setattr(SCORER, "timeouts", 3)
    assert [timeouts(task) for task in (gsm8k, coinflip, gym, get_task("sums"))] == [2, 0, 3, 0]


class TestPreferences:
    @pytest.mark.parametrize(
        ("aspect", "preferred"),
        [("helpful", "Push your sister aside and take it."), ("safe", "I cannot say.")],
    )
    def test_the_aspect_decides(self, aspect: str, preferred: str) -> None:
        task = local(f"pku-saferlhf:{aspect}")
        assert isinstance(task, PkuSafeRlhf)
        problem = next(p for p in task.problems("all", None) if "biscuit" in p.question)
        assert [text for text, _ in task.answers(problem)] == list(problem.data)
        assert [text for text, best in task.answers(problem) if best] == [preferred] == [problem.answer]
        assert task.prompt(problem.question) == "How do I get the last biscuit?"
        assert task.grade(preferred, problem)
        assert not task.grade("Run.", problem)
        assert [task.extract(text, problem) for text in (*problem.data, "Run.")] == ["0", "1", None]

    def test_one_pair_a_prompt(self) -> None:
        problems: list[Problem] = local("pku-saferlhf:safe").problems("all", None)
        assert len(problems) == len({problem.key for problem in problems}) == 3

    def test_equal_responses_are_left_out(self, fake: FakeDatasets) -> None:
        (train,), test = SOURCES["pku-saferlhf:helpful"]
        equal = changed("pku_saferlhf", prompt="Which?", response_0="Run.", response_1="Run.")
        rows = rows_of("pku_saferlhf")
        fake.rows = {train: [equal, *rows[1:]], test[0]: rows[:1]}
        with pytest.warns(UserWarning, match=r"1 of \d+ rows are left out, .*: the two responses are equal"):
            problems = get_task("pku-saferlhf:helpful").problems("train", None)
        assert problems
        assert "Which?" not in [problem.question for problem in problems]
