"""`swift-kernels eval`, `calibrate` and `report`: several heads and tasks, stores, rewards, and what they refuse."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("typer")

from swift_kernels import SwiftHead
from swift_kernels.training.rollouts import read
from tests import tiny
from tests.commands import assert_refused, rollout_args, run
from tests.test_cli_train import Made, edit, make

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tmp_path_factory.mktemp("eval-model") / "tiny-llama")


@pytest.fixture
def made(tmp_path: Path, model: Path, capsys: Capture) -> Made:
    return make(tmp_path, model, capsys, problems=12)


@pytest.fixture
def heads(tmp_path: Path, model: Path) -> list[Path]:
    """Two untrained ones."""
    import torch

    from swift_kernels.integrations.models import load_model

    paths = []
    for seed in range(2):
        torch.manual_seed(seed)
        SwiftHead.for_model(load_model(str(model))[0]).save_pretrained(str(tmp_path / f"head-{seed}"))
        paths.append(tmp_path / f"head-{seed}")
    return paths


def facts_of(capsys: Capture, *args: object) -> dict[str, Any]:
    code, out, err = run(capsys, *args, "--json")
    assert code == 0, err
    return json.loads(out)


class TestEval:
    def test_stored_features_give_what_the_model_gives(self, capsys: Capture, made: Made, heads: list[Path]) -> None:
        base = ["eval", made.rollouts, "--head", heads[0]]
        stored = facts_of(capsys, *base, "--store", made.store)["tasks"][0]
        run_again = facts_of(capsys, *base, "--model", made.model)["tasks"][0]
        # float32 kept whole, summed in another order: scores differ by rounding, and picks do not.
        assert stored["evaluation"] == run_again["evaluation"]
        assert stored["costs"][0]["flops"] == run_again["costs"][0]["flops"] > 0
        assert stored["costs"][0]["what"] == "SWIFT, read from the store"

    def test_heads_of_several_tasks_are_compared_on_all(
        self, capsys: Capture, tmp_path: Path, model: Path, made: Made, heads: list[Path]
    ) -> None:
        (tmp_path / "other").mkdir()
        other = make(tmp_path / "other", model, capsys, problems=6, seed=3)
        files = [made.rollouts, other.rollouts, "--store", made.store, "--store", other.store]
        both = ["--head", heads[0], "--head", heads[1]]
        found = facts_of(capsys, "eval", *files, *both, "--output", tmp_path / "e.json")
        assert json.loads((tmp_path / "e.json").read_text()) == found
        assert [task["head"] for task in found["tasks"]] == [str(head) for head in heads]
        crossed = found["transfer"]
        for index in range(2):
            own = found["tasks"][index]["evaluation"]
            assert crossed["accuracy"][index][index] == own["accuracy"]["4"]["swift"]
            assert crossed["difference"][index][index] is None
        code, out, _ = run(capsys, "eval", *files, *both)
        assert code == 0
        assert "Heads on the tasks of others" in out
        assert max(map(len, out.splitlines())) <= 100
        assert facts_of(capsys, "eval", *files, "--head", heads[0])["transfer"] is None, "one head for all"

    def test_external_rewards_are_combined(
        self, capsys: Capture, tmp_path: Path, made: Made, heads: list[Path]
    ) -> None:
        path = tmp_path / "judge.jsonl"
        items = read(made.rollouts).rollouts
        lines = [{"id": item.id, "points": [float(c.correct) for c in item.candidates]} for item in items[1:]]
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        options = ["--store", made.store, "--head", heads[0], "--reward", path, "--reward-column", "points"]
        [task] = facts_of(capsys, "eval", made.rollouts, *options)["tasks"]
        assert {"reward", "reward_vote", "rank", "min_max", "weighted"} <= set(task["evaluation"]["accuracy"]["4"])
        # It knows the grades, and has no line for the first problem, by which it is not judged.
        assert task["evaluation"]["accuracy"]["4"]["reward"]["mean"] == 1.0
        assert any("judged on the 11 of 12 problems" in note for note in task["notes"])
        assert task["reward"] == "judge"
        assert 0 <= task["weight"] <= 0.5

    @pytest.mark.parametrize("n", [3, 1], ids=["unequal", "single"])
    def test_problems_with_fewer_answers_are_judged_as_far_as_they_go(
        self, capsys: Capture, made: Made, heads: list[Path], n: int
    ) -> None:
        count = iter(range(12))

        def fewer(row: dict[str, Any]) -> None:
            row["candidates"] = row["candidates"][: n if next(count) == 0 else 4]

        edit(made.rollouts, fewer)
        [task] = facts_of(capsys, "eval", made.rollouts, "--model", made.model, "--head", heads[0])["tasks"]
        assert max(map(int, task["evaluation"]["accuracy"])) == n
        assert any(f"N goes to {n}" in note for note in task["notes"])

    @pytest.mark.parametrize(("task", "noted"), [("sums", True), ("other", False)], ids=["same", "other"])
    def test_problems_that_the_head_may_know_are_told(
        self, capsys: Capture, tmp_path: Path, made: Made, heads: list[Path], task: str, noted: bool
    ) -> None:
        head = SwiftHead.from_pretrained(str(heads[0])).with_config(task=task)
        head.save_pretrained(str(tmp_path / "head"))
        options = ["--store", made.store, "--head", tmp_path / "head"]
        [found] = facts_of(capsys, "eval", made.rollouts, *options)["tasks"]
        assert any("it may know them" in note for note in found["notes"]) == noted


BAD: dict[str, tuple[Callable[[Made, list[Path], Path], list[object]], str]] = {
    "neither": (lambda made, heads, tmp: [made.rollouts, "--head", heads[0]], "--store and --model are both missing"),
    "heads": (
        lambda made, heads, tmp: [made.rollouts, *(["--head", heads[0]] * 3), "--store", made.store],
        "--head is given 3 times for 1 files: expected one for all, or one for each",
    ),
    "stores": (
        lambda made, heads, tmp: [made.rollouts, "--head", heads[0], *(["--store", made.store] * 2)],
        "--store is given 2 times for 1 files: expected one for each",
    ),
    "rewards": (
        lambda made, heads, tmp: [
            made.rollouts,
            made.rollouts,
            "--model",
            made.model,
            "--head",
            heads[0],
            "--reward",
            tmp / "r",
        ],
        "--reward is given 1 times for 2 files",
    ),
    "device": (
        lambda made, heads, tmp: [made.rollouts, "--head", heads[0], "--store", made.store, "--device", "cpu"],
        "--device and --dtype are for a model that runs",
    ),
    "no-reward": (
        lambda made, heads, tmp: [
            made.rollouts,
            "--head",
            heads[0],
            "--store",
            made.store,
            "--reward",
            tmp / "nowhere.jsonl",
        ],
        "nowhere.jsonl does not exist",
    ),
    "no-store": (
        lambda made, heads, tmp: [made.rollouts, "--head", heads[0], "--store", tmp / "nowhere"],
        "nowhere",
    ),
    "n": (
        lambda made, heads, tmp: [made.rollouts, "--head", heads[0], "--store", made.store, "--n", "9"],
        "n is 9: expected 1..4",
    ),
    "itself": (
        lambda made, heads, tmp: [
            *(made.rollouts, "--head", heads[0], "--store", made.store, "--output", made.rollouts),
        ],
        "is what is read: expected another file",
    ),
    "device-file": (
        lambda made, heads, tmp: [made.rollouts, "--head", heads[0], "--store", made.store, "--output", "/dev/null"],
        "is no regular file",
    ),
    "folder": (
        lambda made, heads, tmp: [made.rollouts, "--head", heads[0], "--store", made.store, "--output", tmp],
        "is a folder: expected a file",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_gets_one_line(capsys: Capture, tmp_path: Path, made: Made, heads: list[Path], name: str) -> None:
    arguments, message = BAD[name]
    assert_refused(run(capsys, "eval", *arguments(made, heads, tmp_path)), message)


def test_rollouts_without_labels_are_refused(capsys: Capture, made: Made, heads: list[Path]) -> None:
    edit(made.rollouts, lambda row: [c.pop("correct") for c in row["candidates"]])
    result = run(capsys, "eval", made.rollouts, "--head", heads[0], "--store", made.store)
    assert_refused(result, "candidate 1 has no label: expected correct, true or false")


@pytest.mark.parametrize("what", ["layers", "sketch", "model"])
def test_a_store_that_the_head_cannot_read_is_refused(
    capsys: Capture, tmp_path: Path, model: Path, made: Made, heads: list[Path], what: str
) -> None:
    store, head = made.store, heads[0]
    if what == "layers":
        store = tmp_path / "few"
        again = rollout_args(model, tmp_path / "again.jsonl", problems=12, n=4)
        assert run(capsys, *again, "--store", store, "--store-layers", "0,1")[0] == 0
        made = made._replace(rollouts=tmp_path / "again.jsonl")
        message = "does not hold 2, which the head reads"
    elif what == "sketch":
        store = tmp_path / "sketch"
        assert run(capsys, "sketch", made.store, "--output", store, "--sketch", "random:4")[0] == 0
        message = "is a sketch"
    else:
        from swift_kernels.integrations.models import load_model

        head = tmp_path / "foreign"
        other = tiny.save(tmp_path / "another", seed=9)
        SwiftHead.for_model(load_model(str(other))[0]).save_pretrained(str(head))
        message = "the head was trained on another"
    assert_refused(run(capsys, "eval", made.rollouts, "--store", store, "--head", head), message)


class TestCalibrate:
    def test_scores_become_log_odds_and_rank_as_before(
        self, capsys: Capture, tmp_path: Path, made: Made, heads: list[Path]
    ) -> None:
        calibrated = tmp_path / "calibrated"
        options = ["--head", heads[0], "--store", made.store, "--output", calibrated]
        facts = facts_of(capsys, "calibrate", made.rollouts, *options)
        before, after = (
            facts_of(capsys, "eval", made.rollouts, "--store", made.store, "--head", head)["tasks"][0]
            for head in (heads[0], calibrated)
        )
        assert after["evaluation"] == before["evaluation"], "what is picked stays"
        # Fitted to scores that are log-odds already, a scaling has nothing left to do.
        assert after["calibration"]["scaling"]["temperature"] == pytest.approx(1.0, rel=1e-3)
        assert after["calibration"]["scaling"]["offset"] == pytest.approx(0.0, abs=1e-3)
        assert before["calibration"]["scaling"]["temperature"] == pytest.approx(facts["temperature"])
        kept = SwiftHead.from_pretrained(str(calibrated)).config.metrics["calibration"]
        assert kept["problems"] == 12
        assert kept["task"] == "sums"

    def test_score_and_best_of_tell_the_chance(
        self, capsys: Capture, tmp_path: Path, made: Made, heads: list[Path]
    ) -> None:
        head = SwiftHead.from_pretrained(str(heads[0])).calibrated(0.5, -1.0)
        head.save_pretrained(str(tmp_path / "calibrated"))
        lines = [{"prompt": "a b", "responses": ["c d", ""]}, {"prompt": "a b", "response": "c d"}]
        (tmp_path / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        rows = {}
        for name in (heads[0], tmp_path / "calibrated"):
            code, out, _ = run(capsys, "score", tmp_path / "a.jsonl", "--model", made.model, "--head", name)
            assert code == 0
            rows[name] = list(map(json.loads, out.splitlines()))
        several, single = rows[tmp_path / "calibrated"]
        plain = rows[heads[0]][1]["score"]
        assert single["score"] == pytest.approx(plain / 0.5 - 1.0, rel=1e-4)
        assert single["p_correct"] == pytest.approx(1 / (1 + math.exp(-single["score"])))
        assert several["p_correct"] == [pytest.approx(single["p_correct"]), None]
        assert "p_correct" not in rows[heads[0]][0]
        options = ["--model", made.model, "--prompt", "a b", "--n", "2", "--max-new-tokens", "4"]
        best = facts_of(capsys, "best-of", *options, "--head", tmp_path / "calibrated")
        assert best["p_correct"] == pytest.approx(1 / (1 + math.exp(-best["score"])))
        assert "P(correct)" in run(capsys, "best-of", *options, "--head", tmp_path / "calibrated")[1]

    def test_calibrations_add_up(self, heads: list[Path]) -> None:
        head = SwiftHead.from_pretrained(str(heads[0]))
        twice = head.calibrated(2.0, 0.5).calibrated(4.0, -1.0)
        assert twice.config.metrics["calibration"] == {"temperature": 8.0, "offset": 0.5 / 4 - 1.0}
        once = head.calibrated(8.0, 0.5 / 4 - 1.0)
        assert twice.weight.detach() == pytest.approx(once.weight.detach(), rel=1e-6)
        assert twice.bias.detach() == pytest.approx(once.bias.detach(), rel=1e-6)

    @pytest.mark.parametrize(("temperature", "offset"), [(0.0, 0.0), (-1.0, 0.0), (math.inf, 0.0), (1.0, math.nan)])
    def test_only_what_keeps_the_order_is_folded(self, heads: list[Path], temperature: float, offset: float) -> None:
        with pytest.raises(ValueError, match="expected finite ones, the first above 0"):
            SwiftHead.from_pretrained(str(heads[0])).calibrated(temperature, offset)

    def test_grades_of_one_kind_are_refused(
        self, capsys: Capture, tmp_path: Path, made: Made, heads: list[Path]
    ) -> None:
        edit(made.rollouts, lambda row: [c.update(correct=True) for c in row["candidates"]])
        options = ["--head", heads[0], "--store", made.store, "--output", tmp_path / "c"]
        assert_refused(run(capsys, "calibrate", made.rollouts, *options), "all answers are right")
        assert not (tmp_path / "c").exists()


class TestReport:
    @pytest.mark.parametrize("name", ["r.html", "r.md"])
    def test_is_made_from_the_same_json(
        self, capsys: Capture, tmp_path: Path, made: Made, heads: list[Path], name: str
    ) -> None:
        options = ["--store", made.store, "--head", heads[0], "--output", tmp_path / "e.json"]
        assert run(capsys, "eval", made.rollouts, *options)[0] == 0
        facts = facts_of(capsys, "report", tmp_path / "e.json", "--output", tmp_path / name)
        assert facts["tasks"] == ["sums"]
        assert facts["bytes"] == (tmp_path / name).stat().st_size > 1000

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["E", "--output", "r.pdf"], "ends in '.pdf': expected .html or .md"),
            (["nowhere.json", "--output", "r.html"], "nowhere.json"),
            (["E", "--output", "r.html"], "is no evaluation"),
            (["E", "--output", "E/r.html"], "which is a file: expected a folder"),
        ],
        ids=["suffix", "missing", "other", "in-a-file"],
    )
    def test_bad_input_gets_one_line(self, capsys: Capture, tmp_path: Path, arguments: list[str], message: str) -> None:
        (tmp_path / "E").write_text("{}")
        given = [part if part.startswith("--") else tmp_path / part for part in arguments]
        assert_refused(run(capsys, "report", *given), message)
        assert [path.name for path in tmp_path.iterdir()] == ["E"]
