from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("typer")

from swift_kernels import SwiftHead
from swift_kernels.training import resume
from swift_kernels.training.recipe import RECIPES
from swift_kernels.training.rollouts import read
from tests import tiny
from tests.commands import assert_refused, rollout_args, run


class TestCommand:
    def test_help_lists_the_subcommands(self, capsys: pytest.CaptureFixture[str]) -> None:
        code, out, err = run(capsys, "--help")
        assert (code, err) == (0, "")
        for name in (
            *("rollout", "pairs", "train", "ablate", "sketch", "eval", "reward", "calibrate", "report", "inspect"),
            *("best-of", "score", "demo"),
        ):
            assert name in out
            assert "--json" in run(capsys, name, "--help")[1]

    @pytest.mark.parametrize(
        ("args", "message"),
        [
            ([], "Missing command"),
            (["fly"], "No such command"),
            (["eval", "--fly"], "No such option"),
            (["eval", "x.jsonl"], "Missing option"),
            (["rollout", "--n", "many"], "--n"),
        ],
        ids=["none", "command", "option", "missing", "type"],
    )
    def test_usage_errors(self, capsys: pytest.CaptureFixture[str], args: list[str], message: str) -> None:
        assert_refused(run(capsys, *args), message)

    @pytest.mark.parametrize("package", ["typer", "rich"])
    def test_without_its_packages(
        self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, package: str
    ) -> None:
        monkeypatch.setitem(sys.modules, package, None)
        assert_refused(run(capsys, "--help"), "pip install 'swift_kernels[cli]'", code=1)

    def test_runs_as_a_module(self) -> None:
        done = subprocess.run(
            [sys.executable, "-m", "swift_kernels", "rollout", "--n", "x"], capture_output=True, text=True, check=False
        )
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.startswith("swift-kernels: ")


BAD_INPUT = {
    "unknown-task": (["rollout", "--model", "MODEL", "--task", "sum", "--output", "OUT"], "task 'sum' is unknown"),
    "n-0": (["rollout", "--model", "MODEL", "--task", "sums", "--output", "OUT", "--n", "0"], "n is 0"),
    "problems-0": (
        ["rollout", "--model", "MODEL", "--task", "sums", "--output", "OUT", "--problems", "0"],
        "the number of problems is 0",
    ),
    "context": (
        ["rollout", "--model", "MODEL", "--task", "sums", "--output", "OUT", "--max-new-tokens", "500"],
        "takes at most 256",
    ),
    "no-model": (["rollout", "--model", "/nowhere/model", "--task", "sums", "--output", "OUT"], "cannot be loaded"),
    "dtype": (
        ["rollout", "--model", "MODEL", "--task", "sums", "--output", "OUT", "--dtype", "int8"],
        "--dtype is 'int8': expected one of",
    ),
    "device": (
        ["rollout", "--model", "MODEL", "--task", "sums", "--output", "OUT", "--device", "abacus"],
        "--device 'abacus' cannot be used",
    ),
    "no-rollouts": (["train", "/nowhere/r.jsonl", "--model", "MODEL", "--output", "OUT"], "does not exist"),
    "layer": (["train", "ROLLOUTS", "--model", "MODEL", "--output", "OUT", "--layers", "7"], "layer index 7"),
    "top-logprobs": (
        ["train", "ROLLOUTS", "--model", "MODEL", "--output", "OUT", "--top-logprobs", "5"],
        "top_logprobs is 5, layers 'all'",
    ),
    "top-logprobs-large": (
        [
            "train",
            "ROLLOUTS",
            "--model",
            "MODEL",
            "--output",
            "OUT",
            "--layers",
            "top_logprobs",
            "--top-logprobs",
            "999",
        ],
        "top_logprobs is 999: expected 2..",
    ),
    "layers": (["train", "ROLLOUTS", "--model", "MODEL", "--output", "OUT", "--layers", "top"], "--layers is 'top'"),
    "validation": (
        ["train", "ROLLOUTS", "--model", "MODEL", "--output", "OUT", "--validation", "1.5"],
        "validation is 1.5",
    ),
    "recipe": (
        ["train", "ROLLOUTS", "--model", "MODEL", "--output", "OUT", "--recipe", "best"],
        "recipe is 'best': expected one of swift, upstream",
    ),
    "loss": (
        ["train", "ROLLOUTS", "--model", "MODEL", "--output", "OUT", "--loss", "mse"],
        "loss is 'mse': expected one of bce, hinge, dpo, infonca, nca",
    ),
    "output-is-a-file": (["train", "ROLLOUTS", "--model", "MODEL", "--output", "ROLLOUTS"], "is a file: expected a"),
    "output-is-a-folder": (
        ["score", "ROLLOUTS", "--model", "MODEL", "--head", "HEAD", "--output", "HEAD"],
        "is a folder: expected a file",
    ),
    "eval-n": (["eval", "ROLLOUTS", "--model", "MODEL", "--head", "HEAD", "--n", "1,64"], "n is 64: expected 1..4"),
    "no-head": (["eval", "ROLLOUTS", "--model", "MODEL", "--head", "/nowhere/head"], "/nowhere/head"),
    "best-of-0": (["best-of", "--model", "MODEL", "--head", "HEAD", "--prompt", "a", "--n", "0"], "n is 0"),
    "empty-prompt": (["best-of", "--model", "MODEL", "--head", "HEAD", "--prompt", " "], "the prompt is empty"),
    "long-prompt": (["best-of", "--model", "MODEL", "--head", "HEAD", "--prompt", "x" * 300], "takes at most 256"),
    "no-answers": (["score", "/nowhere/a.jsonl", "--model", "MODEL", "--head", "HEAD"], "/nowhere/a.jsonl"),
    "demo-0": (["demo", "--model", "MODEL", "--head", "HEAD", "--problems", "0"], "--problems is 0"),
}


