from __future__ import annotations

import pytest
import torch

from swift_kernels import ScoreState, SwiftHead


@pytest.fixture
def head():
    torch.manual_seed(0)
    return SwiftHead([16, 8])


@pytest.fixture
def filled(head):
    """A state of five slots, slot 3 empty."""
    state = head.init_state(5)
    for _ in range(3):
        head.step([torch.randn(5, 16), torch.randn(5, 8)], state, torch.tensor([0, 1, 2, -1, 4]))
    return state


def test_twelve_bytes_a_slot():
    state = ScoreState(7, [4096] * 33)
    assert state.nbytes == 12 * 7
    assert state.scratch_nbytes == 7 * (132 * 2 * 4 + 4)
    assert "slots=7" in repr(state)


def test_reset_some_and_all(filled):
    before = filled.scores()
    filled.reset_(torch.tensor([1, -1, 4]))
    after = filled.scores()
    assert after.isnan().tolist() == [False, True, False, True, True]
    assert torch.equal(after[[0, 2]], before[[0, 2]])
    assert filled.reset_().scores().isnan().all()
    assert filled.token_count.tolist() == [0] * 5


def test_reorder_copies_repeated_parents(filled):
    before = filled.scores()
    filled.reorder_(torch.tensor([4, 4, 0, 1, 3]))
    torch.testing.assert_close(filled.scores(), before[[4, 4, 0, 1, 3]], equal_nan=True, rtol=0, atol=0)
    assert filled.token_count.tolist() == [3, 3, 3, 3, 0]


def test_select_is_independent(filled, head):
    selected = filled.select(torch.tensor([2, 2, 0]))
    assert torch.equal(selected.scores(), filled.scores()[[2, 2, 0]])
    head.step([torch.randn(3, 16), torch.randn(3, 8)], selected, torch.arange(3))
    assert selected.token_count.tolist() == [4, 4, 4]
    assert filled.token_count.tolist() == [3, 3, 3, 0, 3]


def test_a_selected_or_reordered_state_goes_on_as_its_parent_would(filled, head):
    entries = [torch.randn(1, 16), torch.randn(1, 8)]
    copy = filled.select(torch.tensor([1]))
    head.step(entries, copy, torch.tensor([0]))
    head.step(entries, filled, torch.tensor([1]))
    assert torch.equal(copy.scores()[0], filled.scores()[1])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda state: state.reset_(torch.tensor([5])), "slots contains 5"),
        (lambda state: state.reset_(torch.tensor([1, 1])), "slots contains 1 more than once"),
        (lambda state: state.reorder_(torch.tensor([0, 1, 2])), r"expected int64 \[5\]"),
        (lambda state: state.reorder_(torch.tensor([0, 1, 2, 3, -1])), "parents contains -1"),
        (lambda state: state.select(torch.tensor([9])), "rows contains 9"),
        (lambda state: state.select(torch.tensor([0.0])), "expected int64"),
        (lambda state: ScoreState(0, [4]), "slots is 0"),
        (lambda state: ScoreState(2, [4], max_rows=0), "max_rows is 0"),
    ],
    ids=["reset-range", "reset-twice", "reorder-length", "reorder-negative", "select", "dtype", "slots", "rows"],
)
def test_bad_indices_are_named(filled, call, message):
    before = filled.scores()
    with pytest.raises(ValueError, match=message):
        call(filled)
    torch.testing.assert_close(filled.scores(), before, equal_nan=True, rtol=0, atol=0)


def test_more_rows_than_slots_need_to_be_announced(head):
    entries, slots = [torch.randn(4, 16), torch.randn(4, 8)], torch.tensor([-1, 1, -1, 0])
    with pytest.raises((ValueError, RuntimeError), match="max_rows"):
        head.step(entries, head.init_state(2), slots)
    state = head.init_state(2, max_rows=4)
    head.step(entries, state, slots)
    assert state.token_count.tolist() == [1, 1]
