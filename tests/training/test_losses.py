from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from swift_kernels.evaluation import metrics
from swift_kernels.training.losses import (
    GROUPED,
    LOSSES,
    get_loss,
    right_wrong_pairs,
    taking_part,
    within_problem_auc,
)

# Problem 7 has a right and two wrong answers, problem 3 two right ones, problem 5 a single wrong one.
SCORES = [2.0, 0.0, 1.0, 0.0, 1.0, 3.0]
LABELS = [1.0, 0.0, 0.0, 1.0, 1.0, 0.0]
PROBLEMS = [7, 7, 7, 3, 3, 5]

SOFTPLUS = {x: math.log1p(math.exp(x)) for x in (-2, -1, 0, 1, 2, 3)}
"""-log sigmoid(-x)."""

EXPECTED = {
    "bce": (SOFTPLUS[-2] + SOFTPLUS[0] + SOFTPLUS[1] + SOFTPLUS[0] + SOFTPLUS[-1] + SOFTPLUS[3]) / 6,
    "hinge": (0 + 1 + 2 + 1 + 0 + 4) / 6,
    # 2 - 0 and 2 - 1.
    "dpo": (SOFTPLUS[-2] + SOFTPLUS[-1]) / 2,
    # All of the target is on the score 2; half of it on 0 and half on 1. The single answer has nothing beside it.
    "infonca": (math.log(math.exp(2) + 1 + math.e) - 2 + math.log(1 + math.e) - 0.5) / 2,
    "nca": (
        (SOFTPLUS[-2] + (SOFTPLUS[2] + SOFTPLUS[0] + SOFTPLUS[1]) / 3)
        + (0.5 * (SOFTPLUS[0] + SOFTPLUS[-1]) + 0.5 * (SOFTPLUS[0] + SOFTPLUS[1]))
    )
    / 2,
}


def inputs(**options: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    scores = torch.tensor(SCORES, dtype=torch.float64, **options)
    return scores, torch.tensor(LABELS), torch.tensor(PROBLEMS)


@pytest.mark.parametrize("name", LOSSES)
class TestEveryLoss:
    def test_value_by_hand(self, name: str) -> None:
        # The targets of InfoNCA and NCA leave exp(-100) to the wrong answers.
        assert LOSSES[name](*inputs()).tolist() == pytest.approx([EXPECTED[name]], rel=1e-12)

    def test_gradient(self, name: str) -> None:
        scores, labels, group = inputs(requires_grad=True)
        # Away from the corner of the hinge at 1.
        shifted = (scores.detach() * 0.7 + 0.05)[:, None].repeat(1, 2).requires_grad_()
        assert torch.autograd.gradcheck(lambda s: LOSSES[name](s, labels, group), (shifted,))

    def test_order_does_not_matter(self, name: str) -> None:
        scores, labels, group = inputs()
        order = torch.tensor([4, 0, 5, 2, 3, 1])
        assert LOSSES[name](scores[order], labels[order], group[order]).item() == pytest.approx(
            EXPECTED[name], rel=1e-12
        )

    def test_heads_are_independent(self, name: str) -> None:
        scores, labels, group = inputs()
        both = LOSSES[name](torch.stack([scores, -3 * scores + 1], dim=1), labels, group)
        assert both.shape == (2,)
        alone = [LOSSES[name](s, labels, group).item() for s in (scores, -3 * scores + 1)]
        assert both.tolist() == pytest.approx(alone, rel=1e-12)

    def test_large_scores_stay_finite(self, name: str) -> None:
        scores, labels, group = inputs()
        scores = (1e4 * scores).float().requires_grad_()
        value = LOSSES[name](scores, labels, group)
        value.sum().backward()
        assert value.isfinite().all()
        assert scores.grad is not None
        assert scores.grad.isfinite().all()

    def test_only_those_that_take_part_count(self, name: str) -> None:
        scores, labels, group = inputs()
        kept = taking_part(name, labels, group)
        expected = {"dpo": 3, "infonca": 5, "nca": 5}.get(name, 6)
        assert int(kept.sum()) == expected
        assert LOSSES[name](scores[kept], labels[kept], group[kept]).item() == pytest.approx(EXPECTED[name], rel=1e-12)
        moved = scores + 5.0 * ~kept
        assert LOSSES[name](moved, labels, group).item() == pytest.approx(EXPECTED[name], rel=1e-12)


@pytest.mark.parametrize("name", sorted(GROUPED))
def test_answers_that_stand_alone_have_no_part_in_a_comparison(name: str) -> None:
    scores = torch.tensor([2.0, -1.0], requires_grad=True)
    value = LOSSES[name](scores, torch.tensor([1.0, 0.0]), torch.tensor([0, 1]))
    value.sum().backward()
    assert value.tolist() == [0.0]
    assert scores.grad is not None
    assert scores.grad.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("label", [0.0, 1.0], ids=["all-wrong", "all-right"])
def test_infonca_draws_answers_of_one_grade_together(label: float) -> None:
    scores = torch.tensor([2.0, 0.0], dtype=torch.float64, requires_grad=True)
    LOSSES["infonca"](scores, torch.full((2,), label), torch.zeros(2, dtype=torch.int64)).sum().backward()
    assert scores.grad is not None
    softmax = math.exp(2) / (1 + math.exp(2))
    assert scores.grad.tolist() == pytest.approx([softmax - 0.5, 0.5 - softmax])


def test_pairs_are_all_of_a_problem_and_none_across() -> None:
    labels = torch.tensor([1, 0, 1, 0, 0, 1, 1]).float()
    group = torch.tensor([9, 2, 2, 9, 9, 4, 2])
    right, wrong = right_wrong_pairs(labels, group)
    assert sorted(zip(right.tolist(), wrong.tolist(), strict=True)) == [(0, 3), (0, 4), (2, 1), (6, 1)]


def test_auc_is_that_of_the_evaluation() -> None:
    generator = torch.Generator().manual_seed(0)
    group = torch.randint(20, (200,), generator=generator)
    labels = torch.randint(2, (200,), generator=generator).float()
    # Few distinct scores, so that there are ties.
    scores = torch.randint(5, (200, 3), generator=generator).float()
    labels[group == 0] = 1.0
    expected = []
    for head in range(3):
        values = [
            metrics.within_problem_auc(scores[group == g, head].tolist(), [bool(x) for x in labels[group == g]])
            for g in group.unique().tolist()
        ]
        assert math.isnan(values[0])
        kept = [value for value in values if not math.isnan(value)]
        expected.append(sum(kept) / len(kept))
    assert within_problem_auc(scores, labels, group).tolist() == pytest.approx(expected, rel=1e-12)


def test_auc_without_a_mixed_problem_is_nan() -> None:
    assert within_problem_auc(torch.zeros(2), torch.tensor([1.0, 0.0]), torch.tensor([0, 1])).isnan().all()


def test_unknown_loss_lists_the_known() -> None:
    with pytest.raises(ValueError, match="loss is 'mse': expected one of bce, hinge, dpo, infonca, nca"):
        get_loss("mse")
