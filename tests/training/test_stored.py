"""Heads made from a store read what the model computes, sketched or not."""

from __future__ import annotations

import json
import os
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from swift_kernels import SwiftHead
from swift_kernels.evaluation.evaluate import evaluate, score_rollouts
from swift_kernels.processes import Processes
from swift_kernels.training.collection import Job, collect_rollouts
from swift_kernels.training.recipe import Recipe
from swift_kernels.training.rollouts import RolloutFile, read
from swift_kernels.training.sketch import Sketch
from swift_kernels.training.store import Store, StoreError
from swift_kernels.training.stored import (
    check_same_answers,
    check_same_layout,
    copy_sketched,
    make_head,
    score_stored,
    unsketched,
)
from swift_kernels.training.train import train_head, train_stored_head
from tests.training.test_collection import make_job

LAYOUTS: dict[str, dict[str, Any]] = {
    "whole": {"layers": "all", "dtype": "float32"},
    "random sketch": {"layers": "all", "dtype": "float32", "sketch": "random:5"},
    "pca": {"layers": "all", "dtype": "float32", "sketch": "pca:5"},
    "logits": {"layers": "logits", "dtype": "float32"},
    "top_logprobs": {"layers": "top_logprobs", "dtype": "float32"},
}
CASES = {f"{name}, all": (layout, "all") for name, layout in LAYOUTS.items()}
ALL_SOURCES = {"layers": ["all", "logits", "top_logprobs"], "dtype": "float32"}
CASES |= {
    f"{name} of all sources": (ALL_SOURCES, layers)
    for name, layers in {"layers": "all", "two layers": [0, -1], "logits": "logits", "top": "top_logprobs"}.items()
}
CASES |= {f"{name}, two layers": (layout, [0, -1]) for name, layout in LAYOUTS.items() if layout["layers"] == "all"}


def collected(job: Job) -> tuple[Store, RolloutFile]:
    collect_rollouts(job, Processes(), lambda *_: None, lambda _: None)
    assert job.store is not None
    return Store(job.store), read(job.output)


@pytest.mark.parametrize("gate", [True, False], ids=["gated", "no gate"])
@pytest.mark.parametrize(("layout", "layers"), CASES.values(), ids=CASES)
def test_a_stores_head_scores_as_the_model_does(
    model: Any, tokenizer: Any, tmp_path: Path, layout: dict[str, Any], layers: Any, gate: bool
) -> None:
    store, rollouts = collected(make_job(model, tokenizer, tmp_path, **layout))
    check_same_answers(store, rollouts)
    head = make_head(store, layers, gate).requires_grad_(False)
    stored = score_stored(store, head, rollouts.rollouts)
    full = unsketched(head, store)
    assert full.config.layers == head.config.layers
    expected = score_rollouts(model, full, rollouts.rollouts)
    # Weights of 1 / sqrt(features) and a mean over tokens: what is left is float32's rounding in the model.
    torch.testing.assert_close(torch.tensor(stored), torch.tensor(expected), rtol=1e-4, atol=1e-4, equal_nan=True)


def quiet(_description: str, _total: int) -> Any:
    return nullcontext(lambda *_: None)


def graded(rollouts: RolloutFile) -> RolloutFile:
    """Every other answer right: the tiny model's own answers are all wrong."""
    items = [
        replace(item, candidates=[replace(c, correct=place % 2 == 0) for place, c in enumerate(item.candidates)])
        for item in rollouts.rollouts
    ]
    return replace(rollouts, rollouts=items)


