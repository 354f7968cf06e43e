"""Rollouts and their store in one pass: what is stored, and that neither interruptions nor processes change it."""

from __future__ import annotations

import functools
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from swift_kernels import files
from swift_kernels.evaluation.tasks import Problem, Sums
from swift_kernels.integrations.shared_prompt import forward_responses
from swift_kernels.processes import Processes
from swift_kernels.training import collection, generation
from swift_kernels.training import sketch as sketch_module
from swift_kernels.training import store as stores
from swift_kernels.training.collection import Job, collect_rollouts
from swift_kernels.training.generation import Sampling, settings
from swift_kernels.training.rollouts import RolloutError, read
from swift_kernels.training.sketch import Sketch
from swift_kernels.training.store import Store, StoreError, make_layout
from tests import tiny

SAMPLING = Sampling(n=3, max_new_tokens=8, seed=5)
LAYOUTS: dict[str, dict[str, Any]] = {
    "hidden states": {"layers": "all", "dtype": "float32"},
    "bfloat16, two layers": {"layers": [0, -1]},
    "logits": {"layers": "logits", "dtype": "float32"},
    "top_logprobs": {"layers": "top_logprobs", "dtype": "float32"},
    "random sketch": {"layers": "all", "dtype": "float32", "sketch": "random:4"},
    "pca": {"layers": "all", "dtype": "float32", "sketch": "pca:4"},
    "all sources": {"layers": ["all", "logits", "top_logprobs"], "dtype": "float32"},
    "all sources, pca": {"layers": [1, "top_logprobs", "logits"], "dtype": "float32", "sketch": "pca:30"},
}


def make_job(model: Any, tokenizer: Any, folder: Path, problems: int = 7, **layout: Any) -> Job:
    task = Sums()
    return Job(
        model,
        tokenizer,
        task,
        task.problems("train", problems),
        SAMPLING,
        False,
        settings(model, task, SAMPLING, split="train", chat=False),
        folder / "rollouts.jsonl",
        batch_size=6,
        store=folder / "store",
        layout=make_layout(model, **(layout or {"layers": "all"})),
    )


def collect(job: Job, processes: Processes | None = None) -> list[str]:
    notes: list[str] = []
    collect_rollouts(job, processes or Processes(), lambda *_: None, notes.append)
    return notes


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_the_store_holds_what_a_second_pass_computes(model: Any, tokenizer: Any, tmp_path: Path, layout: Any) -> None:
    job = make_job(model, tokenizer, tmp_path, **layout)
    collect(job)
    store = Store(job.store)
    assert store.layout == job.layout
    rollouts = read(job.output).rollouts
    assert [rollout.id for rollout in rollouts] == [problem.id for problem in job.problems]
    for rollout in rollouts:
        answers = [candidate.token_ids for candidate in rollout.candidates]
        expected: dict[int, torch.Tensor] = {}

        def keep(first: int, rows: torch.Tensor, k: int, entry: torch.Tensor, expected: Any = expected) -> None:
            kept = entry if store.sketch is None else store.sketch.apply(first + k, entry)
            expected.setdefault(first + k, torch.zeros(200, kept.shape[1]))[rows] = kept

        for source in store.layout.features:
            config, entries = collection.source_config(store.layout, source)
            put = functools.partial(keep, entries.start)
            cu_seqlens = forward_responses(model, config, rollout.prompt_token_ids, answers, put)
        values, stored_lengths = store.batch(torch.tensor(store.responses(rollout.id, answers)))
        assert stored_lengths.tolist() == cu_seqlens.tolist()
        # A step and a pass over the whole answer differ by float32's rounding; bfloat16 stores 8 bits.
        tolerance = 1e-2 if store.layout.dtype == "bfloat16" else 1e-4
        assert len(values) == len(expected)
        for k, entry in enumerate(values):
            torch.testing.assert_close(
                entry.float(), expected[k][: int(cu_seqlens[-1])], rtol=tolerance, atol=tolerance
            )


