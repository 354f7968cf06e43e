"""`swift-kernels inspect`: where a head's weight lies, what each layer knows, and answers token by token."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from swift_kernels.cli.app import AllowMismatch, Device, Dtype, Head, Json, _at_least, _load_head, _load_model, app

if TYPE_CHECKING:
    from rich.table import Table

    from swift_kernels.evaluation.inspection import Inspection, Shown
    from swift_kernels.evaluation.metrics import Estimate
    from swift_kernels.evaluation.probe import Probe
    from swift_kernels.head import SwiftHead
    from swift_kernels.training.rollouts import Rollout
    from swift_kernels.training.store import Store

SHOWN_ENTRIES = 3


@app.command()
def inspect(
    rollouts: Annotated[Path, typer.Argument(help="Graded answers of `swift-kernels rollout`.")],
    head: Head,
    output: Annotated[Path, typer.Option(help="HTML file, which needs no network.")],
    store: Annotated[Path | None, typer.Option(help="Their activations: for the probe of each layer.")] = None,
    model: Annotated[str | None, typer.Option(help="As for rollout: for the answers token by token.")] = None,
    problems: Annotated[str | None, typer.Option(help="Ids of the problems to show, such as 0/4,0/7.")] = None,
    show: Annotated[
        int | None, typer.Option(help="How many to show; 3, the first with right and wrong answers.")
    ] = None,
    folds: Annotated[int, typer.Option(help="Of the probe's cross-validation, by problem.")] = 5,
    dimensions: Annotated[int, typer.Option(help="Principal components that the probe reads.")] = 32,
    pool: Annotated[
        str, typer.Option(help="What it reads of an answer: the mean of its tokens, or the last.")
    ] = "mean",
    batch_size: Annotated[int, typer.Option(help="Answers a forward.")] = 16,
    allow_mismatch: AllowMismatch = False,
    device: Device = None,
    dtype: Dtype = None,
    as_json: Json = False,
) -> None:
    """Show what a head looks at, on one page: its weights, a probe of each layer, and answers token by token.

    The probe needs --store, the tokens need --model. Where the store holds what the head reads, gates and rewards are
    read from it and the model lends its tokenizer alone.
    """
    from swift_kernels import files
    from swift_kernels.cli import render
    from swift_kernels.evaluation import inspection as inspections
    from swift_kernels.evaluation.weights import weight_mass
    from swift_kernels.training.rollouts import read
    from swift_kernels.training.store import Store
    from swift_kernels.training.stored import check_same_answers
    from swift_kernels.training.train import check_same_model

    for option, value, least in (
        ("--folds", folds, 2),
        ("--dimensions", dimensions, 1),
        ("--batch-size", batch_size, 1),
    ):
        _at_least(option, value, least)
    if show is not None:
        _at_least("--show", show, 1)
        if problems is not None:
            raise ValueError("--problems says which problems are shown, --show how many: give one of them")
    files.check_replaceable(output, rollouts)
    content = read(rollouts)
    chosen = (
        inspections.choose_problems(content.rollouts, 3 if show is None else show)
        if problems is None
        else _named(content.rollouts, problems.split(","), rollouts)
    )
    for line in content.notes:
        render.note(line)
    opened = None if store is None else Store(store)
    if opened is not None:
        check_same_answers(opened, content)
    lm = tokenizer = None
    if model is not None:
        lm, tokenizer = _load_model(model, device, dtype)
        if not allow_mismatch:
            check_same_model(content, lm)
    reward_head = _load_head(head, lm, allow_mismatch)
    started = time.perf_counter()
    notes: list[str] = []
    found: Probe | None = None
    deviation = head_auc = None
    readable = False
    if opened is None:
        notes.append("No store of activations was given (--store): layers are not probed.")
    else:
        readable = _readable(opened, reward_head, notes)
        found, spread = _probe(opened, content.rollouts, folds, dimensions, pool)
        if readable:
            deviation = _deviation(opened, reward_head, spread)
            head_auc = _head_auc(opened, reward_head, content.rollouts)
    shown: list[Shown] = []
    source = "by the model"
    if lm is None:
        notes.append("No model was given (--model): answers are not shown token by token.")
    else:
        source = f"from the store ({opened.layout.dtype})" if opened is not None and readable else source
        shown = _traced(lm, tokenizer, reward_head, chosen, opened if readable else None, batch_size, allow_mismatch)
    config = reward_head.config
    inspection = inspections.Inspection(
        facts={
            "Head": head,
            "Reads": _sources(reward_head),
            "Model": (config.base_model or {}).get("name", "unknown"),
            "Trained for": config.task or "unknown",
            "Answers": f"{rollouts}: {len(content.rollouts)} problems, "
            f"{sum(len(item.candidates) for item in content.rollouts)} answers"
            + (f", task {content.task}" if content.task else ""),
        },
        weights=weight_mass(reward_head, deviation),
        scaled=deviation is not None,
        gate=config.gate,
        probe=found,
        head_auc=head_auc,
        shown=shown,
        source=source,
        notes=notes,
    )
    files.write_text(output, inspections.render(inspection))
    seconds = round(time.perf_counter() - started, 1)
    facts = {"output": str(output), "seconds": seconds, **inspection.to_dict()}
    render.emit(facts, as_json, *_tables(inspection), f"{output}: the page, made in {seconds} s")


def _named(rollouts: Sequence[Rollout], ids: Sequence[str], path: Path) -> list[Rollout]:
    by_id = {item.id: item for item in rollouts}
    missing = [name for name in ids if name not in by_id]
    if missing:
        raise ValueError(f"{path} has no problem {missing[0]!r}: expected ids such as {next(iter(by_id))!r}")
    return [by_id[name] for name in dict.fromkeys(ids)]


def _readable(store: Store, head: SwiftHead, notes: list[str]) -> bool:
    from swift_kernels.training.stored import check_same_base, unreadable

    check_same_base(store, head)
    reason = unreadable(store, head)
    if reason is not None:
        notes.append(f"The store is probed, but the head cannot read it: {reason}.")
    return reason is None


def _probe(store: Store, rollouts: Sequence[Rollout], folds: int, dimensions: int, pool: str) -> tuple[Probe, Any]:
    from swift_kernels.cli import render
    from swift_kernels.evaluation.probe import probe_store

    with render.progress("probing layers", len(store.widths)) as update:
        return probe_store(store, rollouts, folds=folds, dimensions=dimensions, pool=pool, on_progress=update)


def _deviation(store: Store, head: SwiftHead, spread: Any) -> Any:
    """Of what the head reads, among that of all that is stored."""
    import torch

    from swift_kernels.training.stored import entries_of

    columns = spread.split(store.widths)
    return torch.cat([columns[entry] for entry in entries_of(store, head)])


def _head_auc(store: Store, head: SwiftHead, rollouts: Sequence[Rollout]) -> Estimate:
    """Within problems, of the head itself."""
    import copy

    from swift_kernels.cli import render
    from swift_kernels.evaluation import metrics
    from swift_kernels.training.stored import score_stored

    with render.progress("scoring stored answers", len(rollouts)) as update:
        scores = score_stored(store, copy.deepcopy(head).cpu(), rollouts, update)
    grades = [[candidate.correct for candidate in item.candidates] for item in rollouts]
    return metrics.estimate([metrics.within_problem_auc(s, c) for s, c in zip(scores, grades, strict=True)])


def _traced(
    model: Any,
    tokenizer: Any,
    head: SwiftHead,
    rollouts: Sequence[Rollout],
    store: Store | None,
    batch_size: int,
    allow_mismatch: bool,
) -> list[Shown]:
    """The problems' answers token by token, read from the store where one is given, else computed by the model."""
    from swift_kernels import features
    from swift_kernels.cli import render
    from swift_kernels.evaluation.inspection import Shown, make_answers
    from swift_kernels.evaluation.traces import token_texts, trace_model, trace_store
    from swift_kernels.features import generating_model
    from swift_kernels.integrations.compatibility import eos_token_ids
    from swift_kernels.training.rollouts import tokenized

    items = tokenized(rollouts, tokenizer)
    with render.progress("tracing answers", len(items)) as update:
        if store is not None:
            traces = trace_store(store, head, items, on_progress=update)
        else:
            traces = trace_model(
                model, head, items, batch_size=batch_size, allow_mismatch=allow_mismatch, on_progress=update
            )
    eos, special = eos_token_ids(generating_model(model)), set(tokenizer.all_special_ids)
    shown = []
    for item, own in zip(items, traces, strict=True):
        ids = [candidate.token_ids or [] for candidate in item.candidates]
        positions = [features.scored_tokens(answer, eos, head.config.span) for answer in ids]
        for place, trace in zip(positions, own, strict=True):
            if len(place) != len(trace.gate_reward):
                raise ValueError(
                    f"problem {item.id!r}: {len(trace.gate_reward)} tokens of an answer are stored, {len(place)} count "
                    "by the model's end-of-sequence tokens: expected the model that wrote the store"
                )
        texts = [token_texts(tokenizer, answer) for answer in ids]
        shown.append(Shown(item, make_answers(item, own, positions, texts, special)))
    return shown


