"""What heads win, and how sure that is: `swift-kernels eval`, `calibrate` and `report`."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from swift_kernels.cli.app import AllowMismatch, Device, Dtype, Json, app

if TYPE_CHECKING:
    from swift_kernels.evaluation.selectors import Table
    from swift_kernels.evaluation.study import Cost
    from swift_kernels.head import SwiftHead
    from swift_kernels.training.rollouts import Rollout, RolloutFile

Heads = Annotated[list[str], typer.Option("--head", help="A head, for all files; or one for each, in their order.")]
Stores = Annotated[list[Path] | None, typer.Option("--store", help="Activations of each file, in their order.")]
ModelName = Annotated[str | None, typer.Option("--model", help="As for rollout; not needed with --store.")]
BatchSize = Annotated[int, typer.Option(help="Answers a forward.")]


@app.command(name="eval")
def evaluate_(
    rollouts: Annotated[list[Path], typer.Argument(help="Rollouts on problems that the head was not trained on.")],
    head: Heads,
    store: Stores = None,
    model: ModelName = None,
    reward: Annotated[
        list[Path] | None, typer.Option(help="External rewards of each file, as `swift-kernels reward` writes them.")
    ] = None,
    reward_column: Annotated[str, typer.Option(help="Where the lines of --reward have them.")] = "rewards",
    n: Annotated[str | None, typer.Option(help="Numbers of answers to pick from, such as 1,4,16.")] = None,
    output: Annotated[Path | None, typer.Option(help="JSON file for every figure, which `report` draws.")] = None,
    batch_size: BatchSize = 16,
    allow_mismatch: AllowMismatch = False,
    device: Device = None,
    dtype: Dtype = None,
    as_json: Json = False,
) -> None:
    """Compare SWIFT's pick with what needs no head, and with an external reward, alone and combined.

    Also: calibration, abstention, accuracy against N, and, given a head for each of several files, how each head does
    on the tasks of the others. With --store no model runs.
    """
    from swift_kernels import files
    from swift_kernels.cli import render
    from swift_kernels.cli.app import _at_least, _parse_integers
    from swift_kernels.evaluation import study
    from swift_kernels.evaluation.compare import check_ns
    from swift_kernels.evaluation.rewards import read_rewards
    from swift_kernels.files import check_replaceable

    started = time.perf_counter()
    ns = None if n is None else _parse_integers("--n", n)
    _at_least("--batch-size", batch_size, 1)
    _one_each("--head", head, rollouts, or_one=True)
    _one_each("--reward", reward or [], rollouts)
    if reward_column != "rewards" and not reward:
        raise ValueError(f"--reward-column is {reward_column!r}: it says where the lines of --reward have them")
    if output is not None:
        check_replaceable(output, *rollouts, *(reward or []))
    contents = _read(rollouts, store, model)
    for content in contents:
        check_ns(content.rollouts, ns)
        for line in content.notes:
            render.note(line)
    rewards = [read_rewards(path, contents[i].rollouts, reward_column) for i, path in enumerate(reward or [])]
    names = list(dict.fromkeys(head))
    scored = _scores(contents, store, model, names, batch_size, allow_mismatch, device, dtype)
    own = [names.index(head[index if len(head) > 1 else 0]) for index in range(len(contents))]
    named = [content.task or content.path.stem for content in contents]
    labels = [
        f"{name} ({content.path.name})" if named.count(name) > 1 else name
        for name, content in zip(named, contents, strict=True)
    ]
    tasks = []
    with render.progress("evaluation", len(contents)) as update:
        for index, content in enumerate(contents):
            table, cost = scored.tables[own[index]][index], scored.costs[own[index]][index]
            tasks.append(
                study.study_task(
                    scored.items[index],
                    table,
                    task=labels[index],
                    file=content.path.name,
                    head=names[own[index]],
                    cost=cost,
                    rewards=rewards[index] if rewards else None,
                    ns=ns,
                    notes=_seen(content, scored.heads[own[index]]),
                )
            )
            update(index + 1)
    transfer = study.transfer(names, labels, own, scored.items, scored.tables, ns) if len(names) > 1 else None
    result = study.Study(scored.model, tasks, transfer, round(time.perf_counter() - started, 2))
    facts = result.to_dict()
    if output is not None:
        files.write_text(output, json.dumps(facts, indent=1) + "\n")
    parts = [part for found in tasks for part in render.study_parts(found)]
    if transfer is not None:
        parts.append(render.transfer_table(transfer))
    parts.append(render.LEGEND)
    render.emit(facts, as_json, *parts)


@app.command()
def calibrate(
    rollouts: Annotated[Path, typer.Argument(help="Rollouts on problems that the head was not trained on.")],
    head: Annotated[str, typer.Option(help="The head to calibrate.")],
    output: Annotated[Path, typer.Option(help="Folder for the calibrated head.")],
    store: Annotated[Path | None, typer.Option(help="Activations of the rollouts: no model runs.")] = None,
    model: ModelName = None,
    batch_size: BatchSize = 16,
    allow_mismatch: AllowMismatch = False,
    device: Device = None,
    dtype: Dtype = None,
    as_json: Json = False,
) -> None:
    """Make the head's scores log-odds: sigmoid(score) is then the chance that the answer is right.

    Temperature and offset go into the head's reward weights; what it picks stays the same.
    """
    from swift_kernels import checkpoint
    from swift_kernels.cli import render
    from swift_kernels.cli.app import _at_least, _check_head_folder
    from swift_kernels.evaluation.calibration import calibrate as fit
    from swift_kernels.evaluation.calibration import check_mixed
    from swift_kernels.evaluation.wording import calibration_fact

    _at_least("--batch-size", batch_size, 1)
    _check_head_folder(output)
    stores = None if store is None else [store]
    contents = _read([rollouts], stores, model)
    # Before a model runs over all of them.
    check_mixed([candidate.correct for item in contents[0].rollouts for candidate in item.candidates])
    scored = _scores(contents, stores, model, [head], batch_size, allow_mismatch, device, dtype)
    [items], [[scores]] = scored.items, scored.tables
    correct = [[candidate.correct for candidate in item.candidates] for item in items]
    found, _ = fit(scores, correct, [item.key for item in items])
    scaling = found.scaling
    facts_kept = {"task": contents[0].task, "problems": len(items), "keys": _digest(items), "ece": found.after.ece}
    for line in _seen(contents[0], scored.heads[0]):
        render.note(line)
    checkpoint.save(scored.heads[0].calibrated(scaling.temperature, scaling.offset, **facts_kept), output)
    facts = {
        "output": str(output),
        "temperature": scaling.temperature,
        "offset": scaling.offset,
        "ece_before": found.before.ece,
        "ece_after": found.after.ece,
        "problems": len(items),
    }
    render.emit(
        facts,
        as_json,
        f"{output}: sigmoid(score) is P(correct), from {len(items)} problems; of the head's scores before:",
        calibration_fact(found),
    )


class _Scored:
    """Score tables, a list a head, a table a file; and what was read and loaded on the way."""

    def __init__(self, model: str, heads: Sequence[SwiftHead], items: Sequence[Sequence[Rollout]]) -> None:
        self.model = model
        self.heads = heads
        self.items = items
        self.tables: list[list[Table]] = []
        self.costs: list[list[Cost]] = []

    def fill(
        self, what: str, score: Callable[[int, Callable[[int], None]], Sequence[Table]], *, stored: bool
    ) -> _Scored:
        """`score` is told which file, and where to tell how many problems are done, each once a head."""
        from swift_kernels.cli import render

        self.tables = [[] for _ in self.heads]
        self.costs = [[] for _ in self.heads]
        with render.progress("scoring", sum(map(len, self.items)) * len(self.heads)) as update:
            done = 0
            for index, items in enumerate(self.items):
                started = time.perf_counter()
                found = score(index, partial(_tell, update, done))
                # A pass of the model takes what the head does not: it tells nothing of the head.
                seconds = (time.perf_counter() - started) / len(self.heads) if stored else None
                for head, table, tables, costs in zip(self.heads, found, self.tables, self.costs, strict=True):
                    tables.append(table)
                    costs.append(_cost(head, items, what, seconds))
                done += len(items) * len(self.heads)
        return self


def _scores(
    contents: Sequence[RolloutFile],
    store: Sequence[Path] | None,
    model: str | None,
    names: Sequence[str],
    batch_size: int,
    allow_mismatch: bool,
    device: str | None,
    dtype: str | None,
) -> _Scored:
    """Every head's scores of every file's answers, from the stores or by the model."""
    if store:
        if device is not None or dtype is not None:
            raise ValueError("--device and --dtype are for a model that runs: --store has what it had")
        return _scores_from_stores(contents, store, names, allow_mismatch)
    assert model is not None
    from swift_kernels.cli.app import _load_head, _load_model
    from swift_kernels.evaluation.evaluate import score_rollouts
    from swift_kernels.training.rollouts import tokenized
    from swift_kernels.training.train import check_same_model

    lm, tokenizer = _load_model(model, device, dtype)
    heads = [_load_head(name, lm, allow_mismatch) for name in names]
    if not allow_mismatch:
        for content in contents:
            check_same_model(content, lm)
    items = [tokenized(content.rollouts, tokenizer) for content in contents]

    def score(index: int, update: Callable[[int], None]) -> list[Table]:
        own = items[index]
        return [
            score_rollouts(
                lm,
                head,
                own,
                batch_size=batch_size,
                allow_mismatch=allow_mismatch,
                on_progress=partial(_tell, update, done * len(own)),
            )
            for done, head in enumerate(heads)
        ]

    return _Scored(model, heads, items).fill("the pass of the model over the answers apart", score, stored=False)


def _scores_from_stores(
    contents: Sequence[RolloutFile], paths: Sequence[Path], names: Sequence[str], allow_mismatch: bool
) -> _Scored:
    from swift_kernels import checkpoint
    from swift_kernels.training.store import Store
    from swift_kernels.training.stored import check_readable, check_same_answers, score_stored_heads

    heads = [checkpoint.load(name) for name in names]
    stores = [Store(path) for path in paths]
    for store, content in zip(stores, contents, strict=True):
        check_same_answers(store, content)
        for head in heads:
            check_readable(store, head, allow_mismatch=allow_mismatch)
    items = [content.rollouts for content in contents]

    def score(index: int, update: Callable[[int], None]) -> Sequence[Table]:
        return score_stored_heads(stores[index], heads, items[index], lambda done: update(done * len(heads)))

    what = "read from the store" + (f", {len(heads)} heads at once" if len(heads) > 1 else "")
    return _Scored(stores[0].model["name"], heads, items).fill(what, score, stored=True)


def _tell(update: Callable[[int], None], before: int, count: int) -> None:
    update(before + count)


def _cost(head: SwiftHead, items: Sequence[Rollout], what: str, seconds: float | None) -> Cost:
    from swift_kernels.evaluation.study import Cost

    config = head.config
    ids = [candidate.token_ids or [] for item in items for candidate in item.candidates]
    # The span "fed" leaves out the last token; two operations, multiply and add, a weight.
    tokens = sum(max(len(row) - (config.span == "fed"), 0) for row in ids)
    parameters = config.num_outputs * (config.num_features + 1)
    return Cost(f"SWIFT, {what}", parameters, 2 * config.num_outputs * config.num_features * tokens, seconds, len(ids))


def _seen(content: RolloutFile, head: SwiftHead) -> list[str]:
    """Says so where the head was trained on the same side of the same task's split, or calibrated on these problems."""
    split, notes = content.header.get("split"), []
    if content.task is not None and content.task == head.config.task and split != "test":
        notes.append(f"Problems of the split {split!r} of the task that the head was trained on: it may know them")
    if head.config.metrics.get("calibration", {}).get("keys") == _digest(content.rollouts):
        notes.append("The head was calibrated on these very problems: what is said of its P(correct) is too good")
    return notes


