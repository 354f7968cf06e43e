"""One job a rollout file and a store: what another job finds there is refused or kept, and nothing of it is lost."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from swift_kernels.evaluation.tasks import JsonlTask, Sums
from swift_kernels.files import BusyError, alone
from swift_kernels.processes import Processes
from swift_kernels.training import collection, generation
from swift_kernels.training.collection import Job
from swift_kernels.training.generation import settings
from swift_kernels.training.rollouts import RolloutError, read
from swift_kernels.training.store import HEADER_NAME, Store, StoreError
from tests import tiny
from tests.training.test_collection import SAYS_WHERE_IT_IS, collect, contents, make_job, rollout_command


def other_output(job: Job, **changes: Any) -> Job:
    """A job that writes into the same store, and its rollouts into another file."""
    job = replace(job, output=job.output.with_name("other.jsonl"), **changes)
    header = settings(job.model, job.task, job.sampling, split="train", chat=job.chat)
    return replace(job, header=header)


class Twins(Sums):
    """The sums under another name."""

    name = "twins"


OTHERS: dict[str, Callable[[Job], Job]] = {
    "seed": lambda job: other_output(job, sampling=replace(job.sampling, seed=6)),
    "n": lambda job: other_output(job, sampling=replace(job.sampling, n=2)),
    "temperature": lambda job: other_output(job, sampling=replace(job.sampling, temperature=0.5)),
    "length": lambda job: other_output(job, sampling=replace(job.sampling, max_new_tokens=4)),
    "task": lambda job: other_output(job, task=Twins()),
    "model": lambda job: other_output(job, model=tiny.model(seed=1)),
}


def without_settings(store: Path) -> None:
    """Makes a store as version 2 wrote it."""
    for path in store.glob("*.json"):
        content = json.loads(path.read_text())
        del content["digest"]
        if path.name == HEADER_NAME:
            content["version"] = 2
            del content["rollouts"], content["sketch"]
        path.write_text(json.dumps(content))


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("change", OTHERS.values(), ids=OTHERS)
def test_rollouts_of_other_settings_are_kept_out_of_a_store(
    model: Any, tokenizer: Any, tmp_path: Path, change: Callable[[Job], Job], version: int
) -> None:
    job = make_job(model, tokenizer, tmp_path, problems=4)
    collect(job)
    if version == 2:
        without_settings(job.store)
    before = contents(job.store)
    # Version 2 does not say how the answers were made: where they come out the same, nothing speaks against them.
    refused = pytest.raises(StoreError, match="made with other settings") if version == 3 else suppress(StoreError)
    with refused:
        collect(change(job))
    assert contents(job.store) == before


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize(("problems", "batch_size"), [(3, 6), (4, 12), (7, 9)], ids=["fewer", "larger batches", "more"])
def test_another_count_or_batch_loses_nothing(
    model: Any, tokenizer: Any, tmp_path: Path, problems: int, batch_size: int, version: int
) -> None:
    job = make_job(model, tokenizer, tmp_path, problems=5)
    collect(job)
    if version == 2:
        without_settings(job.store)
    collect(replace(job, problems=job.task.problems("train", problems), batch_size=batch_size))
    store, rollouts = Store(job.store), read(job.output).rollouts
    assert [rollout.id for rollout in rollouts] == [problem.id for problem in job.task.problems("train", len(rollouts))]
    assert len(rollouts) == max(5, problems)
    for rollout in rollouts:
        store.responses(rollout.id, [candidate.token_ids for candidate in rollout.candidates])


@pytest.mark.parametrize("version", [2, 3])
def test_a_deleted_rollout_file_is_made_again_and_its_store_stays(
    model: Any, tokenizer: Any, tmp_path: Path, version: int
) -> None:
    job = make_job(model, tokenizer, tmp_path, problems=5)
    collect(job)
    if version == 2:
        without_settings(job.store)
    before = contents(tmp_path)
    job.output.unlink()
    collect(job)
    assert contents(tmp_path) == before


def test_a_version_2_store_is_continued(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    job = make_job(model, tokenizer, tmp_path, problems=4)
    collect(job)
    without_settings(job.store)
    collect(replace(job, problems=job.task.problems("train", 8)))
    store = Store(job.store)
    for rollout in read(job.output).rollouts:
        store.responses(rollout.id, [candidate.token_ids for candidate in rollout.candidates])


def test_what_would_be_lost_is_refused(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    """A shard of a problem that this run does not ask for has the name that a unit of it needs."""
    job = make_job(model, tokenizer, tmp_path, problems=3)
    collect(job)
    wanted = job.task.problems("train", 6)
    before = contents(job.store)
    for problems in (wanted[3:], [*wanted[:2], *wanted[3:]]):
        with pytest.raises(StoreError, match=r"shard 0000\d holds problem .*would be lost: continue with"):
            collect(other_output(replace(job, problems=problems)))
        assert contents(job.store) == before


@pytest.mark.parametrize("name", ["00000.safetensors", "model.safetensors", "00002.json", "sketch.safetensors"])
def test_a_folder_with_such_files_of_others_is_left_alone(
    model: Any, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(generation, "decode", lambda *args: pytest.fail("the model ran"))
    job = make_job(model, tokenizer, tmp_path, layers="all", sketch="pca:3")
    job.store.mkdir()
    (job.store / name).write_text("years of work")
    (job.store / ".tmpABCDEF").write_text("of something else")
    before = contents(job.store)
    with pytest.raises(StoreError, match=rf"store holds {name} but no store\.json"):
        collect(job)
    assert contents(job.store) == before


@pytest.mark.parametrize("name", ["rollouts.jsonl.part0.bak", "rollouts.jsonl.part", "my-rollouts.jsonl.part0"])
def test_files_with_names_like_those_of_processes_stay(model: Any, tokenizer: Any, tmp_path: Path, name: str) -> None:
    job = make_job(model, tokenizer, tmp_path, problems=3)
    collect(job)
    (tmp_path / name).write_bytes(job.output.read_bytes())
    collect(job)
    assert (tmp_path / name).read_bytes() == job.output.read_bytes()


def test_a_part_of_something_else_is_refused(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    job = make_job(model, tokenizer, tmp_path, problems=3)
    (tmp_path / "rollouts.jsonl.part0").write_text("years of work")
    with pytest.raises(RolloutError, match=r"part0 holds 13 bytes of something else"):
        collect(job)
    assert (tmp_path / "rollouts.jsonl.part0").read_text() == "years of work"


HELD: dict[str, tuple[str, bool]] = {
    "output": ("rollouts.jsonl", False),
    "store": ("store", True),
    "part of a process": ("rollouts.jsonl.part1", False),
}


@pytest.mark.parametrize("held", HELD.values(), ids=HELD)
def test_what_another_job_writes_is_refused(
    model: Any, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, held: tuple[str, bool]
) -> None:
    job = make_job(model, tokenizer, tmp_path, problems=3)
    collect(job, Processes(1, 2))
    before = contents(tmp_path)
    with monkeypatch.context() as patches:
        patches.setattr(generation, "decode", lambda *args: pytest.fail("the model ran"))
        with (
            alone(tmp_path / held[0], folder=held[1]),
            pytest.raises(BusyError, match=f"{held[0]} is being written by another process"),
        ):
            collect(job)
    assert contents(tmp_path) == before
    collect(job)
    assert len(read(job.output).rollouts) == 3


def test_a_second_command_is_refused_and_the_first_goes_on(tmp_path: Path) -> None:
    """The first one stands still in the middle of its work until the second has ended; then it is killed."""
    model = tiny.save(tmp_path / "model")
    whole, shared = tmp_path / "whole", tmp_path / "shared"
    command = [sys.executable, "-m", "swift_kernels"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    waits = SAYS_WHERE_IT_IS.replace("print(name, flush=True)", "print(name, flush=True), sys.stdin.readline()")
    first = subprocess.Popen(
        [sys.executable, "-c", waits, *rollout_command(model, shared)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=environment,
        text=True,
    )
    assert first.stdin is not None
    assert first.stdout is not None
    for _ in range(2):
        first.stdout.readline()
        first.stdin.write("\n")
        first.stdin.flush()
    first.stdout.readline()
    second = subprocess.run(
        [*command, *rollout_command(model, shared)], capture_output=True, text=True, env=environment
    )
    assert second.returncode == 2
    assert second.stderr == (
        f"swift-kernels: {shared / 'r.jsonl'} is being written by another process: wait until that has ended, or give "
        "another --output or --store\n"
    )
    first.kill()
    first.communicate()
    for folder in (shared, whole):
        subprocess.run([*command, *rollout_command(model, folder)], check=True, capture_output=True, env=environment)
    assert contents(shared) == contents(whole)


PROMPTS: dict[str, tuple[str, int, str]] = {
    "longer than the context": ("x" * 300, 8, "the prompt, with one token of an answer, has 301 tokens"),
    "no room for the answer": ("x" * 100, 200, "the prompt, with 200 of an answer, has 300 tokens"),
}


@pytest.mark.parametrize(("question", "length", "message"), PROMPTS.values(), ids=PROMPTS)
def test_a_prompt_that_does_not_fit_is_named_before_anything_is_generated(
    model: Any,
    tokenizer: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    question: str,
    length: int,
    message: str,
) -> None:
    file = tmp_path / "p.jsonl"
    rows = [{"problem": question if number == 2 else f"{number}+1", "answer": 3} for number in range(4)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    # The instruction alone would nearly fill the context of the tiny model.
    monkeypatch.setattr(JsonlTask, "_INSTRUCTION", "")
    monkeypatch.setattr(generation, "decode", lambda *args: pytest.fail("the model ran"))
    task = JsonlTask(str(file))
    job = make_job(model, tokenizer, tmp_path)
    sampling = replace(job.sampling, max_new_tokens=length)
    job = replace(job, task=task, problems=task.problems("all", None), sampling=sampling)
    with pytest.raises(
        ValueError, match=rf"{file}:3: {message}: LlamaForCausalLM takes at most 256; .*--max-new-tokens"
    ):
        collect(job)
    assert {path.name for path in tmp_path.iterdir()} == {"p.jsonl"}


def test_a_prompt_with_tokens_that_the_model_lacks_is_named(
    model: Any, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = make_job(model, tokenizer, tmp_path)
    monkeypatch.setattr(generation, "encode_prompt", lambda *args, **options: [5, 5000])
    with pytest.raises(ValueError, match=rf"^sums, problem '{job.problems[0].id[0]}.*token id 5000: expected 0\.\."):
        collection.collect_rollouts(job, Processes(), lambda *_: None, print)
