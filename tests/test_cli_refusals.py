"""`train` on the command line: without a store and a second pass kept, and on input that cannot be used."""

from __future__ import annotations

import copy
import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("typer")

from safetensors.torch import load_file, save_file

from swift_kernels import SwiftHead
from swift_kernels.cli import main
from swift_kernels.evaluation.tasks import JsonlTask, Sums
from swift_kernels.files import alone
from swift_kernels.training import generation
from swift_kernels.training.store import sealed
from tests import tiny
from tests.commands import assert_refused, rollout_args, run
from tests.evaluation.task_data import FIXTURES

Rows = list[dict[str, Any]]

SEED = 2
"""With which every answer of the tiny model has a scored token."""


def read_rows(path: Path) -> Rows:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write_rows(path: Path, rows: Rows) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@dataclass(frozen=True)
class Place:
    """Rollouts with their store, those of a test with theirs, and a head that must not be lost."""

    folder: Path

    @property
    def train(self) -> Path:
        return self.folder / "train.jsonl"

    @property
    def test(self) -> Path:
        return self.folder / "test.jsonl"

    @property
    def store(self) -> Path:
        return self.folder / "train-store"

    @property
    def head(self) -> Path:
        return self.folder / "head"

    def change(self, change: Callable[[Rows], None], path: Path | None = None) -> None:
        """Changes the problems of a rollout file, the training's by default."""
        rows = read_rows(path or self.train)
        problems = rows[1:]
        change(problems)
        write_rows(path or self.train, [rows[0], *problems])

    def change_shard(self, change: Callable[[torch.Tensor], None]) -> None:
        """Changes a shard's values, and mends its record."""
        shard = self.store / "00000.safetensors"
        tensors = load_file(shard)
        change(tensors["values"])
        save_file(tensors, shard)
        record = json.loads((self.store / "00000.json").read_text())
        record |= {"nbytes": shard.stat().st_size, "sha256": hashlib.sha256(shard.read_bytes()).hexdigest()}
        del record["digest"]
        (self.store / "00000.json").write_text(json.dumps(sealed(record)))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, model_folder: Path) -> Path:
    folder = tmp_path_factory.mktemp("made")
    for split, problems in (("train", 8), ("test", 4)):
        path = folder / f"{split}.jsonl"
        args = rollout_args(model_folder, path, problems, split=split, seed=SEED, store=folder / f"{split}-store")
        assert main(args) == 0
        rows = read_rows(path)
        for row in rows[1:]:  # the tiny model's own answers are all wrong
            for index, candidate in enumerate(row["candidates"]):
                candidate["correct"] = index == 0
        write_rows(path, rows)
    torch.manual_seed(0)
    SwiftHead([16, 16, 16]).save_pretrained(str(folder / "head"))
    (folder / "head" / "README.md").write_text("the card of a head that took hours\n")
    return folder


@pytest.fixture
def place(made: Path, tmp_path: Path) -> Place:
    shutil.copytree(made, tmp_path / "place")
    return Place(tmp_path / "place")


def grade(correct: bool) -> Callable[[Place], None]:
    def change(problems: Rows) -> None:
        for row in problems:
            for candidate in row["candidates"]:
                candidate["correct"] = correct

    return lambda place: place.change(change)


def without_label(name: str) -> Callable[[Place], None]:
    def change(problems: Rows) -> None:
        del problems[1]["candidates"][2]["correct"]

    return lambda place: place.change(change, getattr(place, name))


def with_confidence(make: Callable[[dict[str, Any]], Any]) -> Callable[[Place], None]:
    def change(problems: Rows) -> None:
        candidate = problems[0]["candidates"][1]
        candidate["confidence"]["entropies"] = make(candidate)

    return lambda place: place.change(change)


def share_problem(*, mirrored: bool) -> Callable[[Place], None]:
    """Puts a problem of the training into the test, as it is or with its operands exchanged."""

    def prepare(place: Place) -> None:
        shared = copy.deepcopy(read_rows(place.train)[1])
        if mirrored:
            first, second = shared["id"].split("+")
            shared["id"] = f"{second}+{first}"
            shared["prompt"] = Sums().prompt(f"What is {second} + {first}?")
        place.change(lambda problems: problems.append(shared), place.test)

    return prepare