def test_equal_answers_are_stored_once(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    job = replace(make_job(model, tokenizer, tmp_path), sampling=replace(SAMPLING, temperature=1e-4))
    collect(job)
    store = Store(job.store)
    rollouts = read(job.output).rollouts
    assert all(len({tuple(c.token_ids) for c in rollout.candidates}) == 1 for rollout in rollouts)
    assert len(store.lengths) == len(rollouts)
    for rollout in rollouts:
        assert len(set(store.responses(rollout.id, [c.token_ids for c in rollout.candidates]))) == 1


def test_confidence_is_that_of_the_models_own_distribution(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    job = replace(make_job(model, tokenizer, tmp_path), sampling=replace(SAMPLING, temperature=0.5, top_p=0.8))
    collect(job)
    for rollout in read(job.output).rollouts:
        for candidate in rollout.candidates:
            ids = torch.tensor([[*rollout.prompt_token_ids, *candidate.token_ids]])
            with torch.no_grad():
                logits = model(ids).logits[0, len(rollout.prompt_token_ids) - 1 : -1].double()
            logprobs = logits.log_softmax(-1)
            uniform = torch.full_like(logprobs, -torch.tensor(float(logits.shape[-1])).log())
            expected = (
                logprobs.gather(1, torch.tensor(candidate.token_ids)[:, None])[:, 0],
                torch.distributions.Categorical(logits=logits).entropy(),
                (uniform.exp() * (uniform - logprobs)).sum(-1),
            )
            found = candidate.confidence
            for values, wanted in zip((found.logprobs, found.entropies, found.self_certainties), expected, strict=True):
                # Five digits are kept of what float32 computed.
                torch.testing.assert_close(torch.tensor(values).double(), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("stage", ["before a shard", "before its rollouts", "between rollouts"])
def test_an_interrupted_run_ends_as_one_that_was_not(
    model: Any, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    whole, broken = (make_job(model, tokenizer, tmp_path / name) for name in ("whole", "broken"))
    collect(whole)
    for allowed in (1, 2, 0):
        with monkeypatch.context() as patches:
            owner, name = {
                "before a shard": (collection, "generate_together"),
                "before its rollouts": (collection.StoreWriter, "write"),
                "between rollouts": (collection.RolloutWriter, "write"),
            }[stage]
            calls = iter(range(allowed))
            original = getattr(owner, name)

            def interrupted(*args: Any, calls: Any = calls, original: Any = original, **kwargs: Any) -> Any:
                if next(calls, None) is None:
                    raise KeyboardInterrupt
                return original(*args, **kwargs)

            patches.setattr(owner, name, interrupted)
            with pytest.raises(KeyboardInterrupt):
                collect(broken)
    collect(broken)
    assert contents(broken.output.parent) == contents(whole.output.parent)


WRITES_SHARDS_OF_AT_MOST_1000_BYTES = """
import resource, signal, sys, torch
from swift_kernels.training.store import Layout, ShardProblem, StoreWriter
writer = StoreWriter(sys.argv[1], Layout(("hidden_states",), (16,), (0,), 2), {"name": "tiny"})
signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
writer.write("00000", [ShardProblem("a", [0], "")], [torch.zeros(2, 16)])
writer.write("00002", [ShardProblem("b", [0], "")], [torch.zeros(100, 16)])
"""


def test_killed_while_it_writes_a_shard_leaves_only_what_the_next_run_removes(tmp_path: Path) -> None:
    command = [sys.executable, "-c", WRITES_SHARDS_OF_AT_MOST_1000_BYTES, str(tmp_path)]
    assert subprocess.run(command).returncode == -signal.SIGXFSZ
    whole = {tmp_path / name for name in ("store.json", "00000.safetensors", "00000.json")}
    assert set(tmp_path.iterdir()) > whole
    for name in (".important.tmp", ".tmp.of.mine"):
        (tmp_path / name).touch()
    (tmp_path / ".tmpfolder").mkdir()
    whole |= {tmp_path / name for name in (".important.tmp", ".tmp.of.mine", ".tmpfolder")}
    assert stores.drop_damaged(tmp_path) == []
    assert set(tmp_path.iterdir()) == whole


@pytest.mark.parametrize("damage", ["truncated", "flipped", "missing", "record"])
def test_a_damaged_shard_is_named_and_made_anew_alone(
    model: Any, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    job = make_job(model, tokenizer, tmp_path)
    collect(job)
    before = contents(tmp_path)
    shard = job.store / "00002.safetensors"
    if damage == "truncated":
        os.truncate(shard, 400)
    elif damage == "flipped":
        data = bytearray(shard.read_bytes())
        data[-9] ^= 1
        shard.write_bytes(data)
    elif damage == "missing":
        shard.unlink()
    else:
        shard.with_suffix(".json").unlink()
    if damage != "record":
        with pytest.raises(StoreError, match=r"00002\.safetensors .*makes this shard anew"):
            Store(job.store)
    generated = []
    original = collection.generate_together
    monkeypatch.setattr(
        collection, "generate_together", lambda *a, **k: generated.append(len(a[3])) or original(*a, **k)
    )
    notes = collect(job)
    assert generated == [2], "the problems of one shard"
    assert damage == "record" or "00002.safetensors" in notes[0]
    assert contents(tmp_path) == before


def test_more_problems_continue_a_run_whose_last_shard_was_not_full(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    collect(make_job(model, tokenizer, tmp_path, problems=3))
    first = read(tmp_path / "rollouts.jsonl").rollouts
    job = make_job(model, tokenizer, tmp_path, problems=6)
    collect(job)
    rollouts = read(job.output).rollouts
    assert rollouts[:3] == first
    assert [rollout.id for rollout in rollouts] == [problem.id for problem in job.problems]
    store = Store(job.store)
    for rollout in rollouts:
        store.responses(rollout.id, [candidate.token_ids for candidate in rollout.candidates])


def test_answers_of_other_batches_are_stored_by_a_second_pass(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    job = make_job(model, tokenizer, tmp_path, layers="all", dtype="float32")
    collect(replace(job, store=None, layout=None))
    lines = job.output.read_text().splitlines()
    # As if another machine's rounding had sampled otherwise.
    for name, value in {"token_ids": 9, "logprobs": -1, "entropies": 1, "self_certainties": 1}.items():
        lines = [line.replace(f'"{name}":[', f'"{name}":[{value},', 1) for line in lines]
    job.output.write_text("\n".join(lines) + "\n")
    notes = collect(job)
    assert "generated in other batches" in notes[1]
    store = Store(job.store)
    for rollout in read(job.output).rollouts:
        places = store.responses(rollout.id, [candidate.token_ids for candidate in rollout.candidates])
        assert all(store.lengths[place] for place in places)


def test_processes_share_the_work_and_agree(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    alone = make_job(model, tokenizer, tmp_path / "alone")
    collect(alone)
    barrier = threading.Barrier(2)

    # Threads in place of processes, with a model each: taps are on the model.
    jobs = [make_job(tiny.model(), tokenizer, tmp_path / "shared") for _ in range(2)]

    def process(rank: int) -> None:
        collect(jobs[rank], Processes(rank, 2, lambda: barrier.wait(300) and None))

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(process, range(2)))
    assert contents(tmp_path / "shared") == contents(tmp_path / "alone")


def test_what_processes_left_behind_is_continued_by_one(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    alone, shared = (make_job(model, tokenizer, tmp_path / name) for name in ("alone", "shared"))
    collect(alone)
    collect(shared, Processes(1, 2))
    assert collection.part_of(shared.output, 1).exists()
    collect(shared)
    assert contents(shared.output.parent) == contents(alone.output.parent)


def test_other_settings_are_refused_and_nothing_changes(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    job = make_job(model, tokenizer, tmp_path)
    collect(job)
    before = contents(tmp_path)
    with pytest.raises(StoreError, match="made with other settings: layout"):
        collect(make_job(model, tokenizer, tmp_path, layers=[1]))
    with pytest.raises(StoreError, match="made with other settings: model"):
        collect(replace(job, model=tiny.model(seed=1)))
    assert contents(tmp_path) == before


def test_a_store_larger_than_the_disk_is_refused_before_the_model_runs(
    model: Any, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = make_job(model, tokenizer, tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    monkeypatch.setattr(generation, "decode", lambda *args: pytest.fail("the model ran"))
    with pytest.raises(StoreError, match=r"7 problems, up to 168 tokens, take up to 0\.0 GB"):
        collect(job)
    assert not list(tmp_path.iterdir())


def test_the_sketch_is_made_from_a_pilot_once(
    model: Any, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sketch_module, "PILOT_PROBLEMS", 4)
    job = make_job(model, tokenizer, tmp_path, layers="all", sketch="pca:3")
    collect(job)
    sketch = Sketch.load(job.store / "sketch.safetensors")
    assert sketch.widths == (3,) * 3
    monkeypatch.setattr(collection, "make_sketch", lambda job: pytest.fail("made again"))
    collect(job)


@pytest.mark.parametrize(
    ("sketch", "message"),
    [("pca", "expected random:K or pca:K, K from 1 to 16"), ("pca:17", "K from 1 to 16"), ("cut:3", "'cut:3'")],
    ids=["no dimensions", "too many", "unknown"],
)
def test_bad_sketches_are_refused(model: Any, sketch: str, message: str) -> None:
    with pytest.raises(StoreError, match=message):
        make_layout(model, "all", sketch=sketch)


def rollout_command(model: Path, folder: Path) -> list[str]:
    arguments = ["rollout", "--model", str(model), "--task", "sums", "--problems", "8", "--n", "2"]
    arguments += ["--max-new-tokens", "4", "--batch-size", "4", "--device", "cpu"]
    return [*arguments, "--output", str(folder / "r.jsonl"), "--store", str(folder / "store")]


def by_two_processes(folder: Path, arguments: list[str]) -> list[str]:
    """The command that runs `swift-kernels` in two processes of one job, each of which says which one it is."""
    script = folder / "job.py"
    script.write_text(
        "import os, sys\nfrom swift_kernels.cli import main\n"
        "print('process', os.environ['RANK'], 'of', os.environ['WORLD_SIZE'], flush=True)\n"
        f"sys.exit(main({arguments!r}))\n"
    )
    # `accelerate launch` starts several processes on GPUs alone; these say who they are in the same way.
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return [*launcher, str(script)]


@pytest.mark.slow
def test_two_processes_of_one_job_write_what_one_writes(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    model = tiny.save(tmp_path / "model")
    alone, shared = tmp_path / "alone", tmp_path / "shared"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for command in (
        [sys.executable, "-m", "swift_kernels", *rollout_command(model, alone)],
        by_two_processes(tmp_path, rollout_command(model, shared)),
    ):
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("8 problems, 16 answers") == 1
    assert {"process 0 of 2", "process 1 of 2"} <= set(done.stdout.splitlines())
    assert contents(shared) == contents(alone)


@pytest.mark.slow
def test_two_processes_of_another_job_are_refused(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    model, shared = tiny.save(tmp_path / "model"), tmp_path / "shared"
    command = by_two_processes(tmp_path, rollout_command(model, shared))
    with files.alone(shared / "r.jsonl"):
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert done.returncode != 0
        assert f"{shared / 'r.jsonl'} is being written by another process" in done.stderr
        assert [path.name for path in shared.iterdir() if not path.name.startswith(".")] == []


SAYS_WHERE_IT_IS = """
import sys
from swift_kernels.cli import main
from swift_kernels.training import collection

def tell(owner, name):
    original = getattr(owner, name)
    def told(*arguments, **options):
        print(name, flush=True)
        return original(*arguments, **options)
    setattr(owner, name, told)

tell(collection, "generate_together")
tell(collection.StoreWriter, "write")
tell(collection.RolloutWriter, "write")
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_killed_ten_times_it_ends_as_if_it_had_not_been(tmp_path: Path) -> None:
    model = tiny.save(tmp_path / "model")
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    run = [sys.executable, "-m", "swift_kernels"]
    subprocess.run([*run, *rollout_command(model, whole)], check=True, capture_output=True)
    chance = random.Random(0)
    for _ in range(10):
        process = subprocess.Popen(
            [sys.executable, "-c", SAYS_WHERE_IT_IS, *rollout_command(model, killed)],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        assert process.stdout is not None
        for _ in range(chance.randrange(1, 5)):
            process.stdout.readline()
        process.kill()
        process.wait()
        process.stdout.close()
    subprocess.run([*run, *rollout_command(model, killed)], check=True, capture_output=True)
    assert contents(killed) == contents(whole)


def test_other_batches_on_the_way_leave_every_problem_in_one_shard(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    job = make_job(model, tokenizer, tmp_path, 5)
    collect(job)
    more = replace(job, problems=job.task.problems("train", 9), batch_size=9)
    collect(more)
    store = Store(job.store)
    ids = [problem.id for shard in store.shards for problem in shard.problems]
    assert sorted(ids) == sorted(problem.id for problem in more.problems)


def test_a_begun_store_keeps_its_projections(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    first = make_job(model, tokenizer, tmp_path / "first", 6, layers="all", sketch="pca:3")
    second = make_job(model, tokenizer, tmp_path / "second", 3, layers="all", sketch="pca:3")
    collect(first)
    collect(second)
    with pytest.raises(StoreError, match="was begun with other projections"):
        collect(replace(second, sketch_of=first.store))


@pytest.mark.parametrize(("changed", "what"), [({"key": "8+9"}, "question"), ({"answer": "99"}, "answer")])
def test_other_problems_of_the_same_ids_are_not_mixed_in(
    model: Any, tokenizer: Any, tmp_path: Path, changed: dict[str, str], what: str
) -> None:
    job = make_job(model, tokenizer, tmp_path, 5)
    collect(replace(job, problems=job.problems[:4]))
    before = contents(tmp_path)
    other = [*job.problems[:2], replace(job.problems[2], **changed), *job.problems[3:]]
    with pytest.raises(RolloutError, match=re.escape(f"sums, problem {job.problems[2].id!r}, has another {what} than")):
        collect(replace(job, problems=other))
    assert contents(tmp_path) == before
    collect(replace(job, problems=[*job.problems[:4], replace(job.problems[4], **changed)]))


class Late(Sums):
    """Its grader gives up on some answers."""

    timeouts = 0

    def grade(self, text: str, problem: Problem) -> bool:
        self.timeouts += problem.id == self.late
        return False

    late = ""


def test_answers_given_up_for_the_time_limit_are_noted(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    job = replace(make_job(model, tokenizer, tmp_path, 3), task=Late(), store=None, layout=None)
    job.task.timeouts, job.task.late = 7, job.problems[1].id  # type: ignore[attr-defined]
    notes = collect(job)
    assert notes == ["sums: 3 answers took too long to grade: they count as wrong, or as having no answer"]
    assert not any("too long" in note for note in collect(job))