@pytest.mark.parametrize("layers", ["all", [0, 2]], ids=["all layers", "two layers"])
def test_a_head_trained_on_a_store_is_that_trained_on_the_model(
    model: Any, tokenizer: Any, tmp_path: Path, layers: Any
) -> None:
    store, rollouts = collected(make_job(model, tokenizer, tmp_path, 12, layers="all", dtype="float32"))
    rollouts = graded(rollouts)
    recipe = Recipe(epochs=3, learning_rate=0.01)
    options: dict[str, Any] = {"layers": layers, "recipe": recipe, "progress": quiet, "note": print}
    stored = train_stored_head(store, rollouts, **options)
    direct = train_head(model, tokenizer, rollouts, **options)
    assert stored.head.config.layers == direct.head.config.layers
    assert stored.head.config.base_model == direct.head.config.base_model
    # Features that differ by float32's rounding, through three epochs of AdamW, which divides by their size. Not the
    # reward's bias: it cancels in every pair, so its gradient is rounding alone, which AdamW makes steps of.
    torch.testing.assert_close(stored.head.weight, direct.head.weight, rtol=0.02, atol=2e-3)
    torch.testing.assert_close(stored.head.bias[:1], direct.head.bias[:1], rtol=0.02, atol=2e-3)
    assert stored.fit.validation_keys == direct.fit.validation_keys


def test_a_head_trained_on_a_sketch_is_saved_at_the_full_width(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    layout = {"layers": "all", "dtype": "float32", "sketch": "pca:5"}
    store, rollouts = collected(make_job(model, tokenizer, tmp_path / "train", 12, **layout))
    job = make_job(model, tokenizer, tmp_path / "test", 12, **layout)
    job = replace(job, problems=job.task.problems("test", 6), sketch_of=store.path)
    test_store, test = collected(job)
    trained = train_stored_head(
        store,
        graded(rollouts),
        recipe=Recipe(epochs=2),
        test=graded(test),
        test_store=test_store,
        progress=quiet,
        note=print,
    )
    assert trained.head.config.widths == (16, 16, 16)
    trained.save(tmp_path / "head")
    loaded = SwiftHead.from_pretrained(str(tmp_path / "head"), model=model)
    scores = score_rollouts(model, loaded, test.rollouts)
    assert trained.test is not None
    again = evaluate(graded(test).rollouts, scores)
    assert again.auc.mean == pytest.approx(trained.test.auc.mean, abs=1e-6)
    assert "sketch" in (tmp_path / "head" / "README.md").read_text()
    other_sketch, _ = collected(make_job(model, tokenizer, tmp_path / "other", 8, **layout))
    with pytest.raises(StoreError, match="has another sketch"):
        check_same_layout(store, other_sketch)


def test_stored_features_that_are_not_finite_are_never_scored(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    store, rollouts = collected(make_job(model, tokenizer, tmp_path, layers=[0, 2], dtype="float32"))
    row = next(row for row, length in enumerate(store.lengths) if length)
    store._values[0] = store._values[0].clone()
    store._values[0][store._rows[row][1], 3] = torch.nan
    with pytest.raises(
        StoreError, match=f"problem '{rollouts.rollouts[0].id.replace('+', '.')}' has features that are"
    ):
        score_stored(store, make_head(store).requires_grad_(False), rollouts.rollouts)


def test_what_does_not_fit_is_named(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    store, rollouts = collected(make_job(model, tokenizer, tmp_path, layers=[0, 2]))
    with pytest.raises(StoreError, match=r"holds layers \[0, 2\], \[1\] are asked for"):
        make_head(store, [1])
    with pytest.raises(StoreError, match="holds hidden_states, logits is asked for"):
        make_head(store, "logits")
    other = replace(rollouts, header={**rollouts.header, "model": {**rollouts.header["model"], "name": "other"}})
    with pytest.raises(StoreError, match="was generated by other"):
        check_same_answers(store, other)
    first, *rest = rollouts.rollouts
    with pytest.raises(StoreError, match="has no problem 'new'"):
        check_same_answers(store, replace(rollouts, rollouts=[replace(first, id="new"), *rest]))
    changed = replace(first, candidates=[replace(first.candidates[0], token_ids=[5]), *first.candidates[1:]])
    with pytest.raises(StoreError, match="are not those of the rollouts"):
        check_same_answers(store, replace(rollouts, rollouts=[changed, *rest]))
    logits, _ = collected(make_job(model, tokenizer, tmp_path / "logits", layers="logits"))
    with pytest.raises(StoreError, match="holds logits, hidden_states is asked for"):
        make_head(logits, [1])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "holds no store.json"),
        ("{", "is not JSON"),
        ("[]", "expected an object"),
        ('{"format": "x"}', "format 'x'"),
    ],
    ids=["missing", "torn", "array", "other"],
)
def test_a_folder_that_is_no_store_is_refused(tmp_path: Path, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / "store.json").write_text(content)
    with pytest.raises(StoreError, match=message):
        Store(tmp_path)


