"""`swift-kernels pairs`, and what `train` and `eval` make of its file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("typer")

from swift_kernels.training.rollouts import read
from tests.commands import assert_refused, run
from tests.evaluation.task_data import FIXTURES, rows_of, write_lines


@pytest.fixture
def preferences(tmp_path: Path) -> str:
    """A task whose better response says yes, and whose safer one says no."""
    row = rows_of("pku_saferlhf")[0]
    rows = [
        {
            **row,
            "prompt": f"May I take {number} biscuits?",
            "response_0": f"yes {number}" if number % 2 else f"no {number}",
            "response_1": f"no {number}" if number % 2 else f"yes {number}",
            "better_response_id": (number + 1) % 2,
            "safer_response_id": number % 2,
        }
        for number in range(40)
    ]
    return f"pku-saferlhf:helpful:{write_lines(tmp_path / 'preferences.jsonl', rows)}"


def test_pairs_are_rollouts_of_which_the_preferred_answer_is_right(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, preferences: str
) -> None:
    output = tmp_path / "pairs.jsonl"
    output.write_text("what was there before")
    code, out, err = run(capsys, "pairs", "--task", preferences, "--split", "all", "--output", output, "--json")
    assert code == 0, err
    assert json.loads(out) == {"output": str(output), "problems": 40, "candidates": 80}
    content = read(output)
    assert (content.task, content.header["split"]) == (preferences, "all")
    assert content.notes == []
    for rollout in content.rollouts:
        number = int(rollout.prompt.split()[3])
        assert rollout.prompt_token_ids is None
        assert rollout.answer == f"yes {number}"
        assert {candidate.text: candidate.correct for candidate in rollout.candidates} == {
            f"yes {number}": True,
            f"no {number}": False,
        }
        assert all(candidate.token_ids is None and candidate.finished for candidate in rollout.candidates)
    # Where the preferred one stands says nothing.
    assert len({rollout.candidates[0].correct for rollout in content.rollouts}) == 2


def test_problems_and_seed_choose_the_pairs(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, preferences: str
) -> None:
    def ids(*options: object) -> list[str]:
        assert run(capsys, "pairs", "--task", preferences, "--output", tmp_path / "p.jsonl", *options)[0] == 0
        return [rollout.id for rollout in read(tmp_path / "p.jsonl").rollouts]

    train, test = ids(), ids("--split", "test")
    assert sorted(train + test, key=int) == [str(line) for line in range(1, 41)]
    assert ids("--problems", 5) == train[:5]
    assert ids("--seed", 1) != train


def test_the_data_are_not_replaced_by_what_is_made_of_them(
    capsys: pytest.CaptureFixture[str], preferences: str
) -> None:
    source = Path(preferences.split(":", 2)[2])
    before = source.read_bytes()
    assert_refused(run(capsys, "pairs", "--task", preferences, "--output", source), "is what is read")
    assert source.read_bytes() == before


def test_train_learns_the_preference_and_eval_measures_the_win_rate(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, model_folder: Path, preferences: str
) -> None:
    files = {split: tmp_path / f"{split}.jsonl" for split in ("train", "test")}
    for split, path in files.items():
        assert run(capsys, "pairs", "--task", preferences, "--split", split, "--output", path)[0] == 0
    head = tmp_path / "head"
    train = ["train", files["train"], "--model", model_folder, "--output", head, "--loss", "dpo", "--epochs", "30"]
    code, out, err = run(capsys, *train, "--test", files["test"], "--json")
    assert code == 0, err
    assert json.loads(out)["recipe"]["loss"] == "dpo"
    code, out, err = run(capsys, "eval", files["test"], "--head", head, "--model", model_folder, "--n", "2", "--json")
    assert code == 0, err
    accuracy = json.loads(out)["tasks"][0]["evaluation"]["accuracy"]["2"]
    assert accuracy["random"]["mean"] == accuracy["vote"]["mean"] == 0.5
    assert accuracy["swift"]["mean"] > 0.9


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"task": "sums"},
            "sums has no stored answers: expected one of pku-saferlhf:helpful, pku-saferlhf:safe; let a model",
        ),
        ({"task": "pku-saferlhf"}, "task 'pku-saferlhf' is unknown: expected sums, "),
        ({"task": "pku-saferlhf:safe:/nowhere"}, "/nowhere does not exist"),
        ({"split": "half"}, "split is 'half': expected one of train, test, all"),
        ({"problems": "0"}, "the number of problems is 0: expected at least 1"),
        ({"problems": "9"}, "has 3 distinct problems in split 'all', 9 are asked for"),
        ({"output": "."}, ". is a folder: expected a file"),
    ],
    ids=["generated", "no aspect", "no file", "split", "none", "too many", "folder"],
)
def test_bad_input_is_refused_and_loses_nothing(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, options: dict[str, str], message: str
) -> None:
    output = tmp_path / "pairs.jsonl"
    output.write_text("what was there before")
    given = {
        "task": f"pku-saferlhf:safe:{FIXTURES / 'pku_saferlhf.jsonl'}",
        "split": "all",
        "output": str(output),
        **options,
    }
    arguments = [part for name, value in given.items() for part in (f"--{name}", value)]
    assert_refused(run(capsys, "pairs", *arguments), message)
    assert [path.name for path in tmp_path.iterdir()] == ["pairs.jsonl"]
    assert output.read_text() == "what was there before"
