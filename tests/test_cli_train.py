"""`swift-kernels train` on its own: what it refuses, where it writes, and that interruptions change nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest

pytest.importorskip("typer")

from swift_kernels import SwiftHead
from tests import tiny
from tests.commands import assert_refused, rollout_args, run
from tests.fake_hub import FakeHub
from tests.training.test_collection import by_two_processes


class Made(NamedTuple):
    """What `rollout --store` left."""

    model: Path
    rollouts: Path
    store: Path


def make(folder: Path, model: Path, capsys: pytest.CaptureFixture[str], **options: Any) -> Made:
    """Rollouts and their store; every other answer is said to be right: the tiny model's own are all wrong."""
    made = Made(model, folder / "r.jsonl", folder / "store")
    arguments = rollout_args(model, made.rollouts, **{"problems": 8, "n": 4, **options})
    assert run(capsys, *arguments, "--store", made.store, "--store-dtype", "float32")[0] == 0
    edit(made.rollouts, lambda row: [c.update(correct=i % 2 == 0) for i, c in enumerate(row["candidates"])])
    return made


def edit(rollouts: Path, change: Any) -> None:
    """Changes the rows of the problems in place."""
    header, *rows = map(json.loads, rollouts.read_text().splitlines())
    for row in rows:
        change(row)
    rollouts.write_text("".join(json.dumps(row) + "\n" for row in (header, *rows)))


@pytest.fixture
def made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Made:
    return make(tmp_path, tiny.save(tmp_path / "tiny-llama"), capsys)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


class TestPush:
    def test_uploads_the_head_and_its_card(
        self, capsys: pytest.CaptureFixture[str], tmp_path: Path, made: Made, fake_hub: FakeHub
    ) -> None:
        from huggingface_hub import metadata_load

        train = ["train", made.rollouts, "--store", made.store, "--output", tmp_path / "h", "--epochs", "1"]
        train += ["--model", "org/tiny-llama", "--push", "ada/my-head"]
        (tmp_path / "h").mkdir()
        (tmp_path / "h" / "notes.txt").write_text("private")
        code, out, err = run(capsys, *train, "--json")
        assert code == 0, err
        facts = json.loads(out)
        assert facts["pushed"] == f"{fake_hub.endpoint}/ada/my-head/commit/0123"
        there = contents(tmp_path / "h")
        del there["notes.txt"]
        assert sorted(there) == ["README.md", "config.json", "model.safetensors"]
        assert fake_hub.files == {"ada/my-head": there}
        assert metadata_load(tmp_path / "h" / "README.md") == {
            "library_name": "swift_kernels",
            "tags": ["swift", "reward-model", "best-of-n"],
            "base_model": "org/tiny-llama",
        }
        assert 'from_pretrained("ada/my-head"' in (tmp_path / "h" / "README.md").read_text()
        code, out, _ = run(capsys, *train)
        assert out.splitlines()[-1] == f"pushed: {facts['pushed']}"

    def test_is_refused_before_anything_is_trained(
        self,
        capsys: pytest.CaptureFixture[str],
        tmp_path: Path,
        made: Made,
        fake_hub: FakeHub,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setenv("HF_TOKEN", "hf_revoked")
        train = ["train", made.rollouts, "--store", made.store, "--output", tmp_path / "h", "--push", "ada/my-head"]
        assert_refused(run(capsys, *train), "run `hf auth login`")
        assert not (tmp_path / "h").exists()

    def test_an_upload_that_fails_leaves_the_head_and_says_how_to_go_on(
        self, capsys: pytest.CaptureFixture[str], tmp_path: Path, made: Made, fake_hub: FakeHub
    ) -> None:
        fake_hub.refuses = True
        head = tmp_path / "my head"
        train = ["train", made.rollouts, "--store", made.store, "--output", head, "--epochs", "1"]
        code, out, err = run(capsys, *train, "--push", "ada/my-head")
        assert code == 1
        assert "Best-of-N accuracy" in out
        last = err.splitlines()[-1]
        assert last.startswith("swift-kernels: ada/my-head was not pushed to: ")
        assert last.endswith(f"; {head} is whole, `hf upload ada/my-head '{head}'` pushes it")
        SwiftHead.from_pretrained(str(head))
        assert fake_hub.files == {"ada/my-head": {}}


@pytest.mark.slow
@pytest.mark.parametrize("source", ["store", "model"])
def test_of_two_processes_of_one_job_one_trains_what_one_alone_trains(tmp_path: Path, made: Made, source: str) -> None:
    pytest.importorskip("accelerate")
    alone, shared = tmp_path / "alone", tmp_path / "shared"

    def train(head: Path) -> list[str]:
        command = ["train", made.rollouts, "--output", head, "--epochs", "3", f"--{source}", getattr(made, source)]
        return [str(part) for part in command]

    for command in (
        [sys.executable, "-m", "swift_kernels", *train(alone)],
        by_two_processes(tmp_path, train(shared)),
    ):
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("parameters, epoch") == 1
    assert {"process 0 of 2", "process 1 of 2"} <= set(done.stdout.splitlines())
    assert contents(shared) == contents(alone)