def test_a_record_of_something_else_is_named(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    job = make_job(model, tokenizer, tmp_path)
    collected(job)
    record = tmp_path / "store" / "00000.json"
    record.write_text(json.dumps({"problems": [{"id": 1}]}))
    with pytest.raises(StoreError, match=r"00000\.json is no record of a shard"):
        Store(tmp_path / "store")


@pytest.mark.parametrize("sketch", ["random:4", "pca:4"])
def test_a_sketched_copy_holds_what_was_stored_projected(
    model: Any, tokenizer: Any, tmp_path: Path, sketch: str
) -> None:
    store, rollouts = collected(make_job(model, tokenizer, tmp_path, layers=[0, 2, "top_logprobs"], dtype="float32"))
    copy_sketched(store, tmp_path / "copy", sketch)
    copy = Store(tmp_path / "copy")
    assert (copy.widths, copy.lengths, copy.layout.widths) == ((4, 4, 4), store.lengths, store.layout.widths)
    check_same_answers(copy, rollouts)
    every = torch.arange(len(store.lengths))
    assert copy.sketch is not None
    for k, (whole, kept) in enumerate(zip(store.batch(every)[0], copy.batch(every)[0], strict=True)):
        torch.testing.assert_close(kept, copy.sketch.apply(k, whole), rtol=1e-5, atol=1e-5)
    # A copy that was interrupted is completed to the same bytes; another store may share its projections.
    before = {path.name: path.read_bytes() for path in copy.path.iterdir()}
    (copy.path / f"{copy.shards[1].name}.json").unlink()
    copy_sketched(store, copy.path, sketch)
    assert {path.name: path.read_bytes() for path in copy.path.iterdir()} == before
    # So is one with a damaged shard, and only that is made anew.
    os.truncate(copy.path / f"{copy.shards[0].name}.safetensors", 50)
    assert ["it is made anew" in note for note in copy_sketched(store, copy.path, sketch)] == [True]
    assert {path.name: path.read_bytes() for path in copy.path.iterdir()} == before
    copy_sketched(store, tmp_path / "other", sketch, copy.path)
    check_same_layout(copy, Store(tmp_path / "other"))
    with pytest.raises(StoreError, match="is a sketch already"):
        copy_sketched(copy, tmp_path / "third", sketch)
    with pytest.raises(StoreError, match="made with other settings"):
        copy_sketched(store, tmp_path / "third", "pca:3", copy.path)
    assert not (tmp_path / "third").exists()
    # A folder of another store, or begun with other projections, is left as it is.
    second, _ = collected(make_job(model, tokenizer, tmp_path / "second", 9, layers=[0, 2, "top_logprobs"]))
    with pytest.raises(StoreError, match=r"other settings: layout\.dtype is"):
        copy_sketched(second, copy.path, sketch)
    fewer, _ = collected(
        make_job(model, tokenizer, tmp_path / "fewer", 2, layers=[0, 2, "top_logprobs"], dtype="float32")
    )
    with pytest.raises(StoreError, match=r"that .*fewer/store does not: use another folder"):
        copy_sketched(fewer, copy.path, sketch)
    Sketch([p + 1 for p in copy.sketch.projections], copy.sketch.means).save(tmp_path / "other" / "sketch.safetensors")
    with pytest.raises(StoreError, match=r"other.sketch\.safetensors is corrupted"):
        copy_sketched(store, tmp_path / "other", sketch, copy.path)
    assert {path.name: path.read_bytes() for path in copy.path.iterdir()} == before
