"""The C++ kernels of fused norms against the references: the norm bit for bit, its scores within rounding."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from swift_kernels import checks, reference, schema
from tests.oracle import Bounded, dot_depth
from tests.test_cpp import FP32_UNIT_ROUNDOFF, Head, isa, kernel_loaded, make_head, make_hidden_states  # noqa: F401
from tests.test_cpp_sequence import every_dtype, every_isa, randn, threads

ops = torch.ops.swift_kernels
EPS = 1e-5
WIDTHS = [7, 1025, 64, 1, 2560]
every_mode = pytest.mark.parametrize(
    ("unit_offset", "round_first"), [(True, False), (False, True), (False, False)], ids=["gemma", "llama", "olmo2"]
)


class Step:
    """The state of a step whose entries are normed one after the other, the last one scored as the norm returns it."""

    def __init__(self, head: Head, slots: Tensor, widths: Sequence[int], count: int = 300) -> None:
        self.head, self.slots, self.widths = head, slots, widths
        rows = slots.shape[0]
        self.sums = torch.zeros(count, 2)
        self.token_count = torch.zeros(count, dtype=torch.int32)
        # What is not written stays NaN: two rows and an entry more than are needed.
        self.partials = torch.full((rows + 2, len(widths) + 1, 2), math.nan)
        self.gate_reward = torch.full((rows, 2), math.nan)

    def run(self, hidden_states: Sequence[Tensor], norm_weights: Sequence[Tensor], score_last_output: bool = True):
        """Runs every entry; returns what the norms return."""
        outputs, first_feature = [], 0
        for entry, (rows, norm_weight) in enumerate(zip(hidden_states, norm_weights, strict=True)):
            last = entry == len(self.widths) - 1
            outputs.append(
                ops.rms_norm_score(
                    rows,
                    norm_weight,
                    EPS,
                    False,
                    True,
                    *self.head,
                    entry,
                    first_feature,
                    last and score_last_output,
                    last,
                    self.slots,
                    self.sums,
                    self.token_count,
                    self.partials,
                    self.gate_reward,
                )
            )
            first_feature += rows.shape[1]
        return outputs

    def bits(self) -> Tensor:
        """Gates, rewards, sums and partial sums of the scored rows, as int32."""
        live = self.slots >= 0
        partials = self.partials[: live.shape[0], : len(self.widths)][live].flatten(1)
        values = torch.cat([self.gate_reward[live], self.sums[self.slots[live]], partials], dim=1)
        return values.view(torch.int32)


def make_norm_weights(widths: Sequence[int], dtype: torch.dtype) -> list[Tensor]:
    return [(1 + randn(width, seed=width) / 4).to(dtype) for width in widths]


@every_isa
@every_mode
@every_dtype
@pytest.mark.parametrize("width", [1, 2, 7, 31, 33, 576, 1021, 2560])
def test_norm_is_the_reference_bit_for_bit(
    width: int, dtype: torch.dtype, unit_offset: bool, round_first: bool
) -> None:
    """Squares of small integers add up exactly in any order: all that is left is elementwise."""
    generator = torch.Generator().manual_seed(width)
    rows = torch.randint(-4, 5, (9, width), generator=generator).to(dtype)
    rows[3] = 0
    rows[5] /= 1024
    norm_weight = randn(width).to(dtype)
    output = ops.rms_norm(rows, norm_weight, EPS, unit_offset, round_first)
    assert output.dtype == dtype
    assert torch.equal(output, reference.rms_norm(rows, norm_weight, EPS, unit_offset, round_first))


@every_isa
@every_mode
@every_dtype
@pytest.mark.parametrize("width", [1, 1025, 4096])
def test_norm_matches_float64(width: int, dtype: torch.dtype, unit_offset: bool, round_first: bool) -> None:
    """The mean square is off by `dot_depth` roundings, and its root by half of that; then scale, product, weight and
    the two roundings to the dtype (round_first has both)."""
    rows = randn(11, width).to(dtype)
    norm_weight = randn(width, seed=3).to(dtype)
    expected = reference.rms_norm(rows.double(), norm_weight.double(), EPS, unit_offset, round_first)
    relative = (dot_depth([width]) / 2 + 7) * FP32_UNIT_ROUNDOFF + 1.01 * torch.finfo(dtype).eps
    bound = relative * expected.abs() + torch.finfo(dtype).smallest_normal
    Bounded(expected, bound).check(ops.rms_norm(rows, norm_weight, EPS, unit_offset, round_first), "the norm")


@every_isa
@every_dtype
def test_values_that_are_not_finite_and_large_ones_round_as_in_the_reference(dtype: torch.dtype) -> None:
    rows = torch.ones(6, 40)
    rows[0, 3], rows[1, 3], rows[2, 3], rows[3, 39] = math.nan, math.inf, -math.inf, 60000.0
    rows[4] = 1e-8
    norm_weight = torch.full((40,), 30000.0)
    norm_weight[7] = math.inf
    rows, norm_weight = rows.to(dtype), norm_weight.to(dtype)
    for unit_offset, round_first in ((True, False), (False, True), (False, False)):
        output = ops.rms_norm(rows, norm_weight, EPS, unit_offset, round_first)
        expected = reference.rms_norm(rows, norm_weight, EPS, unit_offset, round_first)
        torch.testing.assert_close(output, expected, rtol=2 * torch.finfo(dtype).eps, atol=0, equal_nan=True)


@every_isa
@pytest.mark.parametrize("score_last_output", [True, False], ids=["output", "input"])
@pytest.mark.parametrize("outputs", [2, 1], ids=["gated", "ungated"])
@pytest.mark.parametrize("weight_dtype", checks.WEIGHT_DTYPES, ids=lambda dtype: f"weight-{dtype}"[13:])
@every_dtype
def test_scores_match_float64(
    dtype: torch.dtype, weight_dtype: torch.dtype, outputs: int, score_last_output: bool
) -> None:
    """Gates and rewards as in `test_cpp.assert_within_rounding`; what the last norm returns is scored as it is."""
    head = make_head(WIDTHS, outputs, weight_dtype)
    slots = torch.tensor([4, -1, 0, 8, 2, -7, 1])
    step = Step(head, slots, WIDTHS, count=9)
    hidden_states, norm_weights = make_hidden_states(7, WIDTHS, dtype), make_norm_weights(WIDTHS, dtype)
    normed = step.run(hidden_states, norm_weights, score_last_output)
    for rows, norm_weight, output in zip(hidden_states, norm_weights, normed, strict=True):
        assert torch.equal(output, ops.rms_norm(rows, norm_weight, EPS, False, True)), "scoring changes the norm"

    live = slots >= 0
    scored = [*hidden_states[:-1], normed[-1] if score_last_output else hidden_states[-1]]
    features = torch.cat([entry.double() for entry in scored], dim=1)[live]
    weight, bias = head.weight.double(), head.bias.double()
    gate, reward = reference.gate_and_reward(features @ weight.T + bias)
    error = dot_depth(WIDTHS) * FP32_UNIT_ROUNDOFF
    bound = error / (1 - error) * (features.abs() @ weight.abs().T + bias.abs())
    Bounded(reward, bound[:, -1]).check(step.gate_reward[live, 1], "rewards")
    gate_bound = bound[:, 0] / 4 + 8 * FP32_UNIT_ROUNDOFF * gate if outputs == 2 else torch.zeros_like(gate)
    Bounded(gate, gate_bound).check(step.gate_reward[live, 0], "gates")

    gates, rewards = step.gate_reward[live].unbind(1)
    assert torch.equal(step.sums[slots[live]], torch.stack([gates * rewards, gates], dim=1))
    assert step.token_count[slots[live]].eq(1).all()
    assert step.token_count.sum() == live.sum()
    assert step.gate_reward[~live].isnan().all(), "a skipped row was written"
    written = torch.zeros(9, 6, 2, dtype=torch.bool)
    written[:7, :5, :outputs] = live[:, None, None]
    assert torch.equal(~step.partials.isnan(), written)


@every_isa
def test_steps_add_up() -> None:
    widths = [64, 1030]
    step = Step(make_head(widths), torch.arange(3), widths, count=3)
    sums = torch.zeros(3, 2)
    for token in range(3):
        step.run(make_hidden_states(3, widths, seed=token), make_norm_weights(widths, torch.float32))
        gates, rewards = step.gate_reward.unbind(1)
        sums += torch.stack([gates * rewards, gates], dim=1)
    assert torch.equal(step.sums, sums)
    assert step.token_count.tolist() == [3, 3, 3]


@every_isa
@every_dtype
def test_a_row_does_not_depend_on_its_batch(dtype: torch.dtype) -> None:
    widths = [576, 1025, 2560]
    head = make_head(widths)
    norm_weights = make_norm_weights(widths, dtype)
    every = make_hidden_states(257, widths, dtype)
    whole = Step(head, torch.arange(257), widths)
    normed = whole.run(every, norm_weights)
    expected = whole.bits()
    generator = torch.Generator().manual_seed(3)
    for count in (1, 2):
        with threads(count):
            for size in (1, 7, 64, 257):
                rows = torch.randperm(257, generator=generator)[:size]
                batch = [entry[rows] for entry in every]
                step = Step(head, rows, widths)
                assert all(torch.equal(a, b[rows]) for a, b in zip(step.run(batch, norm_weights), normed, strict=True))
                assert torch.equal(step.bits(), expected[rows])
                # Neighbours of NaN that are scored, and others that are skipped.
                poisoned = [torch.stack([e, torch.full_like(e, math.nan)], dim=1).flatten(0, 1) for e in batch]
                for neighbours in (torch.full_like(rows, -1), 257 + torch.arange(size)):
                    step = Step(head, torch.stack([rows, neighbours], dim=1).flatten(), widths, count=514)
                    outputs = step.run(poisoned, norm_weights)
                    assert all(torch.equal(a[::2], b[rows]) for a, b in zip(outputs, normed, strict=True))
                    assert torch.equal(step.bits()[:: 2 if neighbours[0] > 0 else 1], expected[rows])


@every_isa
def test_rows_with_a_stride_of_their_own() -> None:
    widths = [64, 1025]
    head, norm_weights = make_head(widths), make_norm_weights(widths, torch.bfloat16)
    hidden_states = make_hidden_states(6, widths, torch.bfloat16)
    views = []
    for entry in hidden_states:
        whole = torch.full((6, 3, entry.shape[1] + 1), math.nan, dtype=entry.dtype)
        whole[:, 1, 1:] = entry
        views.append(whole[:, 1, 1:])
    contiguous, strided = (Step(head, torch.arange(6), widths) for _ in range(2))
    expected = contiguous.run(hidden_states, norm_weights)
    outputs = strided.run(views, norm_weights)
    assert all(output.is_contiguous() for output in outputs)
    assert all(torch.equal(*pair) for pair in zip(outputs, expected, strict=True))
    assert torch.equal(strided.bits(), contiguous.bits())


@every_isa
def test_no_rows_and_no_width() -> None:
    head = make_head([8])
    assert ops.rms_norm(torch.empty(0, 8), torch.ones(8), EPS, False, True).shape == (0, 8)
    assert ops.rms_norm(torch.empty(3, 0), torch.empty(0), EPS, False, True).shape == (3, 0)
    step = Step(head, torch.empty(0, dtype=torch.int64), [8])
    step.run([torch.empty(0, 8)], [torch.ones(8)])
    assert not step.token_count.any()
    step = Step(head, torch.tensor([-1, -1]), [8])
    (output,) = step.run([randn(2, 8)], [torch.ones(8)])
    assert torch.equal(output, ops.rms_norm(randn(2, 8), torch.ones(8), EPS, False, True))
    assert not step.sums.any()
    assert step.partials.isnan().all()


def _arguments() -> dict[str, object]:
    return {
        "hidden_states": randn(3, 6),
        "norm_weight": torch.ones(6),
        "eps": EPS,
        "unit_offset": False,
        "round_first": True,
        "weight": torch.zeros(2, 10),
        "bias": torch.zeros(2),
        "entry": 1,
        "first_feature": 4,
        "score_output": True,
        "last": True,
        "slots": torch.tensor([0, 3, 1]),
        "sums": torch.zeros(5, 2),
        "token_count": torch.zeros(5, dtype=torch.int32),
        "partials": torch.zeros(5, 2, 2),
        "gate_reward": None,
    }


BAD_NORM = {
    "not-2d": {"hidden_states": torch.zeros(3, 2, 3)},
    "column-stride": {"hidden_states": torch.zeros(6, 3).T},
    "float64": {"hidden_states": torch.zeros(3, 6).double(), "norm_weight": torch.zeros(6).double()},
    "norm-weight-other-dtype": {"norm_weight": torch.ones(6).bfloat16()},
    "norm-weight-too-long": {"norm_weight": torch.ones(7)},
    "norm-weight-2d": {"norm_weight": torch.ones(1, 6)},
    "norm-weight-strided": {"norm_weight": torch.ones(12)[::2]},
}
BAD_SCORE = {
    "weight-1d": {"weight": torch.zeros(10)},
    "weight-three-outputs": {"weight": torch.zeros(3, 10)},
    "weight-not-contiguous": {"weight": torch.zeros(10, 2).T},
    "weight-float16": {"weight": torch.zeros(2, 10).half(), "bias": torch.zeros(2).half()},
    "bias-too-long": {"bias": torch.zeros(3)},
    "first-feature-negative": {"first_feature": -1},
    "first-feature-too-high": {"first_feature": 5},
    "head-too-narrow": {"weight": torch.zeros(2, 5), "first_feature": 0},
    "slots-int32": {"slots": torch.tensor([0, 3, 1], dtype=torch.int32)},
    "slots-too-few": {"slots": torch.tensor([0, 3])},
    "slots-strided": {"slots": torch.tensor([0, 3, 1, 2, 2])[::2]},
    "slots-out-of-range": {"slots": torch.tensor([0, 5, 1])},
    "slots-repeated": {"slots": torch.tensor([1, -1, 1])},
    "sums-float64": {"sums": torch.zeros(5, 2).double()},
    "token-count-int64": {"token_count": torch.zeros(5, dtype=torch.int64)},
    "gate-reward-float16": {"gate_reward": torch.zeros(3, 2).half()},
    "gate-reward-too-few-rows": {"gate_reward": torch.zeros(2, 2)},
    "entry-negative": {"entry": -1},
    "partials-too-few-rows": {"partials": torch.zeros(2, 2, 2)},
    "partials-too-few-entries": {"partials": torch.zeros(5, 1, 2)},
    "partials-float64": {"partials": torch.zeros(5, 2, 2).double()},
    "partials-one-output": {"partials": torch.zeros(5, 2, 1)},
}


@pytest.mark.parametrize("bad", BAD_NORM.values(), ids=BAD_NORM)
def test_bad_arguments_of_the_norm_raise_the_message_of_the_schema(bad: dict[str, object]) -> None:
    arguments = list((_arguments() | bad).values())[:5]
    with pytest.raises(ValueError, match="expected") as expected:
        checks.check_rms_norm(*arguments[:2])
    with pytest.raises(ValueError, match="expected") as raised:
        ops.rms_norm(*arguments)
    assert str(raised.value) == str(expected.value)


def check_in_python(arguments: dict[str, object]) -> None:
    unchecked = ("eps", "unit_offset", "round_first", "score_output", "last")
    checks.check_rms_norm_score(**{name: value for name, value in arguments.items() if name not in unchecked})
    checks.check_slots(arguments["slots"], 5)


@pytest.mark.parametrize("bad", (BAD_NORM | BAD_SCORE).values(), ids=BAD_NORM | BAD_SCORE)
def test_bad_arguments_raise_the_message_of_the_schema_and_write_nothing(bad: dict[str, object]) -> None:
    arguments = _arguments() | bad
    with pytest.raises(ValueError, match="expected") as expected:
        check_in_python(arguments)
    with pytest.raises(ValueError, match="expected") as raised:
        ops.rms_norm_score(*arguments.values())
    assert str(raised.value) == str(expected.value)
    assert not any(arguments[name].any() for name in ("sums", "token_count", "partials"))


def test_opcheck_of_the_norm() -> None:
    torch.library.opcheck(ops.rms_norm.default, (randn(3, 40).bfloat16(), torch.ones(40).bfloat16(), EPS, False, True))


@pytest.mark.parametrize("with_gate_reward", [True, False], ids=["gate_reward", "no-gate_reward"])
def test_opcheck_of_the_scored_norm(with_gate_reward: bool) -> None:
    arguments = _arguments() | {"gate_reward": torch.zeros(3, 2) if with_gate_reward else None}
    torch.library.opcheck(ops.rms_norm_score.default, tuple(arguments.values()))


def test_fullgraph_compile_equals_eager() -> None:
    widths = [48, 48]
    head, norm_weights = make_head(widths), make_norm_weights(widths, torch.float32)
    slots = torch.tensor([1, -1, 2, 0])

    def model(hidden: Tensor, step: Step) -> Tensor:
        for entry, norm_weight in enumerate(norm_weights):
            last = entry == 1
            normed = schema.rms_norm_score(
                hidden,
                norm_weight,
                EPS,
                False,
                True,
                *head,
                entry,
                48 * entry,
                last,
                last,
                slots,
                step.sums,
                step.token_count,
                step.partials,
            )
            hidden = hidden + normed
        return hidden

    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    eager_step, compiled_step = Step(head, slots, widths), Step(head, slots, widths)
    for token in range(3):
        hidden = randn(4, 48, seed=token)
        assert torch.equal(compiled(hidden, compiled_step), model(hidden, eager_step))
    assert torch.equal(compiled_step.sums, eager_step.sums)
    assert torch.equal(compiled_step.token_count, eager_step.token_count)
    assert eager_step.token_count.sum() == 9
