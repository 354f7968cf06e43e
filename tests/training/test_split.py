from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from swift_kernels.training.fit import RECIPES, hold_back
from swift_kernels.training.losses import LOSSES
from swift_kernels.training.split import epoch_batches, split_examples
from tests.training.data import QUICK, separable


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
