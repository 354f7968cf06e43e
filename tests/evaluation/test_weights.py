from __future__ import annotations

import pytest
import torch

from swift_kernels import SwiftHead
from swift_kernels.evaluation.weights import weight_mass
from swift_kernels.head import HeadConfig


def make_head(gate: bool = True) -> SwiftHead:
    head = SwiftHead(HeadConfig((2, 1), layers=(0, 3), num_hidden_layers=3, gate=gate)).requires_grad_(False)
    rows = torch.tensor([[3.0, 0.0, -4.0], [1.0, -2.0, 2.0]])
    head.weight.copy_(rows if gate else rows[1:])
    return head


def test_shares_are_of_the_squared_norm() -> None:
    first, last = weight_mass(make_head())
    assert (first.entry, last.entry) == (0, 3)
    assert (first.gate, last.gate) == pytest.approx((9 / 25, 16 / 25))
    assert (first.reward, last.reward) == pytest.approx((5 / 9, 4 / 9))


def test_features_that_hardly_move_count_little() -> None:
    first, last = weight_mass(make_head(), torch.tensor([10.0, 0.0, 1.0]))
    assert (first.gate, last.gate) == pytest.approx((900 / 916, 16 / 916))
    assert (first.reward, last.reward) == pytest.approx((100 / 104, 4 / 104))
    with pytest.raises(ValueError, match=r"deviation has shape \[2\]: expected \[3\]"):
        weight_mass(make_head(), torch.ones(2))


def test_heads_without_a_gate_or_without_weight() -> None:
    head = make_head(gate=False)
    assert [own.gate for own in weight_mass(head)] == [None, None]
    assert sum(own.reward for own in weight_mass(head)) == pytest.approx(1)
    head.weight.zero_()
    assert [own.reward for own in weight_mass(head)] == [0, 0]


@pytest.mark.parametrize(
    ("config", "names"),
    [
        (HeadConfig((7,), "logits"), ["logits"]),
        (HeadConfig((8,), "top_logprobs"), ["top_logprobs"]),
        (HeadConfig((3, 4)), [0, 1]),
    ],
    ids=["logits", "top_logprobs", "no model"],
)
def test_entries_have_names(config: HeadConfig, names: list[int | str]) -> None:
    assert [own.entry for own in weight_mass(SwiftHead(config))] == names