def of_other_model(place: Place) -> None:
    header = json.loads((place.store / "store.json").read_text())
    header["model"] |= {"name": "other", "embedding_values": [0.5] * 64}
    del header["digest"]
    (place.store / "store.json").write_text(json.dumps(sealed(header)))


def other_answer(place: Place) -> None:
    def change(problems: Rows) -> None:
        candidate = problems[3]["candidates"][0]
        candidate["token_ids"][0] += 1

    place.change(change)


def not_finite(place: Place) -> None:
    place.change_shard(lambda values: values[2, 5:7].fill_(torch.nan))


def corrupt(place: Place) -> None:
    data = bytearray((place.store / "00000.safetensors").read_bytes())
    data[-1] ^= 1
    (place.store / "00000.safetensors").write_bytes(data)


def one_problem(place: Place) -> None:
    place.change(lambda problems: problems.__delitem__(slice(1, None)))


def nothing(place: Place) -> None:
    pass


MODEL, ON_THE_FLY = ["--model", "MODEL"], ["--model", "MODEL", "--on-the-fly"]
STORE = ["--store", "STORE"]
TEST = ["--test", "TEST"]
TEST_STORE = [*TEST, "--test-store", "TEST-STORE"]

BAD_INPUT: dict[str, tuple[Callable[[Place], None], list[str], str]] = {
    **{
        f"{name}, {way}": (prepare, args, message)
        for name, (prepare, message) in {
            "all right": (grade(True), "all 24 answers are right: a head learns from right and wrong ones"),
            "all wrong": (grade(False), "all 24 answers are wrong: a head learns from right and wrong ones"),
            "one problem": (one_problem, "there is 1 problem: expected at least 2, one of them to validate on"),
            "no label": (without_label("train"), "train.jsonl:3: not a problem with its candidates: candidate 3"),
        }.items()
        for way, args in {"model": MODEL, "on the fly": ON_THE_FLY, "store": STORE}.items()
    },
    "no label in the test": (without_label("test"), [*MODEL, *TEST], "test.jsonl:3: not a problem with its"),
    "confidence of words": (
        with_confidence(lambda candidate: ["high"] * len(candidate["token_ids"])),
        MODEL,
        "train.jsonl:2: not a problem with its candidates: confidence: entropies is not a list of numbers",
    ),
    "confidence too short": (
        with_confidence(lambda candidate: [0.5] * (len(candidate["token_ids"]) - 1)),
        STORE,
        "token ids: expected one each",
    ),
    **{
        f"{name}, {way}": (share_problem(mirrored=mirrored), args, "test.jsonl shares 1 problems with ")
        for name, mirrored in {"a problem in both": False, "a mirrored problem": True}.items()
        for way, args in {"model": [*MODEL, *TEST], "store": [*STORE, *TEST_STORE]}.items()
    },
    "rollouts of another model": (nothing, ["--model", "OTHER"], "was generated by tiny-llama, the model is other"),
    "store of another model": (of_other_model, STORE, "holds activations of other, "),
    "store of other answers": (other_answer, STORE, "are not those of the rollouts"),
    "NaN in the store": (not_finite, STORE, "2 of 16 features NaN or infinite in entry 0"),
    "corrupt shard": (corrupt, STORE, "00000.safetensors is corrupted: its checksum is not the one"),
    "missing shard": (
        lambda place: (place.store / "00000.safetensors").unlink(),
        STORE,
        "00000.safetensors is missing: run the command that made the store again",
    ),
    "on the fly with a store": (nothing, [*STORE, "--on-the-fly"], "--on-the-fly runs the model in every epoch"),
    "loss": (nothing, [*STORE, "--loss", "mse"], "loss is 'mse': expected one of bce, hinge, dpo, infonca, nca"),
    "recipe": (nothing, [*STORE, "--recipe", "best"], "recipe is 'best': expected one of swift, upstream"),
    "layers": (
        nothing,
        [*STORE, "--layers", "top"],
        "--layers is 'top': expected all, logits, top_logprobs or integers separated by commas",
    ),
    "layer of no model": (nothing, [*MODEL, "--layers", "7"], "layer index 7 is out of range: expected -3..2"),
    "layer of no store": (nothing, [*STORE, "--layers", "7"], "layer index 7 is out of range: expected -3..2"),
}


