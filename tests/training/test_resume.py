"""Fits that are interrupted end as if they had not been; checkpoints of other fits are refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from swift_kernels import SwiftHead
from swift_kernels.training import resume
from swift_kernels.training.activations import Activations
from swift_kernels.training.fit import Example, fit, fit_heads
from swift_kernels.training.resume import ResumeError
from tests.training.data import QUICK, separable


class KilledError(Exception):
    pass


def killed_after(activations: Activations, reads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets so many batches be read and not one more."""
    batch, left = activations.batch, [reads]

    def limited(*args: Any) -> Any:
        left[0] -= 1
        if left[0] < 0:
            raise KilledError
        return batch(*args)

    monkeypatch.setattr(activations, "batch", limited)


class TestResume:
    RECIPES = (
        replace(QUICK, epochs=4, start="ridge"),
        replace(QUICK, epochs=3, learning_rate=0.2),
        replace(QUICK, epochs=2, loss="infonca", seed=5),
    )

    def fit(
        self, activations: Activations, examples: list[Example], path: Path | None, refit: bool = False
    ) -> tuple[list, list]:
        heads = [SwiftHead([3, 2]), SwiftHead([3, 2], gate=False), SwiftHead([3, 2])]
        recipes = [replace(recipe, refit=refit) for recipe in self.RECIPES]
        return heads, fit_heads(heads, activations, examples, recipes, checkpoint=path)

    # It is first saved after five reads: identity, two looks, the ridge penalties and the validation of the start. An
    # epoch is eight reads and a validation; after 41 the second plan begins.
    @pytest.mark.parametrize("reads", [2, 4, 5, 9, 14, 17, 20, 35, 42, 47, 55, 60])
    def test_ends_bitwise_as_if_it_had_not_been_killed(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reads: int
    ) -> None:
        activations, examples = separable(noise=2.0)
        path = tmp_path / "fit.safetensors"
        expected_heads, expected = self.fit(activations, examples, None)
        with monkeypatch.context() as patch:
            killed_after(activations, reads, patch)
            with pytest.raises(KilledError):
                self.fit(activations, examples, path)
        assert path.exists() == (reads >= 5)
        heads, results = self.fit(activations, examples, path)
        assert results == expected
        for head, other in zip(heads, expected_heads, strict=True):
            assert torch.equal(head.weight, other.weight)
            assert torch.equal(head.bias, other.bias)
        assert list(tmp_path.iterdir()) == [path], "until the heads are saved, this is all that there is of the fit"
        (tmp_path / ".fit.safetensors.abcdefgh.tmp").write_bytes(b"")
        resume.remove(path)
        assert not list(tmp_path.iterdir())

    @pytest.mark.parametrize("refit", [False, True], ids=["once", "refit"])
    def test_killed_again_and_again(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refit: bool) -> None:
        activations, examples = separable(noise=2.0)
        expected_heads, expected = self.fit(activations, examples, None, refit)
        for _ in range(20):
            with monkeypatch.context() as patch:
                killed_after(activations, 14, patch)
                try:
                    heads, results = self.fit(activations, examples, tmp_path / "fit", refit)
                    break
                except KilledError:
                    continue
        else:
            pytest.fail("it never came to an end")
        assert results == expected
        for head, other in zip(heads, expected_heads, strict=True):
            assert torch.equal(head.weight, other.weight)

    def interrupted(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Activations, list[Example], Path]:
        activations, examples = separable(noise=2.0)
        with monkeypatch.context() as patch:
            killed_after(activations, 30, patch)
            with pytest.raises(KilledError):
                fit(SwiftHead([3, 2]), activations, examples, QUICK, checkpoint=tmp_path / "fit")
        return activations, examples, tmp_path / "fit"

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"learning_rate": 0.07}, r"recipe 0: learning_rate is 0\.05 there and 0\.07 here"),
            ({"loss": "nca"}, "recipe 0: loss is bce there and nca here"),
        ],
        ids=["rate", "loss"],
    )
    def test_another_recipe_is_refused_by_name(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], message: str
    ) -> None:
        activations, examples, path = self.interrupted(tmp_path, monkeypatch)
        before = path.read_bytes()
        head = SwiftHead([3, 2])
        weight = head.weight.clone()
        with pytest.raises(ResumeError, match=message):
            fit(head, activations, examples, replace(QUICK, **changes), checkpoint=path)
        assert path.read_bytes() == before
        assert torch.equal(head.weight, weight)

    def test_other_data_are_refused_by_name(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        activations, examples, path = self.interrupted(tmp_path, monkeypatch)
        with pytest.raises(ResumeError, match="number of answers is 40 there and 39 here"):
            fit(SwiftHead([3, 2]), activations, examples[:-1], QUICK, checkpoint=path)
        turned = [replace(example, correct=not example.correct) for example in examples]
        with pytest.raises(ResumeError, match="another fit: answers is"):
            fit(SwiftHead([3, 2]), activations, turned, QUICK, checkpoint=path)
        activations.values += 1
        with pytest.raises(ResumeError, match="another fit: first features is"):
            fit(SwiftHead([3, 2]), activations, examples, QUICK, checkpoint=path)

    def test_what_is_no_checkpoint_is_left_alone(self, tmp_path: Path) -> None:
        activations, examples = separable()
        path = tmp_path / "fit"
        path.write_text("something of mine")
        with pytest.raises(ResumeError, match="is no checkpoint of a fit"):
            fit(SwiftHead([3, 2]), activations, examples, QUICK, checkpoint=path)
        assert path.read_text() == "something of mine"
