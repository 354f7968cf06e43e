"""One pass over the LLM: rollouts and the activations of their tokens, by one process or several, and resumable.

Problems are generated in units of as many as fit a batch. A unit is the same problems in every run, however often it
was interrupted and whoever computes it: what it holds does not depend on that to the last bit. Its shard is written
after its rollouts, and a unit counts as done when it has both: a shard of answers that are in no rollout file here is
another job's, and stays.

One job writes a file or a store at a time: the first of its processes keeps those of other jobs off.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from swift_kernels import features
from swift_kernels.evaluation.tasks import Problem, Task, timeouts
from swift_kernels.files import alone, check_replaceable, replacing
from swift_kernels.fingerprint import fingerprint
from swift_kernels.head import HeadConfig
from swift_kernels.integrations.compatibility import eos_token_ids
from swift_kernels.integrations.shared_prompt import forward_responses
from swift_kernels.processes import Processes
from swift_kernels.progress import Update
from swift_kernels.training import sketch as sketches
from swift_kernels.training import store as stores
from swift_kernels.training.generation import Sampling, check_prompts, generate_together
from swift_kernels.training.recording import Recorder, distinct_places
from swift_kernels.training.rollouts import Rollout, RolloutError, RolloutWriter, read_begun
from swift_kernels.training.sketch import Sketch
from swift_kernels.training.store import Layout, ShardProblem, StoreError, StoreWriter, digest

Notes = Callable[[str], None]


@dataclass(frozen=True)
class Job:
    """What to collect: the answers of a model to a task's problems.

    Attributes:
        header: of the rollout file.
        batch_size: answers decoded at once.
        output: the rollout file.
        store: the folder of the activations, or None.
        layout: what the store keeps.
        sketch_of: another store, whose projections are used instead of new ones.
    """

    model: Any
    tokenizer: Any
    task: Task
    problems: Sequence[Problem]
    sampling: Sampling
    chat: bool
    header: dict[str, Any]
    output: Path
    batch_size: int = 64
    store: Path | None = None
    layout: Layout | None = None
    sketch_of: Path | None = None

    def units(self) -> dict[str, Sequence[Problem]]:
        """The problems that are generated together, by the name of their shard."""
        size = max(1, self.batch_size // self.sampling.n)
        return {f"{start:05d}": self.problems[start : start + size] for start in range(0, len(self.problems), size)}


def collect_rollouts(job: Job, processes: Processes, update: Update, note: Notes) -> int:
    """Generates what is missing of a job; returns how many problems were there before.

    Each process writes a file of its own; the first one puts them together at the end.

    Raises:
        BusyError: another job writes the same file or store.
    """
    with ExitStack() as held:
        if processes.is_first:
            held.enter_context(keeping(job.output))
        # Those of a job that was killed have let go of their files, or the first one has raised.
        processes.wait()
        if not processes.is_first:
            held.enter_context(alone(part_of(job.output, processes.rank)))
        if job.store is not None:
            _check_space(job)
            if processes.is_first:
                held.enter_context(alone(job.store, folder=True))
        return _collect(job, processes, update, note)


@contextmanager
def keeping(output: Path) -> Iterator[None]:
    """Keeps other jobs off a rollout file; raises where one has it, or a process of one is still at work."""
    check_replaceable(output)
    with alone(output):
        for path in _files(output):
            if path != output:
                with alone(path):
                    pass
        yield


@torch.no_grad()
def _collect(job: Job, processes: Processes, update: Update, note: Notes) -> int:
    known = _known(job)
    _check_same(job, known)
    unknown = [problem for problem in job.problems if problem.id not in known]
    check_prompts(job.model, job.tokenizer, job.task, unknown, job.sampling, chat=job.chat)
    given_up = timeouts(job.task)
    store = _open_store(job, known, processes, note)
    stored = {} if store is None else stores.problems_of(store.path)
    missing = {
        name: problems
        for name, problems in job.units().items()
        if any(problem.id not in known or (store is not None and problem.id not in stored) for problem in problems)
    }
    before = len(job.problems) - len(unknown)
    if before and processes.is_first:
        note(f"{job.output}: continuing after {before} problems")
    # Everybody has looked before anybody writes.
    processes.wait()
    done = len(job.problems) - sum(map(len, missing.values()))
    update(done)
    path = job.output if processes.count == 1 else part_of(job.output, processes.rank)
    right = total = 0
    with RolloutWriter(path, job.header) as writer:
        try:
            for name, problems in list(missing.items())[processes.rank :: processes.count]:
                rollouts, recorded = _generate_unit(job, store, name, problems, known, stored, note)
                for rollout in rollouts:
                    if rollout.id not in known:
                        writer.write(rollout)
                    right += sum(candidate.correct for candidate in rollout.candidates)
                    total += len(rollout.candidates)
                if store is not None and recorded:
                    store.write(
                        name, [problem for problem, _ in recorded], [own for _, every in recorded for own in every]
                    )
                done += len(problems) * processes.count
                update(min(done, len(job.problems)), f"{right / total:.0%} right")
        except KeyboardInterrupt:
            held = f"{len(writer.done)} problems are in {path}, the same command continues"
            raise KeyboardInterrupt(held) from None
    if late := timeouts(job.task) - given_up:
        note(f"{job.task.name}: {late} answers took too long to grade: they count as wrong, or as having no answer")
    processes.wait()
    if processes.is_first:
        _put_together(job)
    processes.wait()
    return before


def _generate_unit(
    job: Job,
    store: StoreWriter | None,
    name: str,
    problems: Sequence[Problem],
    known: dict[str, Rollout],
    stored: dict[str, ShardProblem],
    note: Notes,
) -> tuple[list[Rollout], list[tuple[ShardProblem, list[Tensor]]]]:
    """The rollouts of a unit, and what its shard lacks: the problems of it that are in no shard."""
    recorder = None if store is None else Recorder(job.model, store.layout, store.sketch)
    arguments = (job.model, job.tokenizer, job.task, problems, job.sampling)
    rollouts, recorded = generate_together(*arguments, chat=job.chat, recorder=recorder, note=note)
    if store is not None:
        kept = [known.get(rollout.id, rollout) for rollout in rollouts]
        _check_stored(job, kept, stored)
        if [_answers(rollout) for rollout in kept] != [_answers(rollout) for rollout in rollouts]:
            note(f"{job.store}: shard {name} is computed from answers that were generated in other batches")
            recorded = [_teacher_forced(job, store, rollout) for rollout in kept]
        recorded = [(problem, responses) for problem, responses in recorded if problem.id not in stored]
    return rollouts, recorded


def _check_stored(job: Job, rollouts: Sequence[Rollout], stored: dict[str, ShardProblem]) -> None:
    """Raises where a store holds the activations of other answers to one of these problems."""
    for rollout in rollouts:
        if rollout.id in stored and stored[rollout.id].digest != digest(_answers(rollout)):
            raise StoreError(
                f"{job.store} holds the activations of other answers to problem {rollout.id!r} than those of "
                f"{job.output}: continue with the file that it was written with, or give another --store"
            )


def part_of(output: Path, rank: int) -> Path:
    """The file of one of several processes."""
    return output.with_name(f"{output.name}.part{rank}")


def _files(output: Path) -> list[Path]:
    """The rollout file and those of processes that did not come to put them together."""
    part = re.compile(re.escape(output.name) + r"\.part\d+")
    parts = sorted(path for path in output.parent.glob("*.part*") if part.fullmatch(path.name))
    return [path for path in (output, *parts) if path.exists()]


def _known(job: Job) -> dict[str, Rollout]:
    """The rollouts that are there, in whichever file; each file is held against the job's settings."""
    known: dict[str, Rollout] = {}
    for path in _files(job.output):
        known |= {rollout.id: rollout for rollout in read_begun(path, job.header)[0]}
    return known