@pytest.fixture(scope="module")
def other_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tmp_path_factory.mktemp("models") / "other", seed=1)


@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_input_gets_one_line_and_loses_nothing(
    capsys: pytest.CaptureFixture[str], place: Place, model_folder: Path, other_model: Path, name: str
) -> None:
    prepare, args, message = BAD_INPUT[name]
    prepare(place)
    before = contents(place.folder)
    places = {"MODEL": model_folder, "OTHER": other_model, "STORE": place.store, "TEST": place.test}
    places["TEST-STORE"] = place.folder / "test-store"
    options = [places.get(argument, argument) for argument in args]
    assert_refused(run(capsys, "train", place.train, "--output", place.head, "--epochs", "1", *options), message)
    assert contents(place.folder) == before


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "README.md"])
@pytest.mark.parametrize("command", ["train", "calibrate"])
def test_a_head_is_not_written_over_what_is_none(
    capsys: pytest.CaptureFixture[str], place: Place, name: str, command: str
) -> None:
    output = place.folder / "a model of mine"
    output.mkdir()
    (output / name).write_text('{"architectures": ["LlamaForCausalLM"]}')
    before = contents(place.folder)
    options = ["--head", place.head] if command == "calibrate" else ["--epochs", "1"]
    result = run(capsys, command, place.train, "--store", place.store, "--output", output, *options)
    assert_refused(
        result, f"a model of mine/{name} is no head's and would be lost: expected another folder for the head"
    )
    assert contents(place.folder) == before


def held(place: Place, what: str) -> tuple[list[object], Path, bool]:
    """A command, and the file or folder that another process writes."""
    if what == "train":
        return ["train", place.train, "--store", place.store, "--output", place.head], place.head, True
    if what == "sketch":
        output = place.folder / "sketch"
        return ["sketch", place.store, "--sketch", "random:4", "--output", output], output, True
    if what == "rollout":
        return [*rollout_args(place.folder / "no model", place.train, 8)], place.train, False
    if what == "rollout into a store":
        options = {"store": place.store}
        return [*rollout_args(place.folder / "no model", place.folder / "new.jsonl", 8, **options)], place.store, True
    output = place.folder / "rewards.jsonl"
    return ["reward", place.train, "--reward-model", place.folder / "none", "--output", output], output, False


@pytest.mark.parametrize("what", ["train", "sketch", "rollout", "rollout into a store", "reward"])
def test_what_another_process_writes_is_refused_at_once(
    capsys: pytest.CaptureFixture[str], place: Place, what: str
) -> None:
    args, output, folder = held(place, what)
    with alone(output, folder=folder):
        before = contents(place.folder)
        assert_refused(run(capsys, *args), f"{output} is being written by another process: wait until that has ended")
        assert contents(place.folder) == before


def test_scores_are_not_written_over_the_answers(capsys: pytest.CaptureFixture[str], place: Place) -> None:
    result = run(capsys, "score", place.train, "--model", "m", "--head", place.head, "--output", place.train)
    assert_refused(result, "train.jsonl is what is read: expected another file for what is written")


ROLLOUT_MISTAKES = {
    "task": (
        {"task": "sum"},
        "task 'sum' is unknown: expected sums, reasoning-gym:<dataset>, jsonl:<path>, or math, gsm8k",
    ),
    "split": ({"split": "half"}, "'half'"),
    "layers": (
        {"store-layers": "16,top"},
        "--store-layers is '16,top': expected all, logits, top_logprobs or integers separated by commas",
    ),
    "sources": (
        {"store-layers": "logits,foo"},
        "--store-layers is 'logits,foo': expected all, logits, top_logprobs or integers separated by commas",
    ),
    "stored answers": (
        {"task": f"pku-saferlhf:safe:{FIXTURES / 'pku_saferlhf.jsonl'}"},
        "has stored answers, none are generated: write them to a rollout file with `swift-kernels pairs --task pku-",
    ),
    "sketch": ({"sketch": "svd:4"}, "the sketch is 'svd:4': expected random:K or pca:K"),
    "one line of JSON": (
        {"output": "FOLDER/mine.json"},
        "mine.json holds 12 bytes of something else: expected a file of `swift-kernels rollout`, which is continued",
    ),
    "half a character": ({"task": "jsonl:FOLDER/half.jsonl"}, "half.jsonl:2: it holds \\ud800, half a character"),
    "long prompt": (
        {"task": "jsonl:FOLDER/long.jsonl", "split": "all", "output": "FOLDER/new.jsonl"},
        "long.jsonl:3: the prompt, with one token of an answer, has ",
    ),
    "other seed": (
        {"output": "FOLDER/other.jsonl", "seed": SEED + 1, "store": "FOLDER/train-store"},
        "sampling.seed is ",
    ),
    "disk": ({}, "the activations of 8 problems, up to 144 tokens, take up to 0.0 GB"),
}


