"""The Triton norms against their float64 definition, on CUDA, or on CPU under Triton's interpreter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

import triton.knobs
import triton.language as tl

from swift_kernels import checks, reference, schema
from swift_kernels.ops.rms_norm_score import MAX_BLOCK, rms_norm_score_triton, rms_norm_triton
from swift_kernels.state import ScoreState
from tests.oracle import EPS, dot_depth, gate_error

if triton.knobs.runtime.interpret:
    DEVICE = "cpu"
elif torch.cuda.is_available():
    DEVICE = "cuda"
else:
    pytest.skip("needs CUDA; test_interpreter.py runs this file on CPU", allow_module_level=True)

on_gpu = [pytest.mark.gpu, pytest.mark.skipif(DEVICE != "cuda", reason="needs a CUDA device")]
NORM_EPS = 1e-5
MODES = {"Llama": (False, True), "OLMo2": (False, False), "Gemma": (True, False)}
"""unit_offset and round_first."""

every_mode = pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
every_dtype = pytest.mark.parametrize("dtype", checks.HIDDEN_STATE_DTYPES, ids=lambda dtype: str(dtype)[6:])


@pytest.fixture(autouse=True)
def rounding_to_nearest(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's interpreter cuts float32 off where it makes bfloat16 of it; GPUs round to the nearest, ties to even."""
    if DEVICE != "cpu":
        return
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def rounded(data, input_dtype, output_dtype, rounding_mode):
        if (input_dtype, output_dtype) != (tl.float32, tl.bfloat16):
            return convert(data, input_dtype, output_dtype, rounding_mode)
        return torch.from_numpy(np.array(data)).bfloat16().view(torch.uint16).numpy()

    monkeypatch.setattr(interpreter, "_convert_float", rounded)


def random_rows(rows: int, width: int, dtype: torch.dtype, padding: int = 0, offset: int = 0) -> Tensor:
    """`[rows, width]`, of unlike magnitudes, behind `offset` elements and with `padding` NaN between the rows."""
    storage = torch.full((rows * (width + padding) + offset,), torch.nan, dtype=dtype, device=DEVICE)
    view = storage[offset:].view(rows, width + padding)[:, :width]
    return view.copy_(torch.randn(rows, width) * torch.logspace(-2, 2, max(rows, 1))[:rows, None])


