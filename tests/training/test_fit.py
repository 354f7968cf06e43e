from __future__ import annotations

import shutil
from collections import namedtuple
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from swift_kernels import SwiftHead
from swift_kernels.head import HeadConfig
from swift_kernels.training import activations as activations_module
from swift_kernels.training import standardize
from swift_kernels.training.activations import Activations, collect
from swift_kernels.training.fit import (
    RECIPES,
    Epoch,
    Example,
    NothingToLearnError,
    Recipe,
    fit,
    fit_heads,
    hold_back,
)
from swift_kernels.training.losses import LOSSES, get_loss, within_problem_auc
from swift_kernels.training.resume import ResumeError
from swift_kernels.training.split import epoch_batches, split_examples

QUICK = Recipe(learning_rate=0.05, epochs=30, patience=30, batch_size=4, start="random", loss="bce")


def separable(
    problems: int = 10, noise: float = 0.0, dtype: torch.dtype = torch.float32
) -> tuple[Activations, list[Example]]:
    """Four responses a problem; the first feature tells right from wrong."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 6, (4 * problems,), generator=generator).tolist()
    made = Activations([3, 2], lengths, dtype)
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


def held_out(result: Any, examples: list[Example]) -> list[Example]:
    return [example for example in examples if example.key in result.validation_keys]


def facts_of(head: SwiftHead, activations: Activations, examples: list[Example], loss: str) -> tuple[float, float]:
    """Loss and within-problem AUC of a head on some examples."""
    scores = head(*activations.batch(torch.tensor([example.response for example in examples])))
    labels = torch.tensor([float(example.correct) for example in examples])
    group = torch.tensor([int(example.key.removeprefix("problem ")) for example in examples])
    return get_loss(loss)(scores, labels, group).item(), within_problem_auc(scores, labels, group).item()


class TestFit:
    @pytest.mark.parametrize("gate", [True, False], ids=["gate", "no-gate"])
    @pytest.mark.parametrize("start", ["ridge", "random"])
    def test_learns_what_can_be_learnt(self, gate: bool, start: str) -> None:
        activations, examples = separable()
        head = SwiftHead([3, 2], gate=gate)
        result = fit(head, activations, examples, replace(QUICK, start=start, stop="loss"))
        # On 8 answers; 0.69 is chance.
        assert result.best.validation_loss < 0.2
        assert result.best.validation_loss < result.history[0].validation_loss
        scores = head(*activations.batch(torch.arange(len(examples))))
        right = torch.tensor([example.correct for example in examples])
        assert ((scores > 0) == right).float().mean() >= 0.95
        assert not any(parameter.requires_grad for parameter in head.parameters())

    @pytest.mark.parametrize("loss", LOSSES)
    @pytest.mark.parametrize("standard", [True, False], ids=["standardised", "raw"])
    def test_every_loss_orders_the_answers(self, loss: str, standard: bool) -> None:
        activations, examples = separable()
        head = SwiftHead([3, 2])
        result = fit(head, activations, examples, replace(QUICK, loss=loss, standardize=standard))
        assert (result.penalty, result.history[0].number) == (None, 1)
        assert facts_of(head, activations, examples, loss)[1] == 1.0
        first, last = result.history[0].train_loss, result.history[-1].train_loss
        assert first is not None
        assert last is not None
        assert last < first

    @pytest.mark.parametrize("stop", ["loss", "auc"])
    @pytest.mark.parametrize("start", ["random", "ridge"])
    def test_keeps_the_weights_of_the_best_epoch(self, stop: str, start: str) -> None:
        # Labels that hardly follow the features: it overfits, and the last epoch is worse than the best.
        activations, examples = separable(problems=40, noise=3.0)
        head = SwiftHead([3, 2])
        recipe = replace(QUICK, learning_rate=0.3, epochs=40, patience=6, start=start, stop=stop)
        result = fit(head, activations, examples, recipe)
        last, best = result.history[-1], result.best
        if stop == "loss":
            assert last.validation_loss > best.validation_loss
            assert best == min(result.history, key=lambda epoch: epoch.validation_loss)
        else:
            assert (last.validation_auc or 0) < (best.validation_auc or 0)
            assert best.validation_auc == max(epoch.validation_auc or 0 for epoch in result.history)
        assert last.number == min(40, best.number + 6)
        assert result.kept == best
        assert result.stopped_early == (best.number + 6 <= 40)
        loss, auc = facts_of(head, activations, held_out(result, examples), "bce")
        # What was validated is what is returned; only the order of the mean may differ.
        assert loss == pytest.approx(best.validation_loss, rel=1e-6)
        assert auc == best.validation_auc

    def test_can_keep_the_last_weights_as_the_authors_code_does(self) -> None:
        activations, examples = separable(problems=40, noise=3.0)
        head = SwiftHead([3, 2])
        recipe = replace(QUICK, learning_rate=0.3, patience=3, stop="loss", keep="last")
        result = fit(head, activations, examples, recipe)
        assert result.kept == result.history[-1] != result.best
        loss, _ = facts_of(head, activations, held_out(result, examples), "bce")
        assert loss == pytest.approx(result.history[-1].validation_loss, rel=1e-6)

    def test_a_bfloat16_head_is_validated_as_it_is_returned(self) -> None:
        activations, examples = separable(problems=40, noise=3.0)
        head = SwiftHead(HeadConfig(widths=(3, 2), dtype="bfloat16"))
        result = fit(head, activations, examples, replace(QUICK, epochs=3))
        assert head.weight.dtype == torch.bfloat16
        loss, _ = facts_of(head, activations, held_out(result, examples), "bce")
        assert loss == pytest.approx(result.best.validation_loss, rel=1e-6)

    def test_standardising_inside_is_standardising_the_features(self) -> None:
        activations, examples = separable(noise=2.0, dtype=torch.float64)
        activations.values.mul_(torch.tensor([1.0, 1e3, 1e-3, 10.0, 1.0])).add_(torch.tensor([0.0, 1e4, 1, -50, 3]))
        split = split_examples(examples, QUICK)
        rows = torch.cat([torch.arange(*activations.cu_seqlens[i : i + 2].tolist()) for i in split.train.tolist()])
        other, _ = separable(dtype=torch.float64)
        mean, deviation = activations.values[rows].mean(dim=0), activations.values[rows].std(dim=0, correction=0)
        other.values.copy_((activations.values - mean) / deviation)
        scores = []
        for store, standard in ((activations, True), (other, False)):
            head = SwiftHead([3, 2]).double()
            fit(head, store, examples, replace(QUICK, epochs=5, standardize=standard, keep="last"))
            scores.append(head(*store.batch(torch.arange(len(examples)))))
        # float64, whose eps of 2e-16 the means, 1e7 times the smallest deviation, take to 2e-9 at worst.
        torch.testing.assert_close(scores[0], scores[1], rtol=1e-8, atol=1e-8)

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
        fit(other, activations, examples, replace(QUICK, seed=1))
        assert not torch.equal(other.weight, heads[0].weight)

    def test_reports_every_epoch(self) -> None:
        activations, examples = separable()
        seen: list[tuple[Epoch, Epoch]] = []
        recipe = replace(QUICK, start="ridge")
        result = fit(SwiftHead([3, 2]), activations, examples, recipe, lambda epoch, best: seen.append((epoch, best)))
        assert [epoch for epoch, _ in seen] == result.history
        assert [epoch.number for epoch in result.history] == list(range(31))
        assert seen[-1][1] == result.best


class TestSweep:
    def recipes(self) -> tuple[list[SwiftHead], list[Recipe]]:
        """Heads of both kinds, of all and of some entries, at their own pace, over the same batches."""
        full = {"widths": (3, 2), "layers": (4, 9), "num_hidden_layers": 12}
        configs = [
            HeadConfig(**full),
            HeadConfig(**full, gate=False),
            HeadConfig(widths=(2,), layers=(9,), num_hidden_layers=12),
            HeadConfig(widths=(3,), layers=(4,), num_hidden_layers=12, gate=False),
        ]
        common = replace(QUICK, epochs=12, patience=3)
        recipes = [
            common,
            replace(common, loss="hinge", learning_rate=0.3),
            replace(common, stop="loss", weight_decay=0.5),
            replace(common, start="ridge", learning_rate=0.01),
        ]
        return [SwiftHead(config).double() for config in configs], recipes

    def test_each_head_is_as_if_it_were_fitted_alone(self) -> None:
        activations, examples = separable(problems=40, noise=2.0, dtype=torch.float64)
        together, recipes = self.recipes()
        results = fit_heads(together, activations, examples, recipes, layers=[4, 9])
        assert len({len(result.history) for result in results}) > 1, "all ended at once: nothing was left behind"
        for head, recipe, alone, result in zip(together, recipes, self.recipes()[0], results, strict=True):
            expected = fit_heads([alone], activations, examples, [recipe], layers=[4, 9])[0]
            # float64 sums in another order, over some 400 steps.
            torch.testing.assert_close(head.weight, alone.weight, rtol=1e-9, atol=1e-9)
            torch.testing.assert_close(head.bias, alone.bias, rtol=1e-9, atol=1e-9)
            assert (result.best.number, len(result.history)) == (expected.best.number, len(expected.history))

    def test_reads_the_data_once_for_all(self, monkeypatch: pytest.MonkeyPatch) -> None:
        activations, examples = separable()
        reads: list[int] = []
        batch = activations.batch
        monkeypatch.setattr(activations, "batch", lambda *args: (reads.append(1), batch(*args))[1])
        recipe = replace(QUICK, epochs=3)
        counts = []
        for heads in (1, 7):
            reads.clear()
            fit_heads([SwiftHead([3, 2]) for _ in range(heads)], activations, examples, [recipe] * heads)
            counts.append(len(reads))
        # Eight steps and a validation an epoch, and one look at each side before.
        assert counts == [3 * 9 + 2] * 2

    def test_recipes_that_read_other_batches_take_turns(self) -> None:
        activations, examples = separable(noise=2.0)
        recipes = [replace(QUICK, epochs=2, seed=seed, loss=loss) for seed in (0, 1) for loss in ("bce", "dpo", "nca")]
        heads = [SwiftHead([3, 2]) for _ in recipes]
        seen: list[tuple[int, int]] = []
        results = fit_heads(
            heads,
            activations,
            examples,
            recipes,
            on_epoch=lambda index, epoch, best: seen.append((index, epoch.number)),
        )
        assert sorted(seen) == [(index, number) for index in range(6) for number in (1, 2)]
        for head, recipe, result in zip(heads, recipes, results, strict=True):
            alone = SwiftHead([3, 2])
            assert fit(alone, activations, examples, recipe).history == result.history
            assert torch.equal(alone.weight, head.weight)

    def test_a_head_of_some_layers_never_sees_the_others(self) -> None:
        weights = []
        for scale in (1.0, -1e6):
            activations, examples = separable(noise=2.0)
            activations.values[:, :3] *= scale
            small = SwiftHead(HeadConfig(widths=(2,), layers=(9,), num_hidden_layers=12))
            beside = SwiftHead(HeadConfig(widths=(3, 2), layers=(4, 9), num_hidden_layers=12))
            recipe = replace(QUICK, start="ridge", epochs=4)
            fit_heads([small, beside], activations, examples, [recipe] * 2, layers=[4, 9])
            weights.append(small.weight)
        # Products with a weight of zero change no sum.
        assert torch.equal(*weights)

    @pytest.mark.parametrize(
        ("config", "message"),
        [
            (HeadConfig(widths=(3,), layers=(5,), num_hidden_layers=12), r"reads layers \[5\], stored are \[4, 9\]"),
            (HeadConfig(widths=(2,), layers=(4,), num_hidden_layers=12), r"reads widths \[2\], stored are \[3\]"),
            (HeadConfig(widths=(5,)), r"reads widths \[5\], stored are \[3, 2\]"),
        ],
        ids=["layer", "width", "widths"],
    )
    def test_heads_of_what_is_not_stored(self, config: HeadConfig, message: str) -> None:
        activations, examples = separable()
        with pytest.raises(ValueError, match=message):
            fit_heads([SwiftHead(config)], activations, examples, [QUICK], layers=[4, 9])

    def test_one_recipe_a_head(self) -> None:
        activations, examples = separable()
        head = SwiftHead([3, 2])
        with pytest.raises(ValueError, match="1 heads and 2 recipes"):
            fit_heads([head], activations, examples, [QUICK] * 2)
        with pytest.raises(ValueError, match="one is there twice"):
            fit_heads([head, head], activations, examples, [QUICK] * 2)


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

    def fit(self, activations: Activations, examples: list[Example], path: Path | None) -> tuple[list, list]:
        heads = [SwiftHead([3, 2]), SwiftHead([3, 2], gate=False), SwiftHead([3, 2])]
        return heads, fit_heads(heads, activations, examples, self.RECIPES, checkpoint=path)

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
        assert not list(tmp_path.iterdir())

    def test_killed_again_and_again(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        activations, examples = separable(noise=2.0)
        expected_heads, expected = self.fit(activations, examples, None)
        for _ in range(20):
            with monkeypatch.context() as patch:
                killed_after(activations, 12, patch)
                try:
                    heads, results = self.fit(activations, examples, tmp_path / "fit")
                    break
                except KilledError:
                    continue
        else:
            pytest.fail("it never came to an end")
        assert results == expected
        assert torch.equal(heads[0].weight, expected_heads[0].weight)

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


class TestNothingToLearn:
    @pytest.mark.parametrize(("label", "which"), [(True, "right"), (False, "wrong")], ids=["right", "wrong"])
    def test_all_alike(self, label: bool, which: str) -> None:
        activations, examples = separable()
        alike = [Example(example.response, label, example.key) for example in examples]
        with pytest.raises(NothingToLearnError, match=f"all 40 answers are {which}"):
            fit(SwiftHead([3, 2]), activations, alike, QUICK)

    def test_one_problem_cannot_be_split(self) -> None:
        activations, examples = separable(problems=1)
        with pytest.raises(NothingToLearnError, match="there is 1 problem: expected at least 2"):
            fit(SwiftHead([3, 2]), activations, examples, QUICK)

    def test_no_held_out_problem_has_both(self) -> None:
        activations, examples = separable()
        single = [replace(example, key=f"problem {example.response}") for example in examples]
        with pytest.raises(NothingToLearnError, match="none of the 8 held-out problems has right and wrong answers"):
            fit(SwiftHead([3, 2]), activations, single, QUICK)
        result = fit(SwiftHead([3, 2]), activations, single, replace(QUICK, stop="loss"))
        assert result.best.validation_auc is None
        for loss in ("dpo", "infonca", "nca"):
            with pytest.raises(
                NothingToLearnError, match=f"none of the 32 problems .* which the loss '{loss}' compares"
            ):
                fit(SwiftHead([3, 2]), activations, single, replace(QUICK, stop="loss", loss=loss))

    def test_answers_without_a_token(self) -> None:
        made = Activations([1], [2, 0, 2, 1], torch.float32)
        examples = [Example(index, index % 2 == 0, f"problem {index // 2}") for index in range(4)]
        with pytest.raises(NothingToLearnError, match="1 of 4 answers have no scored token"):
            fit(SwiftHead([1]), made, examples, QUICK)

    @pytest.mark.parametrize("value", [torch.nan, torch.inf], ids=str)
    @pytest.mark.parametrize(
        "recipe", [QUICK, RECIPES["upstream"], RECIPES["swift"]], ids=["quick", "upstream", "swift"]
    )
    @pytest.mark.parametrize("response", [0, 39], ids=["first", "last"])
    def test_the_first_bad_response_is_named(self, value: float, recipe: Recipe, response: int) -> None:
        activations, examples = separable()
        start = int(activations.cu_seqlens[response])
        activations.values[start, 4] = value
        head = SwiftHead([3, 2])
        before = head.weight.clone()
        with pytest.raises(NothingToLearnError, match=f"response {response} has 1 of 2 features NaN or infinite in"):
            fit(head, activations, examples, recipe)
        assert torch.equal(head.weight, before)

    def test_all_nan(self) -> None:
        activations, examples = separable()
        activations.values.fill_(torch.nan)
        with pytest.raises(NothingToLearnError, match="3 of 3 features NaN or infinite in entry 0 of its token 0"):
            fit(SwiftHead([3, 2]), activations, examples, QUICK)

    def test_a_rate_that_diverges(self) -> None:
        activations, examples = separable()
        with pytest.raises(NothingToLearnError, match="lower the learning rate"):
            fit(SwiftHead([3, 2]), activations, examples, replace(QUICK, loss="hinge", learning_rate=3e37))


class TestStandardize:
    def test_statistics_of_far_off_features(self) -> None:
        activations, _ = separable()
        activations.values.mul_(torch.tensor([1.0, 3.0, 1e-2, 1.0, 1.0])).add_(torch.tensor([0.0, 1e4, 1.0, 0.0, 0.0]))
        activations.values[:, 4] = 7.0
        responses = torch.tensor([0, 3, 4, 30])
        keep = torch.tensor([True, False, False, True])
        statistics, means = standardize.survey(activations, responses, keep, torch.device("cpu"))
        own = [activations.values[slice(*activations.cu_seqlens[r : r + 2].tolist())].double() for r in responses]
        tokens = torch.cat(own)
        # 16 tokens or fewer, summed in float64 about a point near their mean.
        torch.testing.assert_close(statistics.mean, tokens.mean(dim=0), rtol=1e-14, atol=1e-14)
        deviation = tokens.std(dim=0, correction=0)
        torch.testing.assert_close(statistics.inverse_deviation[:4], 1 / deviation[:4], rtol=1e-11, atol=0)
        assert statistics.inverse_deviation[4] == 0, "a feature that never changes gets no weight"
        expected = torch.stack([own[0].mean(dim=0), own[3].mean(dim=0)]).float()
        torch.testing.assert_close(means, expected, rtol=2e-7, atol=0)

    def test_many_parts_are_as_one(self, monkeypatch: pytest.MonkeyPatch) -> None:
        activations, _ = separable()
        everything = torch.arange(40), torch.ones(40, dtype=torch.bool), torch.device("cpu")
        one, means = standardize.survey(activations, *everything)
        monkeypatch.setattr(standardize, "TOKENS_AT_ONCE", 7)
        assert len(list(standardize.parts(everything[0], activations.lengths))) > 10
        many, others = standardize.survey(activations, *everything)
        torch.testing.assert_close(many.mean, one.mean, rtol=1e-12, atol=1e-15)
        torch.testing.assert_close(many.inverse_deviation, one.inverse_deviation, rtol=1e-12, atol=0)
        assert torch.equal(means, others)

    def test_folded_weights_read_raw_features(self) -> None:
        generator = torch.Generator().manual_seed(0)
        features = torch.randn(50, 8, generator=generator, dtype=torch.float64)
        features = features * torch.logspace(-3, 3, 8) + torch.linspace(-100, 100, 8)
        statistics = standardize.Statistics(features.mean(dim=0), 1 / features.std(dim=0))
        weight = torch.randn(2, 8, generator=generator)
        bias = torch.randn(2, generator=generator)
        columns = torch.tensor([1, 2, 4, 7])
        expected = (features - statistics.mean) * statistics.inverse_deviation
        expected = expected[:, columns] @ weight[:, columns].T.double() + bias
        raw, shift = (part.float().double() for part in statistics.fold(weight[:, columns], bias, columns))
        error = (features[:, columns] @ raw.T + shift - expected).abs()
        # Folding is exact to float64; each weight then rounds once to float32, by half an eps.
        scale = features[:, columns].abs() @ raw.abs().T + shift.abs()
        assert (error <= (torch.finfo(torch.float32).eps / 2 + 1e-13) * scale).all()
        assert error.max() > 0

    @pytest.mark.parametrize("shape", [(30, 6), (6, 30)], ids=["more-candidates", "more-features"])
    def test_ridge_solves_its_normal_equations(self, shape: tuple[int, int]) -> None:
        generator = torch.Generator().manual_seed(0)
        features = torch.randn(shape, generator=generator)
        labels = torch.rand(shape[0], generator=generator)
        counts = torch.randint(1, 4, (shape[0],), generator=generator).float()
        paths = standardize.ridge_paths(features, labels, counts)
        repeats = counts.long()
        x = features.double().repeat_interleave(repeats, dim=0)
        y = labels.double().repeat_interleave(repeats)
        x, y = x - x.mean(dim=0), y - y.mean()
        assert len(paths) == len(standardize.PENALTIES)
        length = x.square().sum() / shape[0]
        for penalty, weight in zip(standardize.PENALTIES, paths, strict=True):
            gradient = x.T @ (x @ weight - y) + penalty * length * weight
            # The Gram matrix is of float32 products; a penalty of 1e-2 amplifies their rounding at most a hundredfold.
            assert gradient.norm() < 1e-4 * (x.T @ y).norm()

    def test_ridge_start_is_the_best_of_its_penalties(self) -> None:
        activations, examples = separable(problems=60, noise=3.0)
        head = SwiftHead([3, 2])
        result = fit(head, activations, examples, replace(QUICK, start="ridge", epochs=1, learning_rate=0.0))
        assert result.penalty in standardize.PENALTIES
        assert (head.weight[0].abs().max(), head.bias[0]) == (0, 0)
        assert facts_of(head, activations, held_out(result, examples), "bce")[1] == result.history[0].validation_auc
        # The scale is that of logits: better than answering the share of right ones.
        assert result.history[0].validation_loss < 0.693

    def test_logistic_scale_is_where_the_slope_is_zero(self) -> None:
        generator = torch.Generator().manual_seed(0)
        scores = 0.01 * torch.randn(400, generator=generator).double()
        labels = (torch.rand(400, generator=generator) < (150 * scores - 1).sigmoid()).double()
        scale, shift = standardize.logistic_scale(scores, labels)
        residual = labels - (scale * scores + shift).sigmoid()
        # Up to the prior, of the weight of one observation.
        assert residual.sum().item() == pytest.approx(shift, rel=1e-6)
        assert (residual * scores).sum().item() == pytest.approx(scale * scores.var().item(), rel=1e-6)
        assert scale == pytest.approx(150, rel=0.3)


class TestSplit:
    def test_by_problem_no_problem_is_on_both_sides(self) -> None:
        _, examples = separable(problems=20)
        split = split_examples(examples, QUICK)
        assert (len(split.train), len(split.validation)) == (64, 16)
        assert {examples[index].key for index in split.validation.tolist()} == split.validation_keys
        assert split.validation_keys.isdisjoint({examples[index].key for index in split.train.tolist()})

    def test_by_candidate_problems_are_on_both_sides(self) -> None:
        _, examples = separable(problems=20)
        split = split_examples(examples, RECIPES["upstream"])
        assert (len(split.train), len(split.validation)) == (64, 16)
        assert sorted(split.train.tolist() + split.validation.tolist()) == list(range(80))
        assert {examples[index].key for index in split.train.tolist()} & split.validation_keys
        assert {examples[index].key for index in split.validation.tolist()} == split.validation_keys

    @pytest.mark.parametrize("loss", LOSSES)
    def test_batches_cover_all_once_and_comparisons_take_whole_problems(self, loss: str) -> None:
        group = torch.tensor([0, 1, 2, 0, 1, 2, 0, 3, 4, 4])
        labels = torch.tensor([1, 0, 1, 0, 0, 1, 1, 0, 1, 0]).float()
        train = torch.tensor([0, 1, 3, 4, 6, 7, 8, 9])
        recipe = replace(QUICK, loss=loss, batch_size=4)
        batches = epoch_batches(train, labels, group, recipe, 1)
        # Problem 1 has no right answer, problem 3 a single one.
        expected = {"dpo": [0, 3, 6, 8, 9], "infonca": [0, 1, 3, 4, 6, 8, 9], "nca": [0, 1, 3, 4, 6, 8, 9]}
        assert sorted(torch.cat(batches).tolist()) == expected.get(loss, train.tolist())
        assert all(len(batch) <= 4 for batch in batches)
        if loss in expected:
            problems = [set(group[batch].tolist()) for batch in batches]
            assert sum(map(len, problems)) == len(set().union(*problems))

    @pytest.mark.parametrize("loss", LOSSES)
    def test_shuffles_belong_to_seed_and_epoch_alone(self, loss: str) -> None:
        group, labels = torch.arange(40) // 4, torch.arange(40) % 2

        def order(seed: int, epoch: int) -> tuple[int, ...]:
            recipe = replace(QUICK, loss=loss, seed=seed)
            return tuple(torch.cat(epoch_batches(torch.arange(40), labels.float(), group, recipe, epoch)).tolist())

        places = [(seed, epoch) for seed in range(3) for epoch in range(3)]
        orders = [order(*place) for place in places]
        assert len(set(orders)) == 9
        assert [order(*place) for place in reversed(places)] == orders[::-1]

    def test_a_problem_larger_than_a_batch_is_a_batch(self) -> None:
        group = torch.tensor([0] * 9 + [1, 1])
        labels = torch.tensor([1.0, 0.0] * 5 + [1.0])
        batches = epoch_batches(torch.arange(11), labels, group, replace(QUICK, loss="nca", batch_size=4), 1)
        assert sorted(map(len, batches)) == [2, 9]

    @pytest.mark.parametrize("fraction", [0.01, 0.2, 0.5, 0.99])
    def test_hold_back_keeps_keys_together_and_both_sides_filled(self, fraction: float) -> None:
        keys = [f"k{index // 3}" for index in range(30)]
        held = hold_back(keys, fraction, seed=0)
        assert len(held) == min(max(1, round(10 * fraction)), 9)
        assert held == hold_back(keys[::-1], fraction, seed=0)


def test_upstream_is_the_papers_recipe() -> None:
    recipe = RECIPES["upstream"]
    assert (recipe.loss, recipe.learning_rate, recipe.weight_decay, recipe.batch_size) == ("bce", 1e-4, 1e-5, 16)
    assert (recipe.epochs, recipe.patience, recipe.validation) == (40, 3, 0.2)
    assert (recipe.standardize, recipe.start, recipe.split) == (False, "random", "candidate")
    assert (recipe.stop, recipe.keep) == ("loss", "last")


@pytest.mark.parametrize(
    "options",
    [
        {"batch_size": 0},
        {"epochs": 0},
        {"patience": 0},
        {"learning_rate": -1.0},
        {"weight_decay": float("nan")},
        {"validation": 1.0},
        {"validation": 0.0},
        {"loss": "mse"},
        {"start": "zero"},
        {"split": "token"},
        {"stop": "never"},
        {"keep": "first"},
        {"standardize": False},
    ],
    ids=str,
)
def test_impossible_recipes(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        Recipe(**options)
