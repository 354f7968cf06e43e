from __future__ import annotations

import shutil
from collections import namedtuple
from typing import Any

import pytest
import torch

from swift_kernels import SwiftHead
from swift_kernels.training import activations as activations_module
from swift_kernels.training.activations import Activations, collect
from swift_kernels.training.fit import Epoch, Example, NothingToLearnError, Recipe, fit, hold_back

QUICK = Recipe(learning_rate=0.05, epochs=30, patience=30, batch_size=4)


def separable(problems: int = 10, noise: float = 0.0) -> tuple[Activations, list[Example]]:
    """Four responses a problem; the first feature tells right from wrong."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 6, (4 * problems,), generator=generator).tolist()
    made = Activations([3, 2], lengths, torch.float32)
    made.values.copy_(torch.randn(sum(lengths), 5, generator=generator))
    examples = []
    for response in range(4 * problems):
        right = response % 4 < 2
        start, end = made.cu_seqlens[response : response + 2].tolist()
        made.values[start:end, 0] = (1.0 if right else -1.0) + noise * torch.randn(end - start, generator=generator)
        examples.append(Example(response, right, f"problem {response // 4}"))
    return made, examples


class TestActivations:
    @pytest.mark.parametrize("layers", ["all", [0, -1], "logits"], ids=str)
    def test_are_the_hidden_states_of_the_scored_tokens(self, model: Any, layers: Any) -> None:
        head = SwiftHead.for_model(model, layers)
        groups = [([5, 6, 7], [[8, 9, 10, 1], [8, 11], [12, 13, 14, 15]]), ([11], [[16]]), ([17, 18], [[19], [20, 21]])]
        sequences = [(prompt, response) for prompt, responses in groups for response in responses]
        done: list[int] = []
        found = collect(model, head.config, groups, batch_size=2, on_progress=done.append)
        # All but the last token, which is the end-of-sequence of the first.
        assert found.lengths == (3, 1, 3, 0, 0, 1)
        assert done == [1, 2, 3]
        for index, (prompt, response) in enumerate(sequences):
            entries, cu_seqlens = found.batch(torch.tensor([index]))
            assert cu_seqlens.tolist() == [0, found.lengths[index]]
            if not found.lengths[index]:
                continue
            with torch.no_grad():
                output = model(torch.tensor([prompt + response]), output_hidden_states=True)
            if layers == "logits":
                whole = [output.logits]
            else:
                whole = [output.hidden_states[layer] for layer in head.config.layers or ()]
            span = slice(len(prompt), len(prompt) + found.lengths[index])
            for entry, expected in zip(entries, whole, strict=True):
                # Padding changes the order of additions in attention.
                torch.testing.assert_close(entry, expected[0, span], rtol=1e-5, atol=1e-5)

    def test_keep_the_dtype_of_the_model(self, model: Any) -> None:
        import copy

        head = SwiftHead.for_model(model, [1])
        half = copy.deepcopy(model).bfloat16()
        assert collect(half, head.config, [([5], [[6, 7]])]).values.dtype == torch.bfloat16

    def test_batches_may_repeat_and_reorder(self) -> None:
        made, _ = separable()
        entries, cu_seqlens = made.batch(torch.tensor([3, 0, 3]))
        assert cu_seqlens.diff().tolist() == [made.lengths[3], made.lengths[0], made.lengths[3]]
        assert [entry.shape[1] for entry in entries] == [3, 2]
        assert torch.equal(entries[0][: made.lengths[3]], entries[0][-made.lengths[3] :])

    def test_refuse_what_the_disk_cannot_hold_and_leave_nothing(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
    ) -> None:
        monkeypatch.setattr(activations_module.tempfile, "tempdir", str(tmp_path))
        made, _ = separable()
        assert made.nbytes > 0
        assert not list(tmp_path.iterdir())
        usage = namedtuple("usage", "total used free")(10, 9, 1)
        monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
        with pytest.raises(ValueError, match="set TMPDIR to a larger folder"):
            separable()


class TestFit:
    @pytest.mark.parametrize("gate", [True, False], ids=["gate", "no-gate"])
    def test_learns_what_can_be_learnt(self, gate: bool) -> None:
        activations, examples = separable()
        head = SwiftHead([3, 2], gate=gate)
        result = fit(head, activations, examples, QUICK)
        assert result.best.validation_loss < 0.1 < result.history[0].validation_loss
        scores = head(*activations.batch(torch.arange(len(examples))))
        assert ((scores > 0) == torch.tensor([example.correct for example in examples])).all()
        assert not any(parameter.requires_grad for parameter in head.parameters())

    def test_keeps_the_weights_of_the_best_epoch(self) -> None:
        # Labels that hardly follow the features: it overfits, and the last epoch is worse than the best.
        activations, examples = separable(noise=3.0)
        head = SwiftHead([3, 2])
        result = fit(head, activations, examples, Recipe(learning_rate=0.3, epochs=40, patience=6, batch_size=4))
        assert result.history[-1].validation_loss > result.best.validation_loss
        assert result.best == min(result.history, key=lambda epoch: epoch.validation_loss)
        assert len(result.history) == min(40, result.best.number + 6)
        held_out = [example for example in examples if example.key in result.validation_keys]
        scores = head(*activations.batch(torch.tensor([example.response for example in held_out])))
        targets = torch.tensor([float(example.correct) for example in held_out])
        loss = torch.nn.functional.binary_cross_entropy_with_logits(scores, targets)
        assert loss.item() == pytest.approx(result.best.validation_loss, rel=1e-5)

    def test_is_reproducible_and_leaves_the_global_generator_alone(self) -> None:
        activations, examples = separable()
        heads = []
        for _ in range(2):
            state = torch.get_rng_state()
            head = SwiftHead([3, 2])
            torch.set_rng_state(state)
            fit(head, activations, examples, QUICK)
            assert torch.equal(torch.get_rng_state(), state)
            heads.append(head)
        assert torch.equal(heads[0].weight, heads[1].weight)
        other = SwiftHead([3, 2])
        fit(other, activations, examples, Recipe(learning_rate=0.05, epochs=30, patience=30, batch_size=4, seed=1))
        assert not torch.equal(other.weight, heads[0].weight)

    def test_reports_every_epoch(self) -> None:
        activations, examples = separable()
        seen: list[tuple[Epoch, Epoch]] = []
        result = fit(SwiftHead([3, 2]), activations, examples, QUICK, lambda epoch, best: seen.append((epoch, best)))
        assert [epoch for epoch, _ in seen] == result.history
        assert seen[-1][1] == result.best

    @pytest.mark.parametrize(("label", "which"), [(True, "right"), (False, "wrong")], ids=["right", "wrong"])
    def test_nothing_to_learn_is_said_with_counts(self, label: bool, which: str) -> None:
        activations, examples = separable()
        alike = [Example(example.response, label, example.key) for example in examples]
        with pytest.raises(NothingToLearnError, match=f"all 40 answers are {which}"):
            fit(SwiftHead([3, 2]), activations, alike, QUICK)

    def test_one_problem_cannot_be_split(self) -> None:
        activations, examples = separable(problems=1)
        with pytest.raises(NothingToLearnError, match="there is 1 problem: expected at least 2"):
            fit(SwiftHead([3, 2]), activations, examples, QUICK)

    def test_nan_features_are_an_error(self) -> None:
        activations, examples = separable()
        activations.values[3, 1] = torch.nan
        with pytest.raises(NothingToLearnError, match="the loss is nan"):
            fit(SwiftHead([3, 2]), activations, examples, QUICK)


@pytest.mark.parametrize("fraction", [0.01, 0.2, 0.5, 0.99])
def test_hold_back_keeps_keys_together_and_both_sides_filled(fraction: float) -> None:
    keys = [f"k{index // 3}" for index in range(30)]
    held = hold_back(keys, fraction, seed=0)
    assert len(held) == min(max(1, round(10 * fraction)), 9)
    assert held == hold_back(keys[::-1], fraction, seed=0)


@pytest.mark.parametrize(
    "options",
    [
        {"batch_size": 0},
        {"epochs": 0},
        {"patience": 0},
        {"learning_rate": -1.0},
        {"validation": 1.0},
        {"validation": 0.0},
    ],
    ids=str,
)
def test_impossible_recipes(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        Recipe(**options)