@pytest.mark.parametrize("name", ROLLOUT_MISTAKES)
def test_a_bad_rollout_is_refused_before_anything_is_generated(
    capsys: pytest.CaptureFixture[str], place: Place, model_folder: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    changes, message = ROLLOUT_MISTAKES[name]
    if name == "disk":
        monkeypatch.setattr(shutil, "disk_usage", lambda folder: type("Usage", (), {"free": 1000}))
    monkeypatch.setattr(generation, "decode", lambda *args: pytest.fail("the model ran"))
    (place.folder / "mine.json").write_text('{"years": 3}')
    (place.folder / "half.jsonl").write_text('{"problem": "1", "answer": 1}\n{"problem": "\\ud800", "answer": 1}\n')
    rows = [{"problem": question, "answer": 1} for question in ("1", "2", "x" * 300, *"45678")]
    (place.folder / "long.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(JsonlTask, "_INSTRUCTION", "")  # which alone nearly fills the tiny model's context
    before = contents(place.folder)
    given = {"output": place.train, "seed": SEED, "store": place.folder / "new-store", **changes}
    given = {key: str(value).replace("FOLDER", str(place.folder)) for key, value in given.items()}
    args = rollout_args(model_folder, Path(given.pop("output")), 8, **given)
    code, out, err = run(capsys, *args)
    assert (code, out) == (2, "")
    assert message in err.splitlines()[-1]
    assert "Traceback" not in err
    assert contents(place.folder) == before
    assert not (place.folder / "new-store").exists()


def test_mirrored_problems_are_held_back_together(
    capsys: pytest.CaptureFixture[str], place: Place, model_folder: Path
) -> None:
    """5 + 12 and 12 + 5 have one key: validating on one after training on the other would flatter the head."""

    def mirror(problems: Rows) -> None:
        for row in copy.deepcopy(problems):
            first, second = row["id"].split("+")
            problems.append({**row, "id": f"{second}+{first}", "prompt": Sums().prompt(f"What is {second} + {first}?")})

    place.change(mirror)
    for seed in range(3):
        options = ["--model", model_folder, "--epochs", "1", "--seed", seed, "--validation", "0.4", "--json"]
        code, out, _ = run(capsys, "train", place.train, "--output", place.head, *options)
        assert code == 0
        # 40% of 8 keys, with both problems of each.
        assert json.loads(out)["validation"]["problems"] == 2 * 3


def test_on_the_fly_costs_tokens_and_gives_the_same_head(
    capsys: pytest.CaptureFixture[str], place: Place, model_folder: Path
) -> None:
    tokens: dict[str, int] = {}
    for name, options in {
        "store": ["--store", place.store],
        "once": ["--model", model_folder],
        "on the fly": ["--model", model_folder, "--on-the-fly"],
    }.items():
        args = ["train", place.train, "--output", place.folder / name, "--epochs", "3", "--patience", "3", *options]
        code, out, err = run(capsys, *args, "--json")
        assert code == 0
        tokens[name] = json.loads(out)["llm_tokens"]
        assert ("hidden states" in err) == (name == "once")
        if name == "on the fly":
            assert f"tokens fed to the LLM for the features of the fit: {tokens[name]:,}" in run(capsys, *args)[1]
    assert tokens["store"] == 0 < tokens["once"] < tokens["on the fly"] / 4
    once, again = (SwiftHead.from_pretrained(str(place.folder / name)) for name in ("once", "on the fly"))
    # As in the test of the training itself: float32's rounding, let through a hundredfold.
    torch.testing.assert_close(again.weight, once.weight, rtol=0, atol=1e-3 * float(once.weight.abs().max()))
