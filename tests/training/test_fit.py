from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from swift_kernels import SwiftHead
from swift_kernels.head import HeadConfig
from swift_kernels.training import standardize
from swift_kernels.training.activations import Activations
from swift_kernels.training.fit import (
    RECIPES,
    Epoch,
    Example,
    NothingToLearnError,
    Recipe,
    fit,
    fit_heads,
)
from swift_kernels.training.losses import LOSSES
from swift_kernels.training.split import split_examples
from tests.training.data import QUICK, facts_of, held_out, separable


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


class TestRefit:
    @pytest.mark.parametrize("start", ["ridge", "random"])
    def test_the_first_fit_is_as_without(self, start: str) -> None:
        activations, examples = separable(noise=2.0)
        recipe = replace(QUICK, start=start, epochs=5)
        alone, refitted = SwiftHead([3, 2]), SwiftHead([3, 2])
        expected = fit(alone, activations, examples, recipe)
        result = fit(refitted, activations, examples, replace(recipe, refit=True))
        assert result == expected
        assert expected.validated is None
        assert result.validated is not None
        assert torch.equal(result.validated.weight, alone.weight)
        assert torch.equal(result.validated.bias, alone.bias)
        assert not torch.equal(refitted.weight, alone.weight)

    def test_learns_from_the_problems_held_back(self) -> None:
        activations, examples = separable(noise=2.0)
        # The last of a fixed number of epochs is kept: what is held back decides nothing else.
        recipe = replace(QUICK, epochs=3, keep="last", stop="loss", refit=True)
        heads = SwiftHead([3, 2]), SwiftHead([3, 2])
        first = fit(heads[0], activations, examples, recipe)
        turned = [
            replace(example, correct=example.correct != (example.key in first.validation_keys)) for example in examples
        ]
        second = fit(heads[1], activations, turned, recipe)
        assert first.validated is not None
        assert second.validated is not None
        assert torch.equal(first.validated.weight, second.validated.weight)
        assert not torch.equal(heads[0].weight, heads[1].weight)

    def test_the_start_is_a_ridge_regression_on_all_problems(self) -> None:
        activations, examples = separable(noise=2.0)
        head = SwiftHead([3, 2], gate=False)
        # Without a learning rate, the start is what is kept.
        result = fit(head, activations, examples, replace(QUICK, start="ridge", epochs=1, learning_rate=0, refit=True))
        everything = torch.arange(len(activations.lengths))
        keep = torch.ones(len(everything), dtype=torch.bool)
        statistics, means = standardize.survey(activations, everything, keep, torch.device("cpu"))
        means = (means - statistics.mean.float()) * statistics.inverse_deviation.float()
        labels = torch.tensor([float(example.correct) for example in examples])
        assert result.penalty is not None
        ridge = standardize.ridge_paths(means, labels, torch.ones(len(labels)), (result.penalty,))
        weight, _ = statistics.fold(ridge, torch.zeros(1), torch.arange(5))
        # The scale is the first fit's.
        direction = head.weight[0].double() / head.weight.norm().double()
        torch.testing.assert_close(direction, weight[0] / weight.norm(), rtol=1e-5, atol=1e-6)

    def test_serves_some_heads_of_a_sweep_alone(self) -> None:
        activations, examples = separable(noise=2.0)
        recipes = [replace(QUICK, epochs=3, refit=refit) for refit in (False, True)]
        heads = [SwiftHead([3, 2]), SwiftHead([3, 2])]
        results = fit_heads(heads, activations, examples, recipes)
        assert results[0].validated is None
        assert results[1].validated is not None
        assert torch.equal(heads[0].weight, results[1].validated.weight)


@pytest.mark.parametrize("pace", [1.0, 0.1, 3.0])
def test_the_gate_learns_at_its_own_pace(pace: float) -> None:
    activations, examples = separable(noise=2.0)
    recipe = replace(QUICK, epochs=1, batch_size=1000, keep="last", standardize=False, weight_decay=0, gate_pace=pace)
    head = SwiftHead([3, 2])
    torch.manual_seed(recipe.seed)
    head.reset_parameters()
    before = head.weight.clone()
    fit(head, activations, examples, recipe)
    # AdamW's first step moves every weight by the learning rate.
    moved = (head.weight - before).abs()
    torch.testing.assert_close(moved[0], torch.full((5,), pace * recipe.learning_rate), rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(moved[1], torch.full((5,), recipe.learning_rate), rtol=1e-3, atol=1e-6)


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
        with pytest.raises(
            NothingToLearnError, match=f"'problem {response // 4}' has 1 of 2 features NaN or infinite in"
        ):
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