def _check_same(job: Job, known: dict[str, Rollout]) -> None:
    """Raises where an id stands for another problem than before: those of a local file may be its line numbers."""
    for problem in job.problems:
        rollout = known.get(problem.id)
        if rollout is not None and (rollout.key, rollout.answer) != (problem.key, problem.answer):
            what = "question" if rollout.key != problem.key else "answer"
            raise RolloutError(
                f"{job.output}: {job.task.name}, problem {problem.id!r}, has another {what} than when answered: "
                "continue with the problems as they were, or take another --output"
            )


def _put_together(job: Job) -> None:
    """One file of all rollouts, in the order of the problems; of others that were there before, after them."""
    paths = _files(job.output)
    if paths == [job.output]:
        return
    known = _known(job)
    wanted = [problem.id for problem in job.problems]
    order = dict.fromkeys([*(identity for identity in wanted if identity in known), *known])
    with replacing(job.output) as temporary, RolloutWriter(temporary, job.header) as writer:
        for identity in order:
            writer.write(known[identity])
    for path in paths:
        if path != job.output:
            path.unlink()


def _open_store(job: Job, known: dict[str, Rollout], processes: Processes, note: Notes) -> StoreWriter | None:
    if job.store is None or job.layout is None:
        return None
    model = fingerprint(job.model)
    settings = {key: value for key, value in job.header.items() if key != "model"}
    if processes.is_first:
        # Settings are compared, and files of others found, before anything is computed for the sketch.
        fresh = not (job.store / stores.HEADER_NAME).exists()
        if fresh:
            stores.check_vacant(job.store)
        StoreWriter(job.store, job.layout, model, make_sketch(job) if fresh else None, settings)
        if job.layout.sketch is not None:
            stores.begun_sketch(job.store, job.sketch_of, job.layout)
        for line in stores.drop_damaged(job.store):
            note(line)
        _drop_outgrown(job, known)
    processes.wait()
    sketch = None if job.layout.sketch is None else stores.read_sketch(job.store)
    return StoreWriter(job.store, job.layout, model, sketch, settings)