def random_norm_weight(width: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(width).to(DEVICE, dtype)


def interval(rows: Tensor, norm_weight: Tensor, mode: tuple[bool, bool]) -> tuple[Tensor, Tensor]:
    """The least and the most that a norm may return.

    With n = `dot_depth`, the sum of squares is off by at most n eps of itself, and its root by half as much; the mean,
    `+ eps`, a `rsqrt` of 2 eps and the product with the row add less than 5 eps. All that follows is monotone in the
    normalised value, and rounds where the definition does, so its two ends give those of the result.
    """
    unit_offset, round_first = mode
    dtype = rows.dtype
    values = rows.double()
    normalised = values * torch.rsqrt((values * values).mean(1, keepdim=True) + NORM_EPS)
    error = (dot_depth([rows.shape[1]]) / 2 + 5) * EPS
    ends = []
    for factor in (1 - error, 1 + error):
        end = normalised * factor
        if unit_offset:
            end = end * (1 + norm_weight.float()).double()
        else:
            end = norm_weight.double() * (end.to(dtype).double() if round_first else end)
        ends.append(end.to(dtype))
    return torch.minimum(*ends), torch.maximum(*ends)


def assert_norm_is_right(rows: Tensor, norm_weight: Tensor, mode: tuple[bool, bool]) -> Tensor:
    output = rms_norm_triton(rows, norm_weight, NORM_EPS, *mode)
    assert output.is_contiguous()
    assert (output.dtype, output.shape) == (rows.dtype, rows.shape)
    low, high = interval(rows, norm_weight, mode)
    assert ((low <= output) & (output <= high)).all()
    return output


@dataclass
class Step:
    """A step of entries that are normed one after the other; the last is scored as the norm returns it."""

    hidden_states: list[Tensor]
    norm_weights: list[Tensor]
    mode: tuple[bool, bool]
    weight: Tensor
    bias: Tensor
    slots: Tensor
    state: ScoreState
    score_last_output: bool = True

    def run(self, gate_reward: Tensor | None = None, triton: bool = True) -> list[Tensor]:
        op = rms_norm_score_triton if triton else schema.rms_norm_score
        state, last = self.state, len(self.hidden_states) - 1
        outputs, first_feature = [], 0
        for entry, (rows, norm_weight) in enumerate(zip(self.hidden_states, self.norm_weights, strict=True)):
            score_output = entry == last and self.score_last_output
            outputs.append(
                op(
                    rows,
                    norm_weight,
                    NORM_EPS,
                    *self.mode,
                    self.weight,
                    self.bias,
                    entry,
                    first_feature,
                    score_output,
                    entry == last,
                    self.slots,
                    state.sums,
                    state.token_count,
                    state.partials,
                    gate_reward,
                )
            )
            first_feature += rows.shape[1]
        return outputs

    def rows(self, index: Tensor) -> Step:
        """The same weights on other rows, into slots 0, 1, ... of a new state."""
        slots = torch.arange(len(index), device=DEVICE)
        state = ScoreState(len(index), self.state.widths, DEVICE)
        hidden_states = [entry[index] for entry in self.hidden_states]
        return Step(hidden_states, self.norm_weights, self.mode, self.weight, self.bias, slots, state)


def random_step(
    widths: Sequence[int],
    rows: int,
    dtype: torch.dtype = torch.bfloat16,
    weight_dtype: torch.dtype = torch.float32,
    gated: bool = True,
    mode: tuple[bool, bool] = MODES["Llama"],
    padding: int = 0,
    offset: int = 0,
) -> Step:
    torch.manual_seed(rows)
    features, outputs = sum(widths), 2 if gated else 1
    state = ScoreState(rows + 2, widths, DEVICE)
    state.sums.uniform_(0.5, 1.5)
    state.token_count.fill_(3)
    # What is read and was never written shows. More entries than there are widths, as an entry of chunks has.
    state.partials = torch.full((rows + 3, len(widths) + 2, 2), torch.nan, device=DEVICE)
    return Step(
        [random_rows(rows, width, dtype, padding, offset) for width in widths],
        [random_norm_weight(width, dtype) for width in widths],
        mode,
        (torch.randn(outputs, features) / features**0.5).to(DEVICE, weight_dtype),
        torch.randn(outputs).to(DEVICE, weight_dtype),
        torch.randperm(rows + 2)[:rows].to(DEVICE),
        state,
    )


def assert_step_is_right(step: Step) -> None:
    """Runs a step and compares everything it writes with the float64 definition, on what the last norm has returned.

    A logit is off by at most depth * eps * sum|W x|; a gate by a quarter of that (sigmoid' <= 1/4) and `gate_error`;
    sums by what goes into them and one rounding each of the product and the sum.
    """
    state, rows = step.state, len(step.slots)
    sums, count = state.sums.double(), state.token_count.clone()
    gate_reward = torch.full((rows, 2), -1.0, device=DEVICE)
    outputs = step.run(gate_reward)
    for entry, norm_weight, output in zip(step.hidden_states, step.norm_weights, outputs, strict=True):
        assert torch.equal(output.nan_to_num(), rms_norm_triton(entry, norm_weight, NORM_EPS, *step.mode).nan_to_num())

    live = step.slots >= 0
    slots = step.slots[live]
    scored = [*step.hidden_states[:-1], outputs[-1] if step.score_last_output else step.hidden_states[-1]]
    x = torch.cat([entry[live].double() for entry in scored], dim=1)
    weight, bias = step.weight.double(), step.bias.double()
    logits = x @ weight.T + bias
    gate, reward = reference.gate_and_reward(logits)
    logit_error = dot_depth(state.widths) * EPS * (x.abs() @ weight.abs().T + bias.abs())
    reward_error = logit_error[:, -1]
    error_of_gate = torch.zeros_like(reward_error)
    if len(bias) == 2:
        error_of_gate = logit_error[:, 0] / 4 + gate_error(logits[:, 0], gate)
    weighted_error = error_of_gate * reward.abs() + gate * reward_error + EPS * (gate * reward).abs()

    assert (gate_reward[~live] == -1).all(), "a skipped row was written"
    assert ((gate_reward[live, 0] - gate).abs() <= error_of_gate).all()
    assert ((gate_reward[live, 1] - reward).abs() <= reward_error).all()
    expected = sums.index_add(0, slots, torch.stack([gate * reward, gate], dim=1))
    errors = torch.stack([weighted_error, error_of_gate], dim=1) + EPS * expected[slots].abs()
    assert ((state.sums[slots] - expected[slots]).abs() <= errors).all()
    untouched = torch.ones(state.slots, dtype=torch.bool, device=DEVICE).index_fill_(0, slots, False)
    assert torch.equal(state.sums[untouched].double(), sums[untouched]), "another slot was written"
    assert torch.equal(state.token_count, count.index_add(0, slots, torch.ones_like(slots, dtype=torch.int32)))


def run_bits(step: Step) -> Tensor:
    step.run()
    return step.state.sums.clone()


@every_mode
@every_dtype
@pytest.mark.parametrize("width", [1, 7, 576, 1021])
def test_norm_rounds_where_its_definition_does(width, dtype, mode):
    assert_norm_is_right(random_rows(4, width, dtype), random_norm_weight(width, dtype), mode)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=lambda dtype: str(dtype)[6:])