def _sources(head: SwiftHead) -> str:
    config = head.config
    what = config.features if config.layers is None else f"layers {', '.join(map(str, config.layers))}"
    if config.layers is not None and len(config.layers) > SHOWN_ENTRIES:
        every = list(config.layers) == list(range(config.layers[0], config.layers[-1] + 1))
        what = f"layers {config.layers[0]} to {config.layers[-1]}" if every else what
    return f"{what}: {config.num_features:,} features, {'with' if config.gate else 'without'} a gate"


def _tables(inspection: Inspection) -> list[Table | str]:
    """What fits a terminal: the heaviest layers, the best probes, and what was left out."""
    from swift_kernels.cli import render

    heaviest = sorted(inspection.weights, key=lambda own: -own.reward)[:SHOWN_ENTRIES]
    scaled = "scaled by the features' deviation" if inspection.scaled else "as it is"
    parts: list[Table | str] = [
        f"reward weight, {scaled}: " + ", ".join(f"{own.entry} has {100 * own.reward:.1f}%" for own in heaviest)
    ]
    if inspection.probe is not None:
        probe = inspection.probe
        table = render.plain_table(
            f"Probe of {len(probe.entries)} entries, {probe.answers} answers to {probe.problems} problems; the highest"
        )
        for name in ("layer", "AUC", "within problems", "accuracy"):
            table.add_column(name, justify="right", no_wrap=True)
        for own in sorted(probe.entries, key=lambda own: -own.auc.mean)[:SHOWN_ENTRIES]:
            figures = (f"{e.mean:.3f} ({e.low:.3f}-{e.high:.3f})" for e in (own.auc, own.within_auc, own.accuracy))
            table.add_row(str(own.entry), *figures)
        parts += [table, f"always the commoner grade: accuracy {probe.majority:.3f}"]
    if inspection.head_auc is not None:
        auc = inspection.head_auc
        parts.append(f"the head, within problems: AUC {auc.mean:.3f} ({auc.low:.3f}-{auc.high:.3f})")
    return [*parts, *inspection.notes]
