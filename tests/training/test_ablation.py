"""The ablation: every head of it is the one that a fit of its own makes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("typer")

from swift_kernels.cli import main
from swift_kernels.evaluation.evaluate import evaluate
from swift_kernels.training import ablation
from swift_kernels.training.ablation import Variant
from swift_kernels.training.fit import Example, fit
from swift_kernels.training.recipe import RECIPES, Recipe
from swift_kernels.training.rollouts import RolloutFile, RolloutWriter
from swift_kernels.training.split import NothingToLearnError
from swift_kernels.training.stored import make_head, responses_of, score_stored
from tests.training.test_collection import make_job
from tests.training.test_stored import collected, graded, quiet

BASE = Recipe(epochs=3, learning_rate=1e-3)
SOURCES = {"layers": ["all", "logits", "top_logprobs"], "dtype": "float32"}


@pytest.fixture(scope="module")
def data(model: Any, tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, ...]:
    """Store and rollouts to train on, and to test on."""
    folder = tmp_path_factory.mktemp("ablation")
    store, rollouts = collected(make_job(model, tokenizer, folder / "train", 30, **SOURCES))
    job = make_job(model, tokenizer, folder / "test", **SOURCES)
    test_store, test = collected(replace(job, problems=job.task.problems("test", 9)))
    return store, graded(rollouts), test_store, graded(test)


def names(variants: list[Variant]) -> dict[str, list[str]]:
    axes = dict.fromkeys(variant.axis for variant in variants)
    return {str(axis): [variant.name for variant in variants if variant.axis == axis] for axis in axes}


def test_variants_are_those_of_the_paper(data: tuple[Any, ...]) -> None:
    variants, notes = ablation.make_variants(data[0], RECIPES["swift"], ablation.AXES, 120)
    assert names(variants) == {
        "None": ["base"],
        "recipe": ["upstream"],
        "gate": ["no gate"],
        "loss": ["bce", "hinge", "infonca", "nca"],
        "features": ["logits", "top_logprobs"],
        "problems": ["25 problems", "50 problems", "100 problems"],
    }
    assert ["too few layers" in note for note in notes] == [True]


def test_subsets_of_layers_are_those_that_are_stored() -> None:
    layout = SimpleNamespace(layers=tuple(range(33)), num_hidden_layers=32)
    store: Any = SimpleNamespace(layout=layout)
    assert list(ablation._layer_subsets(store).values()) == [
        (16, 24, 28, 32),
        (29, 30, 31, 32),
        (32,),
        (16,),
        tuple(range(17)),
    ]
    layout.layers, layout.num_hidden_layers = tuple(range(6)), 5
    assert all(len(set(layers)) == len(layers) for layers in ablation._layer_subsets(store).values())
    layout.layers, layout.num_hidden_layers = (16, 24, 28, 32), 32
    assert list(ablation._layer_subsets(store)) == ["last: 32", "middle: 16"]


def test_what_is_not_stored_is_noted(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    store, _ = collected(make_job(model, tokenizer, tmp_path, layers=[0, 2]))
    variants, notes = ablation.make_variants(store, BASE, ["features"], 9)
    assert [variant.name for variant in variants] == ["base"]
    assert ["logits" in notes[0], "top_logprobs" in notes[1]] == [True, True]


def test_a_variant_is_a_fit_of_its_own(data: tuple[Any, ...]) -> None:
    store, rollouts, test_store, test = data
    variants = [
        Variant("base", None, BASE),
        Variant("two layers", "layers", BASE, (0, 2), gate=False),
        Variant("logits", "features", BASE, "logits"),
    ]
    result = ablation.run(
        variants, store, rollouts.rollouts, test_store, test.rollouts, seeds=2, ns=[1, 3], progress=quiet
    )
    examples = [
        Example(response, candidate.correct, item.key)
        for item, responses in zip(rollouts.rollouts, responses_of(store, rollouts.rollouts), strict=True)
        for candidate, response in zip(item.candidates, responses, strict=True)
        if store.lengths[response]
    ]
    for variant, own in zip(variants, result.results, strict=True):
        assert own.variant is variant
        assert (own.difference is None) == (variant.axis is None)
        alone = []
        for seed in range(2):
            head = make_head(store, variant.layers, variant.gate)
            part = store.part([store.layout.entries.index(name) for name in head.config.layers or ("logits",)])
            fit(head, part, examples, replace(variant.recipe, seed=seed))
            alone.append(evaluate(test.rollouts, score_stored(test_store, head, test.rollouts), [1, 3]))
        assert own.auc.mean == pytest.approx(sum(each.auc.mean for each in alone) / 2, abs=1e-9)
        for n in (1, 3):
            mean = sum(each.accuracy[n]["swift"].mean for each in alone) / 2
            assert own.accuracy[n].mean == pytest.approx(mean, abs=1e-9)
    assert result.baselines["oracle"][3].mean == 1
    assert {"random", "vote", "length", "longest", "logprob", "self_certainty"} == set(result.leads)


def test_fewer_problems_are_among_more(data: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    store, rollouts, test_store, test = data
    seen: dict[tuple[int, int], set[str]] = {}
    real = ablation.fit_heads

    def watch(heads: Any, part: Any, examples: Any, recipes: Any, **options: Any) -> Any:
        keys = {example.key for example in examples}
        seen[recipes[0].seed, len(keys)] = keys
        return real(heads, part, examples, recipes, **options)

    monkeypatch.setattr(ablation, "fit_heads", watch)
    variants = [Variant("base", None, BASE), *(Variant(str(k), "problems", BASE, problems=k) for k in (6, 12))]
    ablation.run(variants, store, rollouts.rollouts, test_store, test.rollouts, seeds=2, progress=quiet)
    assert sorted(seen) == [(seed, count) for seed in (0, 1) for count in (6, 12, 30)]
    for seed in (0, 1):
        assert seen[seed, 6] < seen[seed, 12] < seen[seed, 30]
    assert seen[0, 6] != seen[1, 6]


def test_what_cannot_be_learnt_loses_nothing_else(data: tuple[Any, ...]) -> None:
    store, rollouts, test_store, test = data
    variants = [Variant("base", None, BASE), Variant("hopeless", "problems", BASE, problems=1)]
    result = ablation.run(variants, store, rollouts.rollouts, test_store, test.rollouts, seeds=1, progress=quiet)
    assert [own.variant.name for own in result.results] == ["base"]
    assert "hopeless is left out: with seed 0, there is 1 problem" in result.notes[0]
    with pytest.raises(NothingToLearnError, match="there is 1 problem"):
        ablation.run(
            [replace(variants[1], axis=None)], store, rollouts.rollouts, test_store, test.rollouts, progress=quiet
        )
    alike = [replace(item, candidates=[replace(c, correct=False) for c in item.candidates]) for item in test.rollouts]
    with pytest.raises(NothingToLearnError, match="none of the 9 test problems has right and wrong answers"):
        ablation.run(variants, store, rollouts.rollouts, test_store, alike, progress=quiet)


def save(file: RolloutFile, path: Path) -> Path:
    with RolloutWriter(path, {k: v for k, v in file.header.items() if k not in ("format", "version")}) as writer:
        for rollout in file.rollouts:
            writer.write(rollout)
    return path


def test_the_command_prints_a_table_an_axis(
    data: tuple[Any, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store, rollouts, test_store, test = data
    args = ["ablate", save(rollouts, tmp_path / "r"), "--store", store.path, "--test", save(test, tmp_path / "t")]
    args += ["--test-store", test_store.path, "--seeds", 2, "--epochs", 1, "--output", tmp_path / "a.json"]
    assert main([*map(str, args)]) == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 100
    for text in (
        "majority vote",
        "upstream",
        "no gate",
        "infonca",
        "top_logprobs",
        "25 problems",
        "Means over seeds, 2 of them",
    ):
        assert text in out
    facts = json.loads((tmp_path / "a.json").read_text())
    assert len(facts["results"]) == 10
    assert all(len(result["epochs"]) == 2 for result in facts["results"])
    assert main([*map(str, [*args, "--vary", "gate,depth"])]) == 2
    assert "'depth' is unknown: expected some of recipe, layers" in capsys.readouterr().err
    assert main([*map(str, [*args[:4], "--test", tmp_path / "r", "--test-store", store.path])]) == 2
    assert "shares 30 problems" in capsys.readouterr().err
    assert json.loads((tmp_path / "a.json").read_text()) == facts
    assert main([*map(str, [*args, "--n", "1,8"])]) == 2
    assert "n is 8: expected 1..3" in capsys.readouterr().err
    assert main([*map(str, [*args[:-1], tmp_path])]) == 2
    assert "is a folder: expected a file" in capsys.readouterr().err