def test_rounding_elsewhere_would_show(dtype):
    rows, norm_weight = random_rows(4, 576, dtype), random_norm_weight(576, dtype)
    for mode in MODES.values():
        output = rms_norm_triton(rows, norm_weight, NORM_EPS, *mode)
        for other in set(MODES.values()) - {mode}:
            low, high = interval(rows, norm_weight, other)
            assert ((output < low) | (high < output)).float().mean() > 0.05


@every_mode
@pytest.mark.parametrize("width", [8192, MAX_BLOCK + 8, 2 * MAX_BLOCK + 1021])
def test_norm_of_wide_rows(width, mode):
    assert_norm_is_right(random_rows(2, width, torch.bfloat16), random_norm_weight(width, torch.bfloat16), mode)


@every_dtype
def test_norm_of_no_rows(dtype):
    output = rms_norm_triton(random_rows(0, 64, dtype), random_norm_weight(64, dtype), NORM_EPS, False, True)
    assert (output.dtype, output.shape) == (dtype, (0, 64))


@pytest.mark.parametrize("width", [64, 67], ids=["16-byte loads", "odd width"])
@pytest.mark.parametrize(
    ("padding", "offset"), [(8, 0), (1, 0), (0, 3), (3, 5)], ids=["padded", "padded by 1", "shifted", "both"]
)
def test_bits_of_the_norm_do_not_depend_on_how_the_rows_lie(padding, offset, width):
    torch.manual_seed(0)
    rows, norm_weight = random_rows(5, width, torch.bfloat16), random_norm_weight(width, torch.bfloat16)
    lying = random_rows(5, width, torch.bfloat16, padding, offset).copy_(rows)
    shifted = torch.zeros(width + 3, dtype=norm_weight.dtype, device=DEVICE)[3:].copy_(norm_weight)
    expected = assert_norm_is_right(rows, norm_weight, MODES["Llama"])
    assert torch.equal(assert_norm_is_right(lying, shifted, MODES["Llama"]), expected)