def _digest(items: Sequence[Rollout]) -> str:
    return hashlib.sha256("\n".join(sorted(item.key for item in items)).encode()).hexdigest()[:16]


def _read(rollouts: Sequence[Path], store: Sequence[Path] | None, model: str | None) -> list[RolloutFile]:
    from swift_kernels.training.rollouts import read

    _one_each("--store", store or [], rollouts)
    if not store and model is None:
        raise ValueError("--store and --model are both missing: expected stored activations, or the model that runs")
    return [read(path) for path in rollouts]


def _one_each(option: str, given: Sequence[Any], rollouts: Sequence[Path], or_one: bool = False) -> None:
    if given and len(given) != len(rollouts) and not (or_one and len(given) == 1):
        raise ValueError(
            f"{option} is given {len(given)} times for {len(rollouts)} files: expected "
            f"{'one for all, or ' if or_one else ''}one for each, in their order"
        )


@app.command()
def report(
    evaluation: Annotated[Path, typer.Argument(help="JSON file of `swift-kernels eval --output`.")],
    output: Annotated[Path, typer.Option(help="HTML file; or, ending in .md, markdown with its pictures beside it.")],
    ablation: Annotated[
        Path | None, typer.Option(help="JSON file of `swift-kernels ablate --output`, for scaling in problems.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Write one report of an evaluation with all plots; the page opens without a network."""
    from swift_kernels.cli import render
    from swift_kernels.evaluation import report as reports
    from swift_kernels.files import check_replaceable

    if output.suffix not in (".html", ".md"):
        raise ValueError(f"--output {output} ends in {output.suffix!r}: expected .html or .md")
    check_replaceable(output, evaluation, *([] if ablation is None else [ablation]))
    found = reports.read(evaluation)
    scaling = None if ablation is None else reports.read_ablation(ablation)
    write = reports.write_html if output.suffix == ".html" else reports.write_markdown
    write(found, output, scaling)
    facts = {"output": str(output), "tasks": [task.task for task in found.tasks], "bytes": output.stat().st_size}
    render.emit(facts, as_json, f"{output}: {len(found.tasks)} tasks, {output.stat().st_size / 1e3:,.0f} kB")
