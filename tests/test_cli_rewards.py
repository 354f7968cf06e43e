"""`swift-kernels reward` on tiny classifiers, interrupted, killed and refused."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("typer")

from swift_kernels.cli import main
from swift_kernels.evaluation.rewards import read_rewards
from swift_kernels.integrations.reward_model import RewardModel
from swift_kernels.training.rollouts import read
from tests import classifiers
from tests.commands import assert_refused, run


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return classifiers.save(tmp_path_factory.mktemp("llama") / "tiny-reward", classifiers.llama(chat=True))


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return classifiers.save(tmp_path_factory.mktemp("bert") / "tiny-bert", classifiers.bert(labels=2))


def args(rollouts: Path, model: Path, output: Path, *more: str) -> list[str]:
    return ["reward", str(rollouts), "--reward-model", str(model), "--output", str(output), "--device", "cpu", *more]


def rows(path: Path) -> list[dict[str, Any]]:
    """The lines of a file but for the time they took."""
    found = [json.loads(line) for line in path.read_text().splitlines()]
    return [{key: value for key, value in row.items() if key != "seconds"} for row in found]


@pytest.fixture
def whole(rollouts: Path, llama: Path, tmp_path: Path) -> Path:
    path = tmp_path / "whole.jsonl"
    assert main(args(rollouts, llama, path)) == 0
    return path


def test_rewards_and_what_they_cost(
    capsys: pytest.CaptureFixture[str], rollouts: Path, llama: Path, tmp_path: Path
) -> None:
    path = tmp_path / "r.jsonl"
    code, out, err = run(capsys, *args(rollouts, llama, path, "--json", "--batch-size", "3"))
    assert (code, "reward: 12/12" in err) == (0, True)
    facts, content = json.loads(out), read(rollouts).rollouts
    rewards = read_rewards(path, content)
    model = RewardModel(*classifiers.llama(chat=True), "tiny-reward")
    for rollout, values in zip(content, rewards.values, strict=True):
        expected = model.score(rollout.prompt, [candidate.text for candidate in rollout.candidates])
        assert values == pytest.approx(expected.rewards, abs=1e-5)
    assert rewards.notes == []
    assert rewards.cost is not None
    assert facts["parameters"] == rewards.cost.parameters == model.parameters
    assert (facts["problems"], facts["candidates"], facts["answers"], facts["without_reward"]) == (12, 48, 48, 0)
    assert facts["tokens"] == sum(len(f"<user>{r.prompt}<assistant>{c.text}") for r in content for c in r.candidates)
    assert facts["flops_per_answer"] == facts["flops"] / 48
    assert facts["seconds_per_answer"] == facts["seconds"] / 48 > 0
    code, out, err = run(capsys, *args(rollouts, llama, path))
    assert (code, "continuing after 12 problems" in err) == (0, True)
    assert "48 of them read" in out
    assert f"tiny-reward: {model.parameters:,} parameters" in out


def test_an_encoder_with_a_label(
    capsys: pytest.CaptureFixture[str], rollouts: Path, bert: Path, tmp_path: Path
) -> None:
    outputs = [tmp_path / "0.jsonl", tmp_path / "1.jsonl"]
    for label, path in enumerate(outputs):
        assert run(capsys, *args(rollouts, bert, path, "--label", str(label)))[0] == 0
    content = read(rollouts).rollouts
    first, second = (read_rewards(path, content).values for path in outputs)
    for ones, others in zip(first, second, strict=True):
        assert [math.exp(a) + math.exp(b) for a, b in zip(ones, others, strict=True)] == pytest.approx([1] * 4)
    assert rows(outputs[1])[0]["label"] == 1


KILLED = """
import os, signal, sys
from swift_kernels.cli import main
genuine, calls = os.write, []
def write(descriptor, data):
    if data.startswith((b'{"format"', b'{"id"')):
        calls.append(data)
    if len(calls) == 6:
        genuine(descriptor, data[: len(data) // 2])  # of the fifth problem's line
        os.kill(os.getpid(), signal.SIGKILL)
    return genuine(descriptor, data)
os.write = write
main(sys.argv[1:])
"""


@pytest.mark.slow
def test_killed_half_way_through_a_line_it_ends_as_if_it_had_not_been(
    capsys: pytest.CaptureFixture[str], rollouts: Path, llama: Path, whole: Path, tmp_path: Path
) -> None:
    path = tmp_path / "r.jsonl"
    command = [sys.executable, "-c", KILLED, *args(rollouts, llama, path)]
    done = subprocess.run(command, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False)
    assert done.returncode == -signal.SIGKILL
    content = path.read_bytes()
    assert (content.count(b"\n"), content.endswith(b"\n")) == (5, False)
    code, _, err = run(capsys, *args(rollouts, llama, path))
    assert (code, "continuing after 4 problems" in err) == (0, True)
    assert path.read_bytes().startswith(content[: content.rfind(b"\n")])
    assert rows(path) == rows(whole)


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (KeyboardInterrupt(), 130, "interrupted; 3 problems are in {}, the same command continues"),
        (RuntimeError("no\nsuch kernel"), 1, "problem '3': the reward model failed: no; 3 problems are in {}"),
        (torch.OutOfMemoryError("out of memory"), 1, "the same command continues, with a --batch-size below 16"),
        (ValueError("bad token"), 2, "problem '3': the reward model failed: bad token; 3 problems are in {}"),
    ],
    ids=["ctrl-c", "failure", "memory", "input"],
)
def test_what_was_done_before_a_failure_is_kept(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    rollouts: Path,
    llama: Path,
    whole: Path,
    tmp_path: Path,
    error: BaseException,
    code: int,
    message: str,
) -> None:
    path = tmp_path / "r.jsonl"
    genuine, calls = RewardModel.score, []

    def fail_at_the_fourth(self: RewardModel, *given: Any) -> Any:
        calls.append(given)
        if len(calls) == 4:
            raise error
        return genuine(self, *given)

    monkeypatch.setattr(RewardModel, "score", fail_at_the_fourth)
    found = run(capsys, *args(rollouts, llama, path))
    assert (found[0], found[1]) == (code, "")
    assert message.format(path) in found[2]
    assert rows(path) == rows(whole)[:4]
    assert run(capsys, *args(rollouts, llama, path))[0] == 0
    assert rows(path) == rows(whole)


def test_rewards_that_are_not_finite_are_null_and_noted(
    capsys: pytest.CaptureFixture[str], rollouts: Path, tmp_path: Path
) -> None:
    model, tokenizer = classifiers.llama()
    with torch.no_grad():
        model.score.weight.fill_(math.inf)
    folder = classifiers.save(tmp_path / "broken", (model, tokenizer))
    path = tmp_path / "r.jsonl"
    code, out, err = run(capsys, *args(rollouts, folder, path, "--json"))
    assert (code, json.loads(out)["without_reward"]) == (0, 48)
    assert "48 of 48 answers have no reward and are never picked" in err
    assert rows(path)[1]["rewards"] == [None] * 4


def test_an_answer_that_cannot_be_read_does_not_stop_the_others(
    capsys: pytest.CaptureFixture[str], rollouts: Path, tmp_path: Path
) -> None:
    model = classifiers.save(tmp_path / "rm", classifiers.llama())
    lines = [json.loads(line) for line in rollouts.read_text().splitlines()]
    lines[1]["prompt"] = lines[1]["candidates"][2]["text"] = ""
    changed = tmp_path / "rollouts.jsonl"
    changed.write_text("".join(json.dumps(line) + "\n" for line in lines))
    path = tmp_path / "r.jsonl"
    code, out, err = run(capsys, *args(changed, model, path, "--json"))
    without = sum(not c["text"] for c in lines[1]["candidates"])
    facts = json.loads(out)
    assert (code, facts["problems"], facts["without_reward"]) == (0, 12, without)
    assert f"{without} as it cannot read them (problem {lines[1]['id']!r}: prompt and answer have no tok" in " ".join(
        err.split()
    )
    written = rows(path)
    assert [row["unreadable"] for row in written[1:]] == [without, *[0] * 11]
    # Files of earlier versions do not say it.
    old = [{key: value for key, value in row.items() if key not in ("unreadable", "why")} for row in written]
    path.write_text("".join(json.dumps({"seconds": 1.0, **row}) + "\n" for row in old))
    assert len(read_rewards(path, read(changed).rollouts).notes) == 1


def test_refusals(
    capsys: pytest.CaptureFixture[str],
    rollouts: Path,
    llama: Path,
    bert: Path,
    model_folder: Path,
    whole: Path,
    tmp_path: Path,
) -> None:
    new = tmp_path / "new.jsonl"
    none = tmp_path / "none.jsonl"
    none.write_text(rollouts.read_text().splitlines()[0] + "\n")
    cases = {
        "is no sequence classifier, it lacks score.weight": args(rollouts, model_folder, new),
        "does not exist: expected a folder or a Hub id": args(rollouts, tmp_path / "nowhere", new),
        "say which one is the reward": args(rollouts, bert, new),
        "label is 2: expected 0..1": args(rollouts, bert, new, "--label", "2"),
        "holds no problems": args(none, llama, new),
        "no rollout header": args(whole, llama, new),
        "--batch-size is 0: expected at least 1": args(rollouts, llama, new, "--batch-size", "0"),
        "is a folder: expected a file": args(rollouts, llama, tmp_path),
        "is what is read: expected another file": args(rollouts, llama, rollouts),
        "--dtype is 'int8'": args(rollouts, llama, new, "--dtype", "int8"),
        "reward_model is tiny-reward there and tiny-bert here": args(rollouts, bert, whole, "--label", "1"),
        'dtype is "float32" there and "bfloat16" here': args(rollouts, llama, whole, "--dtype", "bfloat16"),
    }
    before = whole.read_bytes(), rollouts.read_bytes()
    for message, arguments in cases.items():
        assert_refused(run(capsys, *arguments), message)
    assert not new.exists()
    assert (whole.read_bytes(), rollouts.read_bytes()) == before


def test_rewards_of_other_answers_are_not_continued(
    capsys: pytest.CaptureFixture[str], rollouts: Path, llama: Path, whole: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other.jsonl"
    lines = rollouts.read_text().splitlines()
    lines[2] = lines[2].replace('"text":"no', '"text":"not ', 1)
    other.write_text("\n".join(lines) + "\n")
    assert_refused(run(capsys, *args(other, llama, whole)), f"{whole}:3: these are rewards of other answers")
