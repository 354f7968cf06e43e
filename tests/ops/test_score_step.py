"""The Triton kernel against the float64 definition, on CUDA, or on CPU under Triton's interpreter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

import triton.knobs

from swift_kernels import checks, reference, schema
from swift_kernels.ops.chunks import TILE_ROWS, TILES
from swift_kernels.ops.score_step import score_step_triton
from swift_kernels.state import ScoreState
from tests.oracle import EPS, dot_depth, gate_error

if triton.knobs.runtime.interpret:
    DEVICE = "cpu"
elif torch.cuda.is_available():
    DEVICE = "cuda"
else:
    pytest.skip("needs CUDA; test_interpreter.py runs this file on CPU", allow_module_level=True)

on_gpu = [pytest.mark.gpu, pytest.mark.skipif(DEVICE != "cuda", reason="needs a CUDA device")]
ROW_BLOCK = TILE_ROWS * TILES
REAL = ((4096,) * 33, (576,) * 31, (8192,) * 81, (128256,), (50257,))
"""Llama-3.1-8B, SmolLM2-135M, Llama-3.1-70B, and the logits of Llama 3 and GPT-2."""


@dataclass
class Step:
    hidden_states: list[Tensor]
    weight: Tensor
    bias: Tensor
    slots: Tensor
    state: ScoreState

    def run(self, gate_reward: Tensor | None = None) -> None:
        state = self.state
        score_step_triton(
            self.hidden_states,
            self.weight,
            self.bias,
            self.slots,
            state.sums,
            state.token_count,
            state.partials,
            state.arrivals,
            gate_reward,
        )

    def rows(self, index: Tensor) -> Step:
        """The same weights on other rows, into slots 0, 1, ... of a new state."""
        slots = torch.arange(len(index), device=index.device)
        state = ScoreState(len(index), self.state.widths, index.device)
        return Step([entry[index] for entry in self.hidden_states], self.weight, self.bias, slots, state)


def random_entry(rows: int, width: int, dtype: torch.dtype, padding: int = 0) -> Tensor:
    """`[rows, width]` with a row stride of `width + padding`; what lies between the rows is NaN."""
    storage = torch.full((rows, width + padding), torch.nan, dtype=dtype, device=DEVICE)
    storage[:, :width] = torch.randn(rows, width, device=DEVICE).to(dtype)
    return storage[:, :width]


def random_step(
    widths: Sequence[int],
    rows: int,
    dtype: torch.dtype = torch.bfloat16,
    weight_dtype: torch.dtype = torch.float32,
    gated: bool = True,
    paddings: Sequence[int] = (0,),
) -> Step:
    torch.manual_seed(rows)
    features, outputs = sum(widths), 2 if gated else 1
    state = ScoreState(rows + 2, widths, DEVICE)
    state.sums.uniform_(0.5, 1.5)
    state.token_count.fill_(3)
    state.partials.fill_(torch.nan)  # a partial that is read and was never written shows
    return Step(
        [random_entry(rows, width, dtype, paddings[i % len(paddings)]) for i, width in enumerate(widths)],
        (torch.randn(outputs, features, device=DEVICE) / features**0.5).to(weight_dtype),
        torch.randn(outputs, device=DEVICE).to(weight_dtype),
        torch.randperm(rows + 2, device=DEVICE)[:rows],
        state,
    )


def assert_step_is_right(step: Step) -> None:
    """Runs a step and compares everything it writes with the float64 definition.

    A logit is off by at most depth * eps * sum|W x|; a gate by a quarter of that (sigmoid' <= 1/4) and `gate_error`;
    sums by what goes into them and one rounding each of the product and the sum.
    """
    state, rows = step.state, len(step.slots)
    sums, count = state.sums.double(), state.token_count.clone()
    expected = torch.full((rows, 2), -1.0, dtype=torch.float64, device=DEVICE)
    gate_reward = expected.float()
    weight, bias = step.weight.double(), step.bias.double()
    reference.score_step(step.hidden_states, weight, bias, step.slots, sums, count, gate_reward=expected)
    step.run(gate_reward)

    live = step.slots >= 0
    slots = step.slots[live]
    x = torch.cat([entry[live].double() for entry in step.hidden_states], dim=1)
    logit_error = dot_depth(state.widths) * EPS * (x.abs() @ weight.abs().T + bias.abs())
    reward_error = logit_error[:, -1]
    gate, reward = expected[live].unbind(1)
    error_of_gate = torch.zeros_like(reward_error)
    if len(bias) == 2:
        error_of_gate = logit_error[:, 0] / 4 + gate_error((x @ weight.T + bias)[:, 0], gate)
    weighted_error = error_of_gate * reward.abs() + gate * reward_error + EPS * (gate * reward).abs()

    assert torch.equal(gate_reward[~live], expected[~live].float()), "a skipped row was written"
    assert ((gate_reward[live, 0] - gate).abs() <= error_of_gate).all()
    assert ((gate_reward[live, 1] - reward).abs() <= reward_error).all()
    errors = torch.stack([weighted_error, error_of_gate], dim=1) + EPS * sums[slots].abs()
    assert errors.isfinite().all()
    assert ((state.sums[slots] - sums[slots]).abs() <= errors).all()
    untouched = torch.ones(state.slots, dtype=torch.bool, device=DEVICE).index_fill_(0, slots, False)
    assert torch.equal(state.sums[untouched].double(), sums[untouched]), "another slot was written"
    assert torch.equal(state.token_count, count)
    assert not state.arrivals.any(), "a counter was left behind"


def run_bits(step: Step) -> Tensor:
    step.run()
    assert not step.state.arrivals.any()
    return step.state.sums.clone()


@pytest.mark.parametrize("gated", [True, False], ids=["gated", "no gate"])
@pytest.mark.parametrize("weight_dtype", checks.WEIGHT_DTYPES, ids=lambda dtype: f"W {str(dtype)[6:]}")
@pytest.mark.parametrize("dtype", checks.HIDDEN_STATE_DTYPES, ids=lambda dtype: str(dtype)[6:])
def test_parity_in_every_dtype(dtype, weight_dtype, gated):
    assert_step_is_right(random_step((1024, 576), 9, dtype, weight_dtype, gated))


@pytest.mark.parametrize("width", [1, 7, 8, 576, 1021, 1024, 1025, 2048, 2560])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=lambda dtype: str(dtype)[6:])
def test_parity_at_every_kind_of_width(width, dtype):
    assert_step_is_right(random_step((width,), 3, dtype))


@pytest.mark.parametrize(
    ("widths", "paddings"),
    [
        pytest.param((1024, 8, 2560), (0,), id="mixed widths"),
        pytest.param((1025, 1, 7, 576), (0,), id="mixed odd widths"),
        pytest.param((576, 576), (64,), id="padded rows"),
        pytest.param((576, 1024, 576), (0, 8, 24), id="rows padded unlike"),
        pytest.param((576, 576), (1,), id="rows off alignment"),
        pytest.param((1021, 1021), (3,), id="odd widths, aligned rows"),
        pytest.param((64,) * 17, (0,), id="17 entries"),
        pytest.param((263200,), (0,), id="258 chunks"),
    ],
)
def test_parity_at_every_layout(widths, paddings):
    assert_step_is_right(random_step(widths, 3, paddings=paddings))


@pytest.mark.parametrize("rows", [1, TILE_ROWS, ROW_BLOCK, ROW_BLOCK + 1, 3 * ROW_BLOCK + 5])
def test_parity_at_every_kind_of_row_count(rows):
    assert_step_is_right(random_step((128, 64), rows))


def test_entries_need_not_begin_at_multiples_of_16_bytes():
    aligned, shifted = random_step((576, 576), 5), random_step((576, 576), 5)
    for index, entry in enumerate(shifted.hidden_states):
        storage = torch.empty(entry.numel() + 3, dtype=entry.dtype, device=DEVICE)
        shifted.hidden_states[index] = storage[3:].view_as(entry).copy_(entry)
    assert torch.equal(run_bits(shifted), run_bits(aligned))
    assert_step_is_right(shifted)


def test_negative_slots_skip_their_rows_and_nothing_of_them_is_read():
    step = random_step((576, 1021), ROW_BLOCK + 7)
    step.slots[::3] = -1
    step.slots[1] = -(2**40)
    for entry in step.hidden_states:
        entry[step.slots < 0] = torch.nan
    assert_step_is_right(step)


def test_a_step_in_which_every_row_is_skipped_changes_nothing():
    step = random_step((576,), 3)
    step.slots.fill_(-1)
    assert_step_is_right(step)


@pytest.mark.parametrize("slot", [5, 6, 2**31, 2**40], ids=["the first", "another", "2^31", "2^40"])
def test_a_slot_that_does_not_exist_skips_its_row_and_nothing_behind_the_state_is_written(slot):
    step = random_step((64, 67), 3)
    sums, token_count = torch.full((16, 2), 7.0, device=DEVICE), torch.full((16,), 7, dtype=torch.int32, device=DEVICE)
    step.state.sums, step.state.token_count = sums[:5], token_count[:5]
    step.slots = torch.tensor([4, slot, 0], device=DEVICE)
    gate_reward = torch.full((3, 2), -1.0, device=DEVICE)
    step.run(gate_reward)
    assert token_count.tolist() == [8, 7, 7, 7, 8, *[7] * 11]
    assert (sums[[1, 2, 3, *range(5, 16)]] == 7.0).all()
    assert (sums[[0, 4]] != 7.0).all()
    assert (gate_reward == -1.0).all(dim=1).tolist() == [False, True, False]


def test_a_step_of_no_rows_changes_nothing():
    assert_step_is_right(random_step((576,), 0))


def test_steps_follow_each_other():
    step = random_step((576, 128), 5)
    for _ in range(3):
        assert_step_is_right(step)
        step.slots = step.slots.roll(1)


def test_a_gate_far_below_zero_underflows_and_one_far_above_saturates():
    step = random_step((64,), 2)
    step.bias[0] = -200.0
    assert_step_is_right(step)
    step.bias[0] = 200.0
    assert_step_is_right(step)


def test_metadata_is_checked_on_every_new_set_of_shapes():
    step = random_step((64, 64), 3)
    step.run()
    step.hidden_states[1] = step.hidden_states[1][:2]
    with pytest.raises(ValueError, match="every entry holds the same rows"):
        step.run()


def test_debug_checks_find_repeated_slots(monkeypatch):
    monkeypatch.setenv("SWIFT_KERNELS_DEBUG", "1")
    step = random_step((64,), 3)
    step.slots.fill_(1)
    with pytest.raises(ValueError, match="more than once"):
        step.run()


# Few columns: the interpreter takes its time, and the order of additions within a row is that of any width.
@pytest.mark.parametrize("widths", [(64, 1032), (67,)], ids=["16-byte loads", "odd width"])
@pytest.mark.parametrize("rows", [7, 64, 257])
def test_a_row_is_bitwise_the_same_alone_anywhere_and_beside_nan(rows, widths):
    batch = random_step(widths, 257).rows(torch.arange(rows, device=DEVICE))
    together = run_bits(batch)
    for row in (0, rows // 2, rows - 1):
        alone = batch.rows(torch.tensor([row], device=DEVICE))
        assert torch.equal(run_bits(alone)[0], together[row])
    order = torch.randperm(rows, device=DEVICE)
    assert torch.equal(run_bits(batch.rows(order)), together[order])
    beside_nan = batch.rows(order)
    for entry in beside_nan.hidden_states:
        entry[1::2] = torch.nan
    assert torch.equal(run_bits(beside_nan)[0::2], together[order][0::2])


def test_every_run_gives_the_same_bits():
    step = random_step((64, 1032), ROW_BLOCK)
    rows = torch.arange(ROW_BLOCK, device=DEVICE)
    first = run_bits(step.rows(rows))
    for _ in range(20):
        assert torch.equal(run_bits(step.rows(rows)), first)


@pytest.mark.parametrize("padding", [0, 1, 8], ids=lambda padding: f"stride +{padding}")
def test_bits_do_not_depend_on_how_the_rows_lie(padding):
    for width in (576, 1021):
        step = random_step((width,), 5)
        padded = random_step((width,), 5, paddings=(padding,))
        assert torch.equal(padded.hidden_states[0], step.hidden_states[0])
        assert torch.equal(run_bits(padded), run_bits(step))


class TestOnGpu:
    pytestmark = on_gpu

    @pytest.mark.parametrize("rows", [1, 64, 512])
    @pytest.mark.parametrize("widths", REAL, ids=lambda widths: f"{len(widths)}x{widths[0]}")
    def test_parity_at_real_shapes(self, widths, rows):
        step = random_step(widths, rows)
        assert_step_is_right(step)
        assert_step_is_right(step)  # the second launch of a plan skips Triton's own dispatch

    @pytest.mark.parametrize("widths", REAL[:2], ids=lambda widths: f"{len(widths)}x{widths[0]}")
    def test_bits_at_real_shapes(self, widths):
        batch = random_step(widths, 257).rows(torch.arange(257, device=DEVICE))
        together = run_bits(batch)
        for row in range(0, 257, 16):
            assert torch.equal(run_bits(batch.rows(torch.tensor([row], device=DEVICE)))[0], together[row])
        for _ in range(20):
            order = torch.randperm(257, device=DEVICE)
            assert torch.equal(run_bits(batch.rows(order)), together[order])

    def test_rows_beyond_2_31_elements_are_read(self):
        rows, width, stride = 34, 4096, 2**26
        storage = torch.empty((rows - 1) * stride + width, dtype=torch.bfloat16, device=DEVICE)
        entry = storage.as_strided((rows, width), (stride, 1))
        assert (rows - 1) * stride >= 2**31
        step = random_step((width,), rows)
        step.hidden_states[0] = entry.copy_(step.hidden_states[0])
        assert_step_is_right(step)

    def test_graph_replay_on_changed_inputs_is_bitwise_the_eager_step(self):
        captured, eager = random_step((4096,) * 33, 48), random_step((4096,) * 33, 48)
        captured.run()  # compiles; loading a kernel is not allowed while capturing
        eager.run()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured.run()
        for replay in range(10):
            torch.manual_seed(replay)
            slots = torch.randperm(50, device=DEVICE)[:48]
            slots[torch.rand(48, device=DEVICE) < 0.2] = -1
            captured.slots.copy_(slots)
            eager.slots.copy_(slots)
            for static, other in zip(captured.hidden_states, eager.hidden_states, strict=True):
                static.copy_(other.normal_())
            graph.replay()
            eager.run()
            assert torch.equal(captured.state.sums, eager.state.sums)
            assert torch.equal(captured.state.token_count, eager.state.token_count)
            assert not captured.state.arrivals.any()

    def test_two_devices(self):
        if torch.cuda.device_count() < 2:
            pytest.skip("needs two CUDA devices")
        step = random_step((576,), 3)
        expected = run_bits(random_step((576,), 3))
        other = Step(
            [entry.to("cuda:1") for entry in step.hidden_states],
            *(tensor.to("cuda:1") for tensor in (step.weight, step.bias, step.slots)),
            ScoreState(5, (576,), "cuda:1"),
        )
        other.state.sums.copy_(step.state.sums)
        assert torch.equal(run_bits(other).cpu(), expected.cpu())

    @pytest.mark.parametrize("with_gate_reward", [False, True], ids=["", "gate_reward"])
    def test_opcheck(self, with_gate_reward):
        step = random_step((576, 1021), 5)
        state = step.state
        gate_reward = torch.zeros(5, 2, device=DEVICE) if with_gate_reward else None
        torch.library.opcheck(
            torch.ops.swift_kernels.score_step.default,
            (
                step.hidden_states,
                step.weight,
                step.bias,
                step.slots,
                state.sums,
                state.token_count,
                state.partials,
                state.arrivals,
                gate_reward,
            ),
        )

    def test_torch_compile_takes_it_in_one_graph(self):
        compiled_step, step = random_step((576, 576), 5), random_step((576, 576), 5)
        assert schema.implementation("cuda") == "triton"

        @torch.compile(fullgraph=True)
        def decode(hidden_states, weight, bias, slots, sums, token_count, partials, arrivals):
            hidden_states = [entry * 2 for entry in hidden_states]
            schema.score_step(hidden_states, weight, bias, slots, sums, token_count, partials, arrivals)
            return hidden_states[-1] + 1

        state = compiled_step.state
        for _ in range(3):
            out = decode(
                compiled_step.hidden_states,
                compiled_step.weight,
                compiled_step.bias,
                compiled_step.slots,
                state.sums,
                state.token_count,
                state.partials,
                state.arrivals,
            )
        assert torch.equal(out, compiled_step.hidden_states[-1] * 2 + 1)
        step.hidden_states = [entry * 2 for entry in step.hidden_states]
        for _ in range(3):
            step.run()
        assert torch.equal(state.sums, step.state.sums)
        assert torch.equal(state.token_count, step.state.token_count)

    @pytest.mark.slow
    def test_100_000_launches_on_two_streams(self):
        from bench.gpu_stress import stress

        result = stress(launches=100_000)
        assert result["wrong_steps"] == 0
        assert result["states_equal_to_one_stream"]