def _drop_outgrown(job: Job, known: dict[str, Rollout]) -> None:
    """Removes the records of shards whose names are needed for more problems than they hold, which are then made anew.

    Raises:
        StoreError: such a shard holds what this job could not make again, or the store is of other answers.
    """
    assert job.store is not None
    stored = stores.problems_of(job.store)
    _check_stored(job, list(known.values()), stored)
    units = job.units()
    wanted = {problem.id for problem in job.problems}
    shards = {shard.name: shard for shard in stores.shards_of(job.store)}
    outgrown = []
    # What one shard no longer holds, another unit may need.
    while short := [name for name in shards if any(problem.id not in stored for problem in units.get(name, ()))]:
        for shard in map(shards.pop, short):
            if lost := [identity for identity in shard.ids if identity not in known or identity not in wanted]:
                raise StoreError(
                    f"{job.store}: shard {shard.name} holds problem {lost[0]!r}, which is not among those of this run, "
                    f"or not in {job.output}, and would be lost: continue with the file and the problems that it was "
                    "written with, or give another --store"
                )
            outgrown.append(shard.name)
            stored = {identity: problem for identity, problem in stored.items() if identity not in shard.ids}
    for name in outgrown:
        (job.store / f"{name}.json").unlink()


def make_sketch(job: Job) -> Sketch | None:
    """The projections that a layout asks for; a PCA needs the answers to a few problems."""
    layout = job.layout
    if layout is None or layout.sketch is None:
        return None
    if job.sketch_of is not None:
        return stores.sketch_of(job.sketch_of, layout)
    method, dimensions = layout.sketch["method"], layout.sketch["dimensions"]
    if method == "random":
        return sketches.random_sketch(layout.widths, dimensions)
    recorder_layout = replace(layout, sketch=None, dtype="float32")
    values: list[Tensor] = []
    size = max(1, job.batch_size // job.sampling.n)
    pilot = job.problems[: sketches.PILOT_PROBLEMS]
    for start in range(0, len(pilot), size):
        recorder = Recorder(job.model, recorder_layout)
        arguments = (job.model, job.tokenizer, job.task, pilot[start : start + size], job.sampling)
        _, recorded = generate_together(*arguments, chat=job.chat, recorder=recorder)
        values += [response for _, responses in recorded for response in responses]
    return sketches.pca_sketch(torch.cat(values).split(layout.widths, dim=1), dimensions)


def _answers(rollout: Rollout) -> list[list[int]]:
    return [candidate.token_ids or [] for candidate in rollout.candidates]


def _teacher_forced(job: Job, store: StoreWriter, rollout: Rollout) -> tuple[ShardProblem, list[Tensor]]:
    """What a shard holds of answers that are there already: by a second pass over the model."""
    layout, answers = store.layout, _answers(rollout)
    places = distinct_places(answers)
    distinct = list(dict.fromkeys(map(tuple, answers)))
    eos = eos_token_ids(job.model)
    lengths = [len(features.scored_tokens(answer, eos, layout.span)) for answer in distinct]
    values = torch.empty(sum(lengths), sum(layout.stored_widths), dtype=stores.DTYPES[layout.dtype])
    columns = torch.tensor([0, *layout.stored_widths]).cumsum(0).tolist()

    def keep(first: int, rows: Tensor, k: int, entry: Tensor) -> None:
        kept = entry if store.sketch is None else store.sketch.apply(first + k, entry)
        values[rows, columns[first + k] : columns[first + k + 1]] = kept.to(values)

    for source in layout.features:
        config, entries = source_config(layout, source)
        put = functools.partial(keep, entries.start)
        forward_responses(job.model, config, rollout.prompt_token_ids or [], distinct, put)
    return ShardProblem(rollout.id, places, digest(answers)), list(values.split(lengths))


def source_config(layout: Layout, source: str) -> tuple[HeadConfig, slice]:
    """Of a head that reads all entries of one source as the model computes them, and which entries these are."""
    if source == features.HIDDEN_STATES:
        entries = slice(0, len(layout.layers or ()))
        layers, depth = layout.layers, layout.num_hidden_layers
    else:
        entries = slice(layout.entries.index(source), layout.entries.index(source) + 1)
        layers = depth = None
    return HeadConfig(layout.widths[entries], source, layers, depth, span=layout.span), entries


def _check_space(job: Job) -> None:
    """Raises when the largest store that may come of the job does not fit on the disk."""
    assert job.store is not None
    assert job.layout is not None
    tokens, nbytes = largest_store(job)
    there = sum(path.stat().st_size for path in job.store.glob("*.safetensors")) if job.store.is_dir() else 0
    what = f"the activations of {len(job.problems):,} problems, up to {tokens:,} tokens,"
    stores.check_space(job.store, nbytes - there, what)


def largest_store(job: Job) -> tuple[int, int]:
    """The most tokens a job may store, and their bytes: every answer as long as it may be, and no two alike."""
    assert job.layout is not None
    tokens = len(job.problems) * job.sampling.n * job.sampling.max_new_tokens
    return tokens, job.layout.nbytes(tokens)