@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_input_gets_one_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, model_folder: Path, head_folder: Path, rollouts: Path, name: str
) -> None:
    args, message = BAD_INPUT[name]
    places = {"MODEL": model_folder, "HEAD": head_folder, "ROLLOUTS": rollouts, "OUT": tmp_path / "out"}
    code, out, err = run(capsys, *(places.get(argument, argument) for argument in args))
    last = err.splitlines()[-1]
    # Progress may have been told before.
    assert (code, out) == (2, "")
    assert message in last
    assert last.startswith("swift-kernels: ")
    assert "Traceback" not in err
    assert not (tmp_path / "out").is_dir()


def test_a_head_of_another_model_is_refused(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, head_folder: Path, rollouts: Path
) -> None:
    other = tiny.save(tmp_path / "other", layers=3)
    result = run(capsys, "eval", rollouts, "--model", other, "--head", head_folder)
    assert_refused(result, "the head was trained on tiny-llama, the model is other")


class TestRollout:
    def test_writes_resumes_and_tells(
        self, capsys: pytest.CaptureFixture[str], tmp_path: Path, model_folder: Path
    ) -> None:
        # A problem a batch: in float32 a batch of other rows may round otherwise.
        whole, path = tmp_path / "whole.jsonl", tmp_path / "r.jsonl"
        code, out, _ = run(capsys, *rollout_args(model_folder, whole, **{"batch-size": 3}), "--json")
        facts = json.loads(out)
        assert code == 0
        assert {name: facts[name] for name in ("output", "problems", "continued", "candidates")} == {
            "output": str(whole),
            "problems": 4,
            "continued": 0,
            "candidates": 12,
        }
        path.write_bytes(whole.read_bytes()[:-30])
        code, out, err = run(capsys, *rollout_args(model_folder, path, **{"batch-size": 3}))
        assert code == 0
        assert "4 problems, 12 answers" in out
        assert "continuing after 3 problems" in err
        assert path.read_bytes() == whole.read_bytes()

    def test_refuses_to_mix_settings(
        self, capsys: pytest.CaptureFixture[str], tmp_path: Path, model_folder: Path
    ) -> None:
        path = tmp_path / "r.jsonl"
        run(capsys, *rollout_args(model_folder, path))
        before = path.read_bytes()
        result = run(capsys, *rollout_args(model_folder, path, seed=1))
        assert_refused(result, "was made with other settings: sampling")
        assert path.read_bytes() == before

    @pytest.mark.skipif(os.name != "posix", reason="SIGINT as a terminal sends it")
    def test_ctrl_c_keeps_what_is_whole(self, tmp_path: Path, model_folder: Path) -> None:
        path = tmp_path / "r.jsonl"
        args = rollout_args(model_folder, path, problems=300, **{"batch-size": 3})
        process = subprocess.Popen(
            [sys.executable, "-m", "swift_kernels", *args],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            # Where the tests run in the background, the command would inherit that interrupts are ignored.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        deadline = time.monotonic() + 120
        while not path.exists() or path.read_bytes().count(b"\n") < 4:
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
        assert (process.returncode, out) == (130, "")
        kept = len(read(path).rollouts)
        assert 3 <= kept < 300
        assert err.splitlines()[-1] == (
            f"swift-kernels: interrupted; {kept} problems are in {path}, the same command continues"
        )
        assert "Traceback" not in err


class TestTrainAndEvaluate:
    def test_from_rollouts_to_a_head_and_its_figures(
        self, capsys: pytest.CaptureFixture[str], tmp_path: Path, model_folder: Path, rollouts: Path
    ) -> None:
        head = tmp_path / "head"
        options = ["--model", model_folder, "--output", head, "--lr", "0.05", "--epochs", "10"]
        code, out, err = run(capsys, "train", rollouts, *options)
        assert code == 0
        assert "Best-of-N accuracy on 2 validation problems" in out
        assert "hidden states: 12/12" in err
        assert sorted(path.name for path in head.iterdir()) == ["README.md", "config.json", "model.safetensors"]

        code, out, _ = run(capsys, "eval", rollouts, "--model", model_folder, "--head", head, "--n", "1,4", "--json")
        [facts] = [task["evaluation"] for task in json.loads(out)["tasks"]]
        assert code == 0
        assert list(facts["accuracy"]) == ["1", "4"]
        assert facts["accuracy"]["4"]["random"]["mean"] == pytest.approx(0.5)
        assert facts["accuracy"]["4"]["swift"]["mean"] > 0.9
        assert facts["differences"]["swift - random"]["p"] < 0.05
        code, out, _ = run(capsys, "eval", rollouts, "--model", model_folder, "--head", head)
        assert code == 0
        for part in ("SWIFT", "majority vote", "self-certainty", "oracle", "Within-problem AUC", "paired", "sign-flip"):
            assert part in out
        assert max(map(len, out.splitlines())) <= 100

    def test_json_of_training(
        self, capsys: pytest.CaptureFixture[str], tmp_path: Path, model_folder: Path, rollouts: Path
    ) -> None:
        options = [
            "--model",
            model_folder,
            "--output",
            tmp_path / "h",
            "--epochs",
            "1",
            "--no-gate",
            "--layers",
            "0,-1",
        ]
        code, out, _ = run(capsys, "train", rollouts, *options, "--json")
        assert code == 0
        facts = json.loads(out)
        assert [epoch["number"] for epoch in facts["epochs"]] == [0, 1], "the ridge start, and one epoch"
        assert (facts["recipe"]["start"], facts["test"]) == ("ridge", None)
        config = SwiftHead.from_pretrained(str(tmp_path / "h")).config
        assert (config.layers, config.gate, config.task) == ((0, 2), False, "sums")

    def test_given_options_override_the_recipe(
        self, capsys: pytest.CaptureFixture[str], tmp_path: Path, model_folder: Path, rollouts: Path
    ) -> None:
        options = ["--model", model_folder, "--output", tmp_path / "h", "--recipe", "upstream", "--epochs", "2"]
        code, out, _ = run(capsys, "train", rollouts, *options, "--loss", "hinge", "--keep", "best", "--json")
        assert code == 0
        expected = replace(RECIPES["upstream"], epochs=2, loss="hinge", keep="best")
        assert json.loads(out)["recipe"] == asdict(expected)

    @pytest.mark.parametrize("recipe", ["swift", "upstream"])
    def test_the_card_says_how_to_make_the_same_head_again(
        self, capsys: pytest.CaptureFixture[str], tmp_path: Path, model_folder: Path, rollouts: Path, recipe: str
    ) -> None:
        options = ["--model", model_folder, "--recipe", recipe, "--epochs", "3", "--lr", "0.0123", "--loss", "infonca"]
        assert run(capsys, "train", rollouts, "--output", tmp_path / "head", *options)[0] == 0
        card = (tmp_path / "head" / "README.md").read_text()
        command = card.split("swift-kernels train ")[1].split("```")[0].replace("\\\n", " ").split()
        assert command[0] == rollouts.name
        command[command.index("--output") + 1] = str(tmp_path / "again")
        assert run(capsys, "train", rollouts, *command[1:])[0] == 0
        first, again = (tmp_path / name / "model.safetensors" for name in ("head", "again"))
        assert first.read_bytes() == again.read_bytes()

    def test_a_killed_fit_goes_on(
        self,
        capsys: pytest.CaptureFixture[str],
        tmp_path: Path,
        model_folder: Path,
        rollouts: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        options = ["--model", model_folder, "--epochs", "4", "--patience", "4", "--no-refit"]
        assert run(capsys, "train", rollouts, "--output", tmp_path / "whole", *options)[0] == 0
        genuine, saves = resume.save, []

        def killed(*args: Any) -> None:
            genuine(*args)
            saves.append(args)
            if len(saves) == 3:
                raise KeyboardInterrupt

        monkeypatch.setattr(resume, "save", killed)
        assert run(capsys, "train", rollouts, "--output", tmp_path / "head", *options)[0] == 130
        assert [path.name for path in (tmp_path / "head").iterdir()] == ["unfinished-fit.safetensors"]
        code, out, err = run(capsys, "train", rollouts, "--output", tmp_path / "head", *options, "--lr", "0.5")
        assert (code, out) == (2, "")
        assert "is the checkpoint of another fit: recipe 0: learning_rate is 1e-05 there and 0.5 here" in err
        assert run(capsys, "train", rollouts, "--output", tmp_path / "head", *options)[0] == 0
        assert len(saves) == 5, "the ridge start and two epochs were not done again"
        assert not (tmp_path / "head" / "unfinished-fit.safetensors").exists()
        whole, resumed = (tmp_path / name / "model.safetensors" for name in ("whole", "head"))
        assert whole.read_bytes() == resumed.read_bytes()

    def test_training_on_a_store_runs_no_model(
        self, capsys: pytest.CaptureFixture[str], tmp_path: Path, model_folder: Path, rollouts: Path
    ) -> None:
        args = [*rollout_args(model_folder, tmp_path / "r.jsonl"), "--store", tmp_path / "store", "--sketch", "pca:4"]
        code, _, err = run(capsys, *args)
        assert code == 0
        assert "at most" in err
        assert "3 entries of 4 bfloat16" in err
        lines = [json.loads(line) for line in (tmp_path / "r.jsonl").read_text().splitlines()]
        for row in lines[1:]:  # the tiny model's own answers are all wrong
            for place, candidate in enumerate(row["candidates"]):
                candidate["correct"] = place % 2 == 0
        (tmp_path / "r.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
        train = ["train", tmp_path / "r.jsonl", "--output", tmp_path / "h", "--epochs", "2"]
        code, _, _ = run(capsys, *train, "--store", tmp_path / "store")
        assert code == 0
        config = SwiftHead.from_pretrained(str(tmp_path / "h")).config
        assert (config.layers, config.widths) == ((0, 1, 2), (16, 16, 16))
        assert (
            "--store store --store-layers all --store-dtype bfloat16 --sketch pca:4"
            in (tmp_path / "h" / "README.md").read_text()
        )
        assert_refused(run(capsys, *train), "--model is missing")
        assert_refused(run(capsys, *train, "--store", tmp_path), "holds no store.json")
        assert_refused(
            run(capsys, *train, "--store", tmp_path / "store", "--test", tmp_path / "r.jsonl"),
            "--test and --test-store belong together",
        )
        shard = next((tmp_path / "store").glob("0*.safetensors"))
        os.truncate(shard, 100)
        assert_refused(run(capsys, *train, "--store", tmp_path / "store"), f"{shard} has 100 bytes")

    def test_training_on_log_probabilities(
        self, capsys: pytest.CaptureFixture[str], tmp_path: Path, model_folder: Path, rollouts: Path
    ) -> None:
        options = ["--model", model_folder, "--output", tmp_path / "h", "--epochs", "1", "--layers", "top_logprobs"]
        code, _, _ = run(capsys, "train", rollouts, *options)
        assert code == 0
        assert SwiftHead.from_pretrained(str(tmp_path / "h")).config.top_logprobs == 20

    def test_nothing_to_learn(self, capsys: pytest.CaptureFixture[str], tmp_path: Path, model_folder: Path) -> None:
        path = tmp_path / "r.jsonl"
        run(capsys, *rollout_args(model_folder, path))
        result = run(capsys, "train", path, "--model", model_folder, "--output", tmp_path / "head")
        assert_refused(result, "all 12 answers are wrong")
        assert not (tmp_path / "head").exists()
