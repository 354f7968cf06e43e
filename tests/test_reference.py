"""The oracle against the authors' formula, and against itself."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from swift_kernels import SwiftHead, reference


class UpstreamRewardModel(nn.Module):
    """The authors' model as its formula reads: one linear layer, sigmoid gate, masked weighted mean, clamp at 1e-8."""

    def __init__(self, features, gate):
        super().__init__()
        self.gate = gate
        if gate:
            self.fused_layer = nn.Linear(features, 2)
        else:
            self.reward_layer = nn.Linear(features, 1)

    def forward(self, padded, lengths):
        mask = torch.arange(padded.shape[1]) < torch.tensor(lengths)[:, None]
        if not self.gate:
            rewards = self.reward_layer(padded)[..., 0]
            return (rewards * mask).sum(1) / mask.sum(1).clamp(min=1)
        output = self.fused_layer(padded)
        gates = torch.sigmoid(output[..., 0]) * mask
        return (gates * output[..., 1]).sum(1) / gates.sum(1).clamp(min=1e-8)


@pytest.fixture
def packed():
    generator = torch.Generator().manual_seed(0)
    lengths, widths = [3, 1, 17, 8], [24, 24, 7]
    entries = [torch.randn(sum(lengths), width, generator=generator) for width in widths]
    return entries, lengths, torch.tensor([0, *lengths]).cumsum(0)


@pytest.mark.parametrize("gate", [True, False], ids=["gate", "mean"])
def test_upstream_formula_and_layout(packed, gate, tmp_path):
    """The same weights, moved over by name, give the same scores to 1e-6 on the same features."""
    entries, lengths, cu_seqlens = packed
    upstream = UpstreamRewardModel(sum(entry.shape[1] for entry in entries), gate)
    layer = upstream.fused_layer if gate else upstream.reward_layer
    head = SwiftHead([entry.shape[1] for entry in entries], gate=gate)
    head.weight.data, head.bias.data = layer.weight.data, layer.bias.data
    features = torch.cat(entries, dim=1)
    padded = nn.utils.rnn.pad_sequence(list(features.split(lengths)), batch_first=True)
    expected = upstream(padded, lengths)
    torch.testing.assert_close(head(entries, cu_seqlens), expected, rtol=0, atol=1e-6)

    state = head.init_state(len(lengths))
    for token in range(max(lengths)):
        slots = torch.tensor([row if token < length else -1 for row, length in enumerate(lengths)])
        at = torch.tensor([min(int(cu_seqlens[row]) + token, features.shape[0] - 1) for row in range(len(lengths))])
        head.step([entry[at] for entry in entries], state, slots)
    torch.testing.assert_close(head.scores(state), expected.detach(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("gate", [True, False], ids=["gate", "mean"])
def test_step_equals_sequence_in_float64(packed, gate):
    entries, lengths, cu_seqlens = packed
    entries = [entry.double() for entry in entries]
    outputs = 2 if gate else 1
    weight = torch.randn(outputs, sum(entry.shape[1] for entry in entries), dtype=torch.float64)
    bias = torch.randn(outputs, dtype=torch.float64)
    sums = torch.zeros(len(lengths), 2, dtype=torch.float64)
    counts = torch.zeros(len(lengths), dtype=torch.int32)
    for row, length in enumerate(lengths):
        for token in range(length):
            at = int(cu_seqlens[row]) + token
            reference.score_step(
                [entry[at : at + 1] for entry in entries], weight, bias, torch.tensor([row]), sums, counts
            )
    assert counts.tolist() == lengths
    torch.testing.assert_close(
        reference.finalize(sums, counts), reference.score_sequence(entries, weight, bias, cu_seqlens, gate)[0][:, 0]
    )


def test_gradients_of_the_whole_sequence(packed):
    entries, _, cu_seqlens = packed
    entries = [entry.double().requires_grad_() for entry in entries]
    features = sum(entry.shape[1] for entry in entries)
    weight = torch.randn(2, features, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda weight, bias, *entries: reference.score_sequence(entries, weight, bias, cu_seqlens),
        (weight, bias, *entries),
    )


def test_gates_that_underflow_give_zero_as_upstream(packed):
    entries, lengths, cu_seqlens = packed
    head = SwiftHead([entry.shape[1] for entry in entries])
    head.bias.data[0] = -1e4
    assert head(entries, cu_seqlens).tolist() == [0.0] * len(lengths)
    assert UpstreamRewardModel(2, True)(torch.zeros(1, 1, 2), [0]).item() == 0.0


def test_a_sequence_without_tokens_has_no_score():
    head = SwiftHead([4])
    scores = head([torch.randn(3, 4)], torch.tensor([0, 0, 3, 3]))
    assert scores.isnan().tolist() == [True, False, True]


@pytest.mark.parametrize("rows", [1, 2, 7, 64, 257])
def test_a_row_does_not_depend_on_its_batch(rows):
    generator = torch.Generator().manual_seed(1)
    entry = torch.randn(rows, 31, generator=generator)
    weight, bias = torch.randn(2, 31, generator=generator), torch.randn(2, generator=generator)
    sums, counts = torch.zeros(rows, 2), torch.zeros(rows, dtype=torch.int32)
    reference.score_step([entry], weight, bias, torch.arange(rows), sums, counts)
    for row in {0, rows // 2, rows - 1}:
        alone, count = torch.zeros(1, 2), torch.zeros(1, dtype=torch.int32)
        reference.score_step([entry[row : row + 1]], weight, bias, torch.tensor([0]), alone, count)
        assert torch.equal(alone[0], sums[row])