@pytest.mark.parametrize("width", [64, 67], ids=["16-byte loads", "odd width"])
@pytest.mark.parametrize("rows", [7, 64])
def test_the_norm_of_a_row_is_bitwise_the_same_alone_anywhere_and_beside_nan(rows, width):
    norm_weight = random_norm_weight(width, torch.bfloat16)
    batch = random_rows(rows, width, torch.bfloat16)
    together = rms_norm_triton(batch, norm_weight, NORM_EPS, False, True)
    for row in (0, rows // 2, rows - 1):
        alone = rms_norm_triton(batch[row : row + 1], norm_weight, NORM_EPS, False, True)
        assert torch.equal(alone[0], together[row])
    order = torch.randperm(rows, device=DEVICE)
    beside_nan = batch[order]
    beside_nan[1::2] = torch.nan
    output = rms_norm_triton(beside_nan, norm_weight, NORM_EPS, False, True)
    assert torch.equal(output[0::2], together[order][0::2])
    assert output[1::2].isnan().all()


@pytest.mark.parametrize("score_last_output", [True, False], ids=["last output", "inputs"])
@pytest.mark.parametrize("gated", [True, False], ids=["gated", "no gate"])
@pytest.mark.parametrize("weight_dtype", checks.WEIGHT_DTYPES, ids=lambda dtype: f"W {str(dtype)[6:]}")
@every_dtype
def test_score_in_every_dtype(dtype, weight_dtype, gated, score_last_output):
    step = random_step((96, 64), 3, dtype, weight_dtype, gated)
    step.score_last_output = score_last_output
    assert_step_is_right(step)


@every_mode
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=lambda dtype: str(dtype)[6:])
def test_score_in_every_mode(dtype, mode):
    assert_step_is_right(random_step((576, 64), 3, dtype, mode=mode))


@pytest.mark.parametrize(
    "widths",
    [(1,), (7, 1), (1021, 1021), (8, 1024), (1025, 7, 576), (67, 64, 64), (MAX_BLOCK + 40,), (2 * MAX_BLOCK + 1, 8)],
    ids=lambda widths: "+".join(map(str, widths)),
)
@pytest.mark.parametrize("gated", [True, False], ids=["gated", "no gate"])
def test_score_at_every_kind_of_width(widths, gated):
    assert_step_is_right(random_step(widths, 2, gated=gated))


@pytest.mark.parametrize("entries", [1, 32, 33, 34, 83])
def test_score_of_many_entries(entries):
    assert_step_is_right(random_step((8,) * entries, 2))


@pytest.mark.parametrize(
    ("padding", "offset"), [(8, 0), (1, 0), (0, 3), (3, 5)], ids=["padded", "padded by 1", "shifted", "both"]
)
def test_bits_of_the_score_do_not_depend_on_how_the_rows_lie(padding, offset):
    for widths in ((64, 576), (67,)):
        step, lying = random_step(widths, 5), random_step(widths, 5, padding=padding, offset=offset)
        for entry, other in zip(step.hidden_states, lying.hidden_states, strict=True):
            assert torch.equal(entry, other)
        lying.weight = torch.zeros(step.weight.numel() + 1, device=DEVICE)[1:].view_as(step.weight).copy_(step.weight)
        assert torch.equal(run_bits(lying), run_bits(step))
        assert_step_is_right(lying)


def test_negative_slots_skip_their_rows_which_are_normalised_all_the_same():
    step = random_step((64, 67), 11)
    step.slots[::3] = -1
    step.slots[1] = -(2**40)
    step.hidden_states[0][3] = torch.nan
    assert_step_is_right(step)
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
    assert_step_is_right(random_step((64, 64), 0))


def test_steps_follow_each_other():
    step = random_step((64, 128), 5)
    for _ in range(3):
        assert_step_is_right(step)
        step.slots = step.slots.roll(1)


