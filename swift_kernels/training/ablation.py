"""What each choice of a head is worth: variants that differ from one base in one thing, fitted side by side.

All of them read one activation store; each is fitted with several seeds and evaluated on problems never seen.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from swift_kernels import features
from swift_kernels.evaluation import metrics
from swift_kernels.evaluation.compare import Comparison, check_ns, compare
from swift_kernels.evaluation.metrics import Difference, Estimate
from swift_kernels.head import SwiftHead
from swift_kernels.progress import Progress
from swift_kernels.training.fit import Example, fit_heads
from swift_kernels.training.losses import LOSSES
from swift_kernels.training.recipe import RECIPES, Recipe
from swift_kernels.training.rollouts import Rollout
from swift_kernels.training.split import NothingToLearnError, split_examples
from swift_kernels.training.store import Store
from swift_kernels.training.stored import entries_of, make_head, responses_of, score_stored_heads

AXES = ("recipe", "layers", "gate", "loss", "features", "problems")
BASE = "base"
FEWEST_PROBLEMS = 25
"""Where the axis of training problems begins; each point has twice as many as the one before."""


@dataclass(frozen=True)
class Variant:
    """One way to make a head.

    Attributes:
        name: what tells it from the base.
        axis: what it varies; the base has none.
        layers: as in `make_head`.
        problems: how many training problems it is given; None, all.
    """

    name: str
    axis: str | None
    recipe: Recipe
    layers: str | tuple[int, ...] = "all"
    gate: bool = True
    problems: int | None = None


@dataclass(frozen=True)
class Result:
    """What became of a variant, over test problems and seeds.

    Attributes:
        accuracy: Best-of-n at each n.
        difference: of the accuracy at the largest n from the base's, paired by problem and seed; None for the base.
        auc, auc_difference: within-problem AUC, likewise.
        epochs: of each seed's head, the one whose weights it has.
    """

    variant: Variant
    accuracy: dict[int, Estimate]
    difference: Difference | None
    auc: Estimate
    auc_difference: Difference | None
    epochs: list[int]


@dataclass(frozen=True)
class Ablation:
    """All variants, the base first, and the selectors without a head on the same problems."""

    results: list[Result]
    baselines: dict[str, dict[int, Estimate]]
    leads: dict[str, Difference]
    seeds: int
    train_problems: int
    test_problems: int
    notes: list[str]

    def axis(self, name: str) -> list[Result]:
        """The base and what differs from it in this."""
        return [result for result in self.results if result.variant.axis in (None, name)]

    def to_dict(self) -> dict[str, Any]:
        """For JSON, which has no NaN."""
        return metrics.without_nan(asdict(self))


def make_variants(store: Store, base: Recipe, axes: Sequence[str], problems: int) -> tuple[list[Variant], list[str]]:
    """The base and its variants along each axis, and notes on what the store has no features for.

    Args:
        axes: some of `AXES`.
        problems: how many there are to train on.
    """
    if unknown := sorted(set(axes).difference(AXES)):
        raise ValueError(f"axis {unknown[0]!r} is unknown: expected some of {', '.join(AXES)}")
    made = [Variant(BASE, None, base)]
    notes = []
    if "recipe" in axes:
        # With as many epochs as the base, which may have been given fewer.
        others = {name: replace(recipe, epochs=base.epochs) for name, recipe in RECIPES.items()}
        made += [Variant(name, "recipe", recipe) for name, recipe in others.items() if recipe != base]
    if "layers" in axes:
        subsets = _layer_subsets(store)
        made += [Variant(name, "layers", base, layers) for name, layers in subsets.items()]
        if not subsets:
            notes.append(f"{store.path} holds too few layers for subsets")
    if "gate" in axes:
        made.append(Variant("no gate", "gate", base, gate=False))
    if "loss" in axes:
        made += [Variant(name, "loss", replace(base, loss=name)) for name in LOSSES if name != base.loss]
    if "features" in axes:
        for source in features.FEATURE_SOURCES:
            if source not in store.layout.features:
                notes.append(f"{store.path} holds no {source}: collect them with `rollout --store-layers`")
            elif source != store.layout.features[0]:
                made.append(Variant(source, "features", base, source))
    if "problems" in axes:
        count = FEWEST_PROBLEMS
        while count < problems:
            made.append(Variant(f"{count} problems", "problems", base, problems=count))
            count *= 2
    return made, notes


def run(
    variants: Sequence[Variant],
    store: Store,
    items: Sequence[Rollout],
    test_store: Store,
    test_items: Sequence[Rollout],
    *,
    seeds: int = 3,
    ns: Sequence[int] | None = None,
    progress: Progress,
) -> Ablation:
    """Fits and evaluates variants, the first of which is the base.

    `items` and `test_items` are the rollouts that the stores were written with. Problems are taken in an order drawn
    by the seed, so that those of a smaller number are among those of a larger one. A variant that has nothing to learn
    from with some seed is left out, with a note.

    Raises:
        NothingToLearnError: the base has nothing to learn from, or no test problem has right and wrong answers.
    """
    check_ns(test_items, ns)
    if not any(len({candidate.correct for candidate in item.candidates}) == 2 for item in test_items):
        raise NothingToLearnError(
            f"none of the {len(test_items)} test problems has right and wrong answers: no head can be told from another"
        )
    responses = responses_of(store, items)

    def examples_of(problems: int | None, seed: int) -> list[Example]:
        order = list(range(len(items)))
        random.Random(seed).shuffle(order)
        return [
            Example(response, candidate.correct, items[place].key)
            for place in order[:problems]
            for candidate, response in zip(items[place].candidates, responses[place], strict=True)
            if store.lengths[response]
        ]

    variants, notes = _learnable(variants, examples_of, seeds)
    heads: list[list[SwiftHead]] = [[] for _ in variants]
    epochs: list[list[int]] = [[] for _ in variants]
    plans: dict[tuple[str, int | None], list[int]] = {}
    for index, variant in enumerate(variants):
        source = make_head(store, variant.layers).config.features
        plans.setdefault((source, variant.problems), []).append(index)
    with progress("fits", len(variants) * seeds) as update:
        done = 0
        for seed in range(seeds):
            for (source, problems), members in plans.items():
                own = [make_head(store, variants[index].layers, variants[index].gate) for index in members]
                everything = make_head(store, source)
                fits = fit_heads(
                    own,
                    store.part(entries_of(store, everything)),
                    examples_of(problems, seed),
                    [replace(variants[index].recipe, seed=seed) for index in members],
                    layers=everything.config.layers,
                )
                for index, head, fit in zip(members, own, fits, strict=True):
                    heads[index].append(head)
                    epochs[index].append(fit.kept.number)
                done += len(members)
                update(done)
    tables: dict[tuple[int, int], list[list[float]]] = {}
    with progress("test", len({source for source, _ in plans}) * len(test_items)) as update:
        done = 0
        for source in dict.fromkeys(source for source, _ in plans):
            cells = [
                (index, seed)
                for (own_source, _), members in plans.items()
                if own_source == source
                for index in members
                for seed in range(seeds)
            ]
            scored = score_stored_heads(test_store, [heads[index][seed] for index, seed in cells], test_items)
            tables |= dict(zip(cells, scored, strict=True))
            done += len(test_items)
            update(done)
    compared = compare(test_items, {f"{index}/{seed}": table for (index, seed), table in tables.items()}, ns)
    return _summary(variants, seeds, compared, epochs, len(items), notes)


def _learnable(
    variants: Sequence[Variant], examples_of: Callable[[int | None, int], list[Example]], seeds: int
) -> tuple[list[Variant], list[str]]:
    """Those variants that have something to learn from with every seed, and notes on the others."""
    kept, notes = [], []
    for variant in variants:
        for seed in range(seeds):
            try:
                split_examples(examples_of(variant.problems, seed), replace(variant.recipe, seed=seed))
            except NothingToLearnError as error:
                if variant.axis is None:
                    raise
                notes.append(f"{variant.name} is left out: with seed {seed}, {error}")
                break
        else:
            kept.append(variant)
    return kept, notes


def _summary(
    variants: Sequence[Variant],
    seeds: int,
    compared: Comparison,
    epochs: Sequence[Sequence[int]],
    problems: int,
    notes: Sequence[str],
) -> Ablation:
    def won(index: int, n: int) -> list[list[float]]:
        return [compared.values[n][f"{index}/{seed}"] for seed in range(seeds)]

    aucs = [[compared.aucs(f"{index}/{seed}") for seed in range(seeds)] for index in range(len(variants))]
    heads = {f"{index}/{seed}" for index in range(len(variants)) for seed in range(seeds)}
    others = [name for name in compared.selectors if name not in heads]
    last = compared.n
    results = [
        Result(
            variant,
            {n: metrics.estimate_runs(won(index, n)) for n in compared.values},
            metrics.difference_runs(won(index, last), won(0, last)) if index else None,
            metrics.estimate_runs(aucs[index]),
            metrics.difference_runs(aucs[index], aucs[0]) if index else None,
            list(epochs[index]),
        )
        for index, variant in enumerate(variants)
    ]
    return Ablation(
        results,
        {name: {n: compared.accuracy(name, n) for n in compared.values} for name in others},
        {
            name: metrics.difference_runs(won(0, last), [compared.values[last][name]] * seeds)
            for name in others
            if name != "oracle"
        },
        seeds,
        problems,
        len(compared.correct),
        [*notes, *compared.notes],
    )


def _layer_subsets(store: Store) -> dict[str, tuple[int, ...]]:
    """By name; of those that the store does not hold whole, and of depths that make no such choice, none."""
    stored, depth = store.layout.layers or (), store.layout.num_hidden_layers or 0
    subsets = {
        # 16, 24, 28, 32 of 32 in the paper.
        "paper's four": tuple(math.ceil(depth * share) for share in (1 / 2, 3 / 4, 7 / 8, 1)),
        "last four": tuple(range(depth - 3, depth + 1)),
        "last": (depth,),
        "middle": (depth // 2,),
        "first half": tuple(range(depth // 2 + 1)),
    }
    return {
        f"{name}: {','.join(map(str, layers))}" if len(layers) < 5 else f"{name}: {layers[0]}..{layers[-1]}": layers
        for name, layers in subsets.items()
        if depth > 3 and len(set(layers)) == len(layers) and set(layers) <= set(stored) and layers != stored
    }
