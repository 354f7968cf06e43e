"""`swift-kernels inspect`: what it says of a head with and without a store and a model, and what it refuses."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("typer")
pytest.importorskip("jinja2")
pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")

import torch

from swift_kernels import SwiftHead
from swift_kernels.cli import main
from swift_kernels.integrations.models import load_model
from swift_kernels.training.rollouts import read
from swift_kernels.training.store import Store
from swift_kernels.training.stored import score_stored
from tests import tiny
from tests.browser import launch
from tests.commands import assert_refused, rollout_args, run
from tests.test_cli_train import Made, edit


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, model_folder: Path) -> Made:
    folder = tmp_path_factory.mktemp("inspected")
    found = Made(model_folder, folder / "r.jsonl", folder / "store")
    arguments = rollout_args(model_folder, found.rollouts, problems=8, n=4)
    assert main([*arguments, "--store", str(found.store), "--store-dtype", "float32"]) == 0
    edit(found.rollouts, lambda row: [c.update(correct=i % 2 == 0) for i, c in enumerate(row["candidates"])])
    return found


def inspect(capsys: pytest.CaptureFixture[str], made: Made, head: Path, output: Path, *options: Any) -> dict[str, Any]:
    code, out, err = run(capsys, "inspect", made.rollouts, "--head", head, "--output", output, "--json", *options)
    assert code == 0, err
    return json.loads(out)


def test_with_a_store_and_a_model_all_is_told(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, made: Made, head_folder: Path
) -> None:
    page = tmp_path / "new" / "page.html"
    facts = inspect(capsys, made, head_folder, page, "--store", made.store, "--model", made.model, "--folds", "4")
    assert facts["output"] == str(page)
    assert [own["entry"] for own in facts["probe"]["entries"]] == [0, 1, 2]
    assert (facts["probe"]["folds"], facts["probe"]["problems"]) == (4, 8)
    assert facts["weights"]["scaled_by_deviation"] is True
    assert sum(own["gate"] for own in facts["weights"]["entries"]) == pytest.approx(1)
    assert facts["notes"] == []
    assert facts["source"] == "from the store (float32)"
    rollouts = read(made.rollouts).rollouts
    head = SwiftHead.from_pretrained(str(head_folder))
    expected = score_stored(Store(made.store), head, rollouts)
    assert [own["id"] for own in facts["problems"]] == [item.id for item in rollouts[:3]]
    tokenizer = tiny.tokenizer()
    for problem, scores in zip(facts["problems"], expected, strict=False):
        own = [answer["score"] for answer in problem["answers"]]
        assert own == [None if math.isnan(score) else score for score in scores]
        for answer in problem["answers"]:
            assert len(answer["scored"]) == len(answer["gate_reward"]) == len(answer["running"])
            assert "".join(answer["tokens"]) == tokenizer.decode(answer["token_ids"])
            if answer["running"]:
                assert answer["running"][-1] == pytest.approx(answer["score"], rel=1e-5, abs=1e-6)
    with launch() as browser:
        opened = browser.open(page)
        assert opened.complaints == []
        assert opened.evaluate("document.querySelectorAll('section').length") == 3
        assert opened.evaluate("document.querySelectorAll('figure svg').length") == 5


def test_the_model_alone_gives_the_same_traces(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, made: Made, head_folder: Path
) -> None:
    ids = [item.id for item in read(made.rollouts).rollouts]
    chosen = ["--problems", f"{ids[5]},{ids[2]}", "--model", made.model]
    facts = inspect(capsys, made, head_folder, tmp_path / "a.html", *chosen)
    assert facts["probe"] is facts["head_within_auc"] is None
    assert facts["weights"]["scaled_by_deviation"] is False
    assert facts["source"] == "by the model"
    assert facts["notes"] == ["No store of activations was given (--store): layers are not probed."]
    assert [own["id"] for own in facts["problems"]] == [ids[5], ids[2]]
    stored = inspect(capsys, made, head_folder, tmp_path / "b.html", *chosen, "--store", made.store)
    for own, other in zip(facts["problems"], stored["problems"], strict=True):
        for answer, same in zip(own["answers"], other["answers"], strict=True):
            # What is left is float32's rounding in the model.
            torch.testing.assert_close(
                torch.tensor(answer["gate_reward"]), torch.tensor(same["gate_reward"]), rtol=1e-4, atol=1e-4
            )


@pytest.mark.parametrize("store", [True, False], ids=["store", "neither"])
def test_without_a_model_there_are_no_tokens(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, made: Made, head_folder: Path, store: bool
) -> None:
    options = ["--store", made.store, "--pool", "last", "--dimensions", "3"] if store else []
    facts = inspect(capsys, made, head_folder, tmp_path / "page.html", *options)
    assert facts["problems"] == []
    assert facts["notes"][-1] == "No model was given (--model): answers are not shown token by token."
    assert (facts["probe"] is not None) is store
    if store:
        assert facts["probe"]["pool"] == "last"
        assert [own["dimensions"] for own in facts["probe"]["entries"]] == [3, 3, 3]
    text = (tmp_path / "page.html").read_text()
    assert ("Token by token" in text, "What each layer knows" in text) == (False, store)


def test_a_head_that_cannot_read_the_store_is_traced_by_the_model(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, made: Made
) -> None:
    head = tmp_path / "top"
    SwiftHead.for_model(load_model(str(made.model))[0], "top_logprobs").save_pretrained(str(head))
    options = ["--store", made.store, "--model", made.model, "--show", "1"]
    facts = inspect(capsys, made, head, tmp_path / "page.html", *options)
    assert facts["source"] == "by the model"
    assert facts["notes"] == [
        "The store is probed, but the head cannot read it: it does not hold top_logprobs, which the head reads."
    ]
    assert len(facts["problems"]) == 1
    assert facts["weights"]["entries"][0]["entry"] == "top_logprobs"
    assert facts["weights"]["scaled_by_deviation"] is False


def test_for_people(capsys: pytest.CaptureFixture[str], tmp_path: Path, made: Made, head_folder: Path) -> None:
    arguments = ["inspect", made.rollouts, "--head", head_folder, "--output", tmp_path / "p.html"]
    code, out, err = run(capsys, *arguments, "--store", made.store)
    assert code == 0
    assert "reward weight, scaled by the features' deviation: " in out
    assert "Probe of 3 entries, " in out
    assert "the head, within problems: AUC " in out
    assert out.splitlines()[-1].startswith(f"{tmp_path / 'p.html'}: the page, made in ")
    assert "probing layers: 3/3" in err


REFUSED: dict[str, tuple[list[str], str]] = {
    "one fold": (["--folds", "1"], "--folds is 1: expected at least 2"),
    "more folds than problems": (["--store", "STORE", "--folds", "9"], "8 problems for 9 folds"),
    "no dimension": (["--dimensions", "0"], "--dimensions is 0: expected at least 1"),
    "nothing to show": (["--show", "0"], "--show is 0: expected at least 1"),
    "both ways to choose": (["--show", "2", "--problems", "x"], "give one of them"),
    "unknown problem": (["--problems", "nope"], "has no problem 'nope': expected ids such as"),
    "unknown pool": (["--store", "STORE", "--pool", "max"], "pool is 'max'"),
    "no store": (["--store", "FOLDER"], "holds no store.json"),
    "unknown head": (["--head", "none/such"], "none/such is neither a folder"),
    "folder": (["--output", "FOLDER"], "is a folder: expected a file"),
}


@pytest.mark.parametrize(("options", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_inspected_is_refused(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    made: Made,
    head_folder: Path,
    options: list[str],
    message: str,
) -> None:
    places = {"STORE": str(made.store), "FOLDER": str(tmp_path)}
    given = [places.get(option, option) for option in options]
    output = tmp_path / "page.html"
    output.write_text("before")
    result = run(capsys, "inspect", made.rollouts, "--head", head_folder, "--output", output, *given)
    assert result[0] == 2
    assert message in result[2].splitlines()[-1]
    assert result[1] == ""
    assert output.read_text() == "before"


def test_answers_of_one_kind_and_other_answers_are_refused(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, made: Made, head_folder: Path
) -> None:
    rollouts = tmp_path / "r.jsonl"
    rollouts.write_text(made.rollouts.read_text())
    edit(rollouts, lambda row: [c.update(correct=False) for c in row["candidates"]])
    arguments = ["inspect", rollouts, "--head", head_folder, "--output", tmp_path / "p.html", "--store", made.store]
    assert_refused(run(capsys, *arguments), "answers are wrong: a probe needs right and wrong ones")
    edit(rollouts, lambda row: row["candidates"][0]["token_ids"].reverse())
    assert_refused(run(capsys, *arguments), "are not those of the rollouts")