def test_a_gate_far_below_zero_underflows_and_one_far_above_saturates():
    step = random_step((64,), 2)
    step.bias[0] = -200.0
    assert_step_is_right(step)
    step.bias[0] = 200.0
    assert_step_is_right(step)


@pytest.mark.parametrize("widths", [(64, 136), (67, 8)], ids=["16-byte loads", "odd width"])
@pytest.mark.parametrize("rows", [7, 65])
def test_the_score_of_a_row_is_bitwise_the_same_alone_anywhere_and_beside_nan(rows, widths):
    batch = random_step(widths, 65).rows(torch.arange(rows, device=DEVICE))
    together = run_bits(batch)
    for row in (0, rows // 2, rows - 1):
        assert torch.equal(run_bits(batch.rows(torch.tensor([row], device=DEVICE)))[0], together[row])
    order = torch.randperm(rows, device=DEVICE)
    beside_nan = batch.rows(order)
    for entry in beside_nan.hidden_states:
        entry[1::2] = torch.nan
    assert torch.equal(run_bits(beside_nan)[0::2], together[order][0::2])


def test_metadata_is_checked_on_every_new_set_of_shapes():
    step = random_step((64, 64), 3)
    step.run()
    step.hidden_states[1] = step.hidden_states[1][:2]
    with pytest.raises(ValueError, match=r"slots is torch.int64 of shape \[3\]: expected contiguous int64 \[2\]"):
        step.run()
    step.hidden_states[1] = step.hidden_states[0]
    step.norm_weights[1] = step.norm_weights[1].half()
    with pytest.raises(ValueError, match=r"norm_weight is torch.float16"):
        step.run()
    with pytest.raises(ValueError, match=r"norm_weight is torch.float16"):
        rms_norm_triton(step.hidden_states[1], step.norm_weights[1], NORM_EPS, False, True)


def test_entries_and_features_are_checked_on_every_call():
    step = random_step((64,), 3)
    state = step.state

    def run(entry: int, first_feature: int) -> None:
        head_and_entry = (step.weight, step.bias, entry, first_feature, False, False)
        rows, norm_weight = step.hidden_states[0], step.norm_weights[0]
        state_tensors = (step.slots, state.sums, state.token_count, state.partials)
        rms_norm_score_triton(rows, norm_weight, NORM_EPS, False, True, *head_and_entry, *state_tensors)

    run(0, 0)
    with pytest.raises(ValueError, match="partials is"):
        run(state.partials.shape[1], 0)
    with pytest.raises(ValueError, match="entry is -1"):
        run(-1, 0)
    for first_feature in (-8, 8):
        with pytest.raises(ValueError, match="first_feature is"):
            run(0, first_feature)


def test_debug_checks_find_repeated_slots(monkeypatch):
    monkeypatch.setenv("SWIFT_KERNELS_DEBUG", "1")
    step = random_step((64,), 3)
    step.slots.fill_(1)
    with pytest.raises(ValueError, match="more than once"):
        step.run()


class TestOnGpu:
    pytestmark = on_gpu

    @pytest.mark.parametrize("rows", [1, 64, 2048])
    @pytest.mark.parametrize("width", [576, 2304, 2560, 4096, 8192, 16384])
    @every_mode
    @every_dtype
    def test_norm_at_real_shapes(self, dtype, mode, width, rows):
        hidden_states, norm_weight = random_rows(rows, width, dtype), random_norm_weight(width, dtype)
        expected = assert_norm_is_right(hidden_states, norm_weight, mode)
        for _ in range(3):  # from the second on, a launch skips Triton's own dispatch
            assert torch.equal(rms_norm_triton(hidden_states, norm_weight, NORM_EPS, *mode), expected)

    @pytest.mark.parametrize("rows", [1, 64, 257])
    @pytest.mark.parametrize("widths", [(4096,) * 33, (576,) * 31, (8192,) * 81], ids=lambda w: f"{len(w)}x{w[0]}")
    def test_score_at_real_shapes(self, widths, rows):
        step = random_step(widths, rows)
        assert_step_is_right(step)
        assert_step_is_right(step)

    @pytest.mark.parametrize("widths", [(4096,) * 33, (576,) * 31], ids=lambda w: f"{len(w)}x{w[0]}")
    def test_bits_at_real_shapes(self, widths):
        batch = random_step(widths, 257).rows(torch.arange(257, device=DEVICE))
        together = run_bits(batch)
        for row in range(0, 257, 16):
            assert torch.equal(run_bits(batch.rows(torch.tensor([row], device=DEVICE)))[0], together[row])
        for _ in range(5):
            order = torch.randperm(257, device=DEVICE)
            assert torch.equal(run_bits(batch.rows(order)), together[order])

    def test_rows_beyond_2_31_elements_are_read_and_written(self):
        rows, width, stride = 34, 4096, 2**26
        storage = torch.empty((rows - 1) * stride + width, dtype=torch.bfloat16, device=DEVICE)
        step = random_step((width,), rows)
        step.hidden_states[0] = storage.as_strided((rows, width), (stride, 1)).copy_(step.hidden_states[0])
        assert_step_is_right(step)
        del storage, step
        many = torch.ones(2**19 + 1, width, dtype=torch.bfloat16, device=DEVICE)
        many[-1, 0] = 3
        norm_weight = random_norm_weight(width, torch.bfloat16)
        output = rms_norm_triton(many, norm_weight, NORM_EPS, False, True)
        assert torch.equal(output[-1:], rms_norm_triton(many[-1:], norm_weight, NORM_EPS, False, True))

    def test_graph_replay_on_changed_inputs_is_bitwise_the_eager_step(self):
        captured, eager = random_step((4096,) * 33, 48), random_step((4096,) * 33, 48)
        captured.run()  # compiles; loading a kernel is not allowed while capturing
        eager.run()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs = captured.run()
        for replay in range(10):
            torch.manual_seed(replay)
            slots = torch.randperm(50, device=DEVICE)[:48]
            slots[torch.rand(48, device=DEVICE) < 0.2] = -1
            captured.slots.copy_(slots)
            eager.slots.copy_(slots)
            for static, other in zip(captured.hidden_states, eager.hidden_states, strict=True):
                static.copy_(other.normal_())
            graph.replay()
            for static, other in zip(outputs, eager.run(), strict=True):
                assert torch.equal(static, other)
            assert torch.equal(captured.state.sums, eager.state.sums)
            assert torch.equal(captured.state.token_count, eager.state.token_count)

    @pytest.mark.parametrize("with_gate_reward", [False, True], ids=["", "gate_reward"])
    def test_opcheck(self, with_gate_reward):
        step = random_step((576,), 5)
        norm = (step.hidden_states[0], step.norm_weights[0], NORM_EPS, *step.mode)
        torch.library.opcheck(torch.ops.swift_kernels.rms_norm.default, norm)
        head = (step.weight, step.bias, 0, 0, True, True)
        state = (step.slots, step.state.sums, step.state.token_count, step.state.partials.zero_())
        gate_reward = torch.zeros(5, 2, device=DEVICE) if with_gate_reward else None
        torch.library.opcheck(torch.ops.swift_kernels.rms_norm_score.default, (*norm, *head, *state, gate_reward))

    def test_torch_compile_takes_it_in_one_graph(self):
        compiled_step, step = random_step((576, 576), 5), random_step((576, 576), 5)
        assert schema.implementation("cuda") == "triton"
        compiled = torch.compile(lambda: compiled_step.run(triton=False), fullgraph=True)
        for _ in range(3):
            for output, expected in zip(compiled(), step.run(), strict=True):
                assert torch.equal(output, expected)
        assert torch.equal(compiled_step.state.sums, step.state.sums)
        assert torch.equal(compiled_step.state.token_count, step.state.token_count)
