"""What is made from activation stores without an LLM: `swift-kernels ablate` and `swift-kernels sketch`."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from swift_kernels.cli.app import Json, app

if TYPE_CHECKING:
    from rich.table import Table

    from swift_kernels.training.ablation import Ablation

TITLES = {
    "recipe": "Recipes",
    "layers": "Layers",
    "gate": "With and without a gate",
    "loss": "Losses",
    "features": "What the head reads",
    "problems": "Training problems",
}


@app.command()
def ablate(
    rollouts: Annotated[Path, typer.Argument(help="Rollouts of `swift-kernels rollout --store`.")],
    store: Annotated[Path, typer.Option(help="Their activations.")],
    test: Annotated[Path, typer.Option(help="Rollouts on other problems.")],
    test_store: Annotated[Path, typer.Option(help="Their activations.")],
    output: Annotated[Path | None, typer.Option(help="JSON file for every figure.")] = None,
    vary: Annotated[str, typer.Option(help="What differs from the base, each alone.")] = ",".join(TITLES),
    recipe: Annotated[str, typer.Option(help="Of the base: swift, or upstream for the paper's.")] = "swift",
    seeds: Annotated[int, typer.Option(help="Heads of each kind, with another split, order and start.")] = 3,
    epochs: Annotated[int | None, typer.Option(help="At most; by default as the recipe says.")] = None,
    n: Annotated[str | None, typer.Option(help="Numbers of answers to pick from, such as 1,4,16.")] = None,
    as_json: Json = False,
) -> None:
    """Compare ways to make a head: recipes, layers, gate, losses, features, and numbers of training problems.

    All are fitted to one activation store, several seeds each, and evaluated on the test problems. No LLM runs.
    """
    from swift_kernels import files
    from swift_kernels.cli import render
    from swift_kernels.cli.app import _at_least, _parse_integers
    from swift_kernels.training import ablation
    from swift_kernels.training.recipe import get_recipe
    from swift_kernels.training.rollouts import read
    from swift_kernels.training.store import Store
    from swift_kernels.training.stored import check_same_answers, check_same_layout
    from swift_kernels.training.train import check_disjoint

    _at_least("--seeds", seeds, 1)
    if output is not None:
        files.check_replaceable(output, rollouts, test)
    ns = None if n is None else _parse_integers("--n", n)
    base = get_recipe(recipe, epochs=epochs)
    train_file, test_file = read(rollouts), read(test)
    check_disjoint(train_file, test_file)
    stores = Store(store), Store(test_store)
    for file, own in zip((train_file, test_file), stores, strict=True):
        check_same_answers(own, file)
    check_same_layout(*stores)
    variants, notes = ablation.make_variants(stores[0], base, vary.split(","), len(train_file.rollouts))
    for line in notes:
        render.note(line)
    started = time.perf_counter()
    result = ablation.run(
        variants,
        stores[0],
        train_file.rollouts,
        stores[1],
        test_file.rollouts,
        seeds=seeds,
        ns=ns,
        progress=render.progress,
    )
    facts = {
        "rollouts": rollouts.name,
        "test": test.name,
        "model": stores[0].model["name"],
        "task": train_file.task,
        "layout": vars(stores[0].layout),
        "seconds": round(time.perf_counter() - started, 1),
        **result.to_dict(),
    }
    if output is not None:
        files.write_text(output, json.dumps(facts, indent=1) + "\n")
    axes = [axis for axis in TITLES if axis in vary.split(",")]
    render.emit(facts, as_json, baselines_table(result), *(axis_table(result, axis) for axis in axes), legend(result))


@app.command(name="sketch")
def sketch_(
    store: Annotated[Path, typer.Argument(help="A store of `swift-kernels rollout --store` that holds entries whole.")],
    output: Annotated[Path, typer.Option(help="Folder for the copy; an unfinished one is completed.")],
    sketch: Annotated[str, typer.Option(help="Dimensions an entry: random:64, or pca:64.")],
    sketch_of: Annotated[Path | None, typer.Option(help="Sketch whose projections to use, as for test data.")] = None,
    as_json: Json = False,
) -> None:
    """Project each entry of a store to a few dimensions: a small copy that `train` and `ablate` read as they do it.

    A head that is fitted to it reads the model's own hidden states: the projection is folded into its weights.
    """
    from swift_kernels import files
    from swift_kernels.cli import render
    from swift_kernels.training.store import Store
    from swift_kernels.training.stored import copy_sketched

    whole = Store(store)
    with files.alone(output, folder=True), render.progress("shards", len(whole.shards)) as update:
        notes = copy_sketched(whole, output, sketch, sketch_of, update)
    for line in notes:
        render.note(line)
    copy = Store(output)
    facts = {"output": str(output), "tokens": sum(copy.lengths), "bytes": copy.nbytes, "bytes_whole": whole.nbytes}
    render.emit(
        facts,
        as_json,
        f"{output}: {facts['tokens']:,} tokens in {copy.nbytes / 1e6:,.1f} MB, {whole.nbytes / 1e6:,.1f} MB before",
    )


def baselines_table(result: Ablation) -> Table:
    """The base against what needs no head."""
    from swift_kernels.cli import render
    from swift_kernels.evaluation.compare import SELECTOR_NAMES
    from swift_kernels.evaluation.wording import p_value, percent, points

    base = result.results[0]
    *smaller, largest = render.shown_ns(list(base.accuracy))
    table = render.plain_table(f"Best-of-N on {result.test_problems} problems, base recipe and what needs no head")
    table.add_column("picked by", no_wrap=True)
    for n in (*smaller, largest):
        table.add_column(f"N={n}", justify="right", no_wrap=True)
    table.add_column("base is ahead", justify="right", no_wrap=True)
    table.add_column("p", justify="right", no_wrap=True)
    rows = {**result.baselines, "swift": base.accuracy}
    for key in sorted(rows, key=list(SELECTOR_NAMES).index):
        lead = result.leads.get(key)
        table.add_row(
            SELECTOR_NAMES[key],
            *(f"{100 * rows[key][n].mean:.1f}" for n in smaller),
            percent(rows[key][largest]),
            *(() if lead is None else (points(lead), p_value(lead.p))),
        )
    return table


def axis_table(result: Ablation, axis: str) -> Table:
    """The base and the variants along one axis."""
    from swift_kernels.cli import render
    from swift_kernels.evaluation.wording import p_value, percent, points

    table = render.plain_table(TITLES[axis])
    table.add_column("head", no_wrap=True)
    for title in (f"N={max(result.results[0].accuracy)}", "ahead of base", "p", "within-problem AUC"):
        table.add_column(title, justify="right", no_wrap=True)
    for own in result.axis(axis):
        gain = own.difference
        table.add_row(
            own.variant.name,
            percent(own.accuracy[max(own.accuracy)]),
            *(("", "") if gain is None else (points(gain), p_value(gain.p))),
            f"{own.auc.mean:.3f} ({own.auc.low:.3f}-{own.auc.high:.3f})",
        )
    return table


def legend(result: Ablation) -> str:
    recipe = result.results[0].variant.recipe
    return "\n".join(
        [
            f"Base: {recipe.loss}, start {recipe.start}, a gate, every entry of the first source, "
            f"{result.train_problems} problems;",
            f"the others differ in what they are named for. Means over seeds, {result.seeds} of them; 95% intervals",
            "from resampling problems and seeds; p: two-sided sign-flip test over problems for these seeds,",
            "not corrected for making several comparisons",
            *result.notes,
        ]
    )
