"""The C++ kernels of whole sequences against the float64 reference: projection, pooling, and their gradients."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from swift_kernels import checks, reference, schema
from swift_kernels.state import ScoreState
from tests.oracle import Bounded, dot_depth, sequence_oracle, weighted_sum_depth
from tests.test_cpp import FP32_UNIT_ROUNDOFF, isa, kernel_loaded, make_head, make_hidden_states  # noqa: F401

WIDTHS = [7, 1025, 64, 1, 2560]
LENGTHS = [3, 0, 17, 1, 40]

ops = torch.ops.swift_kernels
every_isa = pytest.mark.usefixtures("isa")
every_dtype = pytest.mark.parametrize("dtype", checks.HIDDEN_STATE_DTYPES, ids=lambda dtype: str(dtype)[6:])
gated_or_not = pytest.mark.parametrize("gated", [True, False], ids=["gated", "ungated"])


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    yield
    torch.set_num_threads(before)


def cu_seqlens_of(lengths: Sequence[int], dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(dtype)


def randn(*shape: int, seed: int = 2) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def check_project(hidden_states: Sequence[Tensor], weight: Tensor, bias: Tensor) -> Tensor:
    """Compares with float64: `dot_depth` roundings of at most u each on the way of a product into its sum."""
    features = torch.cat([entry.double() for entry in hidden_states], dim=1)
    value = features @ weight.double().T + bias.double()
    error = dot_depth([entry.shape[1] for entry in hidden_states]) * FP32_UNIT_ROUNDOFF
    bound = error / (1 - error) * (features.abs() @ weight.double().abs().T + bias.double().abs())
    logits = ops.project(list(hidden_states), weight, bias)
    Bounded(value, bound).check(logits, "logits")
    return logits


def check_project_backward(hidden_states: Sequence[Tensor], grad_logits: Tensor) -> Tensor:
    features = torch.cat([entry.double() for entry in hidden_states], dim=1)
    grad = grad_logits.double()
    error = weighted_sum_depth(features.shape[0]) * FP32_UNIT_ROUNDOFF
    grad_weight = ops.project_backward(list(hidden_states), grad_logits)
    Bounded(grad.T @ features, error / (1 - error) * (grad.abs().T @ features.abs())).check(grad_weight, "grad_weight")
    return grad_weight


@every_isa
@pytest.mark.parametrize("outputs", [1, 2, 3, 6])
@pytest.mark.parametrize("weight_dtype", checks.WEIGHT_DTYPES, ids=lambda dtype: f"weight-{dtype}"[13:])
@every_dtype
def test_project_matches_float64(dtype: torch.dtype, weight_dtype: torch.dtype, outputs: int) -> None:
    hidden_states = make_hidden_states(37, WIDTHS, dtype)
    check_project(hidden_states, *make_head(WIDTHS, outputs, weight_dtype))


@every_isa
@pytest.mark.parametrize("outputs", [1, 2, 3, 6])
@every_dtype
def test_project_backward_matches_float64(dtype: torch.dtype, outputs: int) -> None:
    hidden_states = make_hidden_states(263, WIDTHS, dtype)
    check_project_backward(hidden_states, randn(263, outputs))


@every_isa
@pytest.mark.parametrize("tokens", [1, 2, 5, 33, 256, 300])
@pytest.mark.parametrize("width", [1, 7, 31, 1021, 2049, 4096])
def test_one_entry_of_any_width(width: int, tokens: int) -> None:
    hidden_states = make_hidden_states(tokens, [width], torch.bfloat16)
    check_project(hidden_states, *make_head([width]))
    check_project_backward(hidden_states, randn(tokens, 2))


@every_isa
def test_llama_8b_shape() -> None:
    widths = [4096] * 33
    hidden_states = make_hidden_states(5, widths, torch.bfloat16)
    check_project(hidden_states, *make_head(widths))
    check_project_backward(hidden_states, randn(5, 2))


@every_isa
def test_tokens_beyond_one_block_of_partial_sums() -> None:
    """64 outputs of 64 entries take 16 KB of partial sums a token: a megabyte holds those of 64 tokens."""
    widths = [3] * 64
    hidden_states = make_hidden_states(150, widths)
    weight, bias = make_head(widths, 64)
    logits = check_project(hidden_states, weight, bias)
    assert torch.equal(logits[70:], ops.project([entry[70:] for entry in hidden_states], weight, bias))


@every_isa
def test_logits_are_bit_for_bit_those_of_a_step() -> None:
    head = make_head(WIDTHS)
    hidden_states = make_hidden_states(50, WIDTHS, torch.bfloat16)
    state = ScoreState(50, WIDTHS)
    gate_reward = torch.empty(50, 2)
    ops.score_step(
        hidden_states,
        *head,
        torch.arange(50),
        state.sums,
        state.token_count,
        state.partials,
        state.arrivals,
        gate_reward,
    )
    logits = ops.project(hidden_states, *head)
    assert torch.equal(logits[:, 1], gate_reward[:, 1])
    assert torch.equal(ops.pool(logits, cu_seqlens_of([1] * 50), True)[1][:, 0], gate_reward)


@every_isa
@every_dtype
def test_a_tokens_logits_do_not_depend_on_its_batch(dtype: torch.dtype) -> None:
    widths = [576, 1025]
    weight, bias = make_head(widths, 3)
    every = make_hidden_states(200, widths, dtype)
    expected = ops.project(every, weight, bias)
    assert torch.equal(expected[:, :1], ops.project(every, weight[:1], bias[:1])), "an output depends on the others"
    generator = torch.Generator().manual_seed(3)
    for count in (1, 2):
        with threads(count):
            for size in (1, 7, 33, 200):
                tokens = torch.randperm(200, generator=generator)[:size]
                batch = [entry[tokens] for entry in every]
                assert torch.equal(ops.project(batch, weight, bias), expected[tokens])
                poisoned = [torch.stack([e, torch.full_like(e, math.nan)], dim=1).flatten(0, 1) for e in batch]
                assert torch.equal(ops.project(poisoned, weight, bias)[::2], expected[tokens])


@every_isa
@every_dtype
def test_the_gradient_does_not_depend_on_threads_or_on_other_columns(dtype: torch.dtype) -> None:
    widths = [1500, 2300]
    hidden_states = make_hidden_states(600, widths, dtype)
    grad_logits = randn(600, 3)
    with threads(1):
        expected = ops.project_backward(hidden_states, grad_logits)
    with threads(2):  # narrower tasks, claimed by whoever comes first
        for _ in range(5):
            assert torch.equal(ops.project_backward(hidden_states, grad_logits), expected)
    assert torch.equal(ops.project_backward(hidden_states, grad_logits[:, 2:].contiguous())[0], expected[2])
    hidden_states[0][5, 1499] = math.nan
    grad_weight = ops.project_backward(hidden_states, grad_logits)
    assert grad_weight[:, 1499].isnan().all()
    grad_weight[:, 1499] = expected[:, 1499]
    assert torch.equal(grad_weight, expected)


@every_isa
def test_the_error_of_the_gradient_does_not_grow_with_the_tokens() -> None:
    """Equal products round to the same side for as long as the sum has the same exponent: added one by one, these
    would be off by 10,000 units in the last place."""
    tokens = 70_000
    grad_weight = check_project_backward([torch.ones(tokens, 3)], torch.full((tokens, 1), 0.1))
    expected = tokens * float(torch.tensor(0.1))
    assert ((grad_weight - expected).abs() <= 600 * FP32_UNIT_ROUNDOFF * expected).all()


@every_isa
def test_rows_with_a_stride_of_their_own() -> None:
    widths = [64, 1025, 0, 7]
    weight, bias = make_head(widths, 3)
    hidden_states = make_hidden_states(40, widths, torch.bfloat16)
    wide = [torch.cat([entry, torch.full_like(entry[:, :1], math.nan)], dim=1) for entry in hidden_states]
    views = [entry[:, :-1] for entry in wide]
    views[0] = torch.stack([hidden_states[0], torch.full_like(hidden_states[0], math.nan)], dim=1)[:, 0]
    assert not any(view.is_contiguous() for view in views if view.numel())
    assert torch.equal(ops.project(views, weight, bias), ops.project(hidden_states, weight, bias))
    grad_logits = randn(40, 3)
    assert torch.equal(ops.project_backward(views, grad_logits), ops.project_backward(hidden_states, grad_logits))
    expanded = [entry[:1].expand(40, -1) for entry in hidden_states]
    assert (ops.project(expanded, weight, bias) == ops.project(hidden_states, weight, bias)[0]).all()


@every_isa
@gated_or_not
def test_nothing_to_score(gated: bool) -> None:
    weight, bias = make_head([5, 3], 6)
    weight.requires_grad_()
    for hidden_states, lengths in (([torch.empty(0, 5), torch.empty(0, 3)], []), ([randn(0, 5), randn(0, 3)], [0, 0])):
        scores, gate_reward = schema.score_sequence(hidden_states, weight, bias, cu_seqlens_of(lengths), gated)
        heads = 3 if gated else 6
        assert scores.shape == (len(lengths), heads)
        assert scores.isnan().all()
        assert gate_reward.shape == (0, heads, 2)
        (grad_weight,) = torch.autograd.grad(scores.nansum(), weight)
        assert torch.equal(grad_weight, torch.zeros(6, 8))
    assert torch.equal(ops.project([torch.empty(2, 0)], torch.empty(3, 0), torch.ones(3)), torch.ones(2, 3))


@gated_or_not
@pytest.mark.parametrize("heads", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=["int32", "int64"])
def test_pool_matches_float64(dtype: torch.dtype, heads: int, gated: bool) -> None:
    """A gate rounds its exponential, sum and quotient; a sequence of k tokens adds k rounded products and divides."""
    u = FP32_UNIT_ROUNDOFF
    cu_seqlens = cu_seqlens_of(LENGTHS, dtype)
    logits = 3 * randn(sum(LENGTHS), heads * (2 if gated else 1))
    scores, gate_reward = ops.pool(logits, cu_seqlens, gated)
    expected, expected_tokens = reference.pool(logits.double(), cu_seqlens, gated)
    gate, reward = expected_tokens.unbind(-1)
    assert torch.equal(gate_reward[..., 1].double(), reward)
    Bounded(gate, 4 * u * gate if gated else 0 * gate).check(gate_reward[..., 0], "gates")
    # A relative error of every term, or one of sum(g), moves a score by as much of sum(g |r|) / sum(g).
    sequence = torch.repeat_interleave(torch.arange(len(LENGTHS)), cu_seqlens.diff())
    empty = torch.zeros(len(LENGTHS), heads, dtype=torch.float64)
    magnitude = empty.index_add(0, sequence, gate * reward.abs())
    scale = magnitude / empty.index_add(0, sequence, gate).clamp_min(reference.GATE_SUM_FLOOR)
    Bounded(expected, 2 * (cu_seqlens.diff()[:, None] + 5) * u * scale).check(scores, "scores")


@gated_or_not
@pytest.mark.parametrize("heads", [1, 3])
def test_pool_and_its_gradient_do_not_depend_on_threads(heads: int, gated: bool) -> None:
    lengths = [(sequence * 37) % 190 for sequence in range(60)]
    logits = randn(sum(lengths), heads * (2 if gated else 1))
    grad_scores = randn(60, heads, seed=5)
    results = []
    for count in (1, 2):
        with threads(count):
            scores, gate_reward = ops.pool(logits, cu_seqlens_of(lengths), gated)
            grad = ops.pool_backward(grad_scores, scores, gate_reward, cu_seqlens_of(lengths), gated)
            results.append((scores.nan_to_num(), gate_reward, grad))
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


def test_gates_that_underflow_give_zero_and_the_gradient_of_the_clamp() -> None:
    """With four tokens at most a score has 10 roundings and a gradient 20 of 6e-8, and rewards are 3 at most."""
    logits = randn(9, 4)
    logits[2:6, 0] = -200.0
    logits[6:, 2] = math.log(1e-9 / 3)
    cu_seqlens = cu_seqlens_of([2, 4, 3])
    scores, gate_reward = ops.pool(logits, cu_seqlens, True)
    assert scores[1, 0] == 0
    expected = logits.double().requires_grad_()
    reference_scores, _ = reference.pool(expected, cu_seqlens)
    torch.testing.assert_close(scores.double(), reference_scores, rtol=1e-6, atol=1e-6)
    grad_scores = randn(3, 2)
    reference_scores.backward(grad_scores.double())
    grad = ops.pool_backward(grad_scores, scores, gate_reward, cu_seqlens, True)
    assert (grad[2:6, 0] == 0).all()
    torch.testing.assert_close(grad.double(), expected.grad, rtol=2e-6, atol=2e-6)


def test_a_token_that_is_not_finite_stays_in_its_sequence() -> None:
    logits = randn(sum(LENGTHS), 2)
    scores, _ = ops.pool(logits, cu_seqlens_of(LENGTHS), True)
    logits[4, 0] = math.nan
    poisoned, _ = ops.pool(logits, cu_seqlens_of(LENGTHS), True)
    assert poisoned.isnan().flatten().tolist() == [False, True, True, False, False]
    kept = ~poisoned.isnan()
    assert torch.equal(poisoned[kept], scores[kept])


@every_isa
@gated_or_not
@pytest.mark.parametrize("heads", [1, 2, 3])
@pytest.mark.parametrize("weight_dtype", checks.WEIGHT_DTYPES, ids=lambda dtype: f"weight-{dtype}"[13:])
@every_dtype
def test_scores_and_gradients_match_float64(
    dtype: torch.dtype, weight_dtype: torch.dtype, heads: int, gated: bool
) -> None:
    hidden_states = make_hidden_states(sum(LENGTHS), WIDTHS, dtype)
    for index in (0, 3):
        hidden_states[index].requires_grad_()
    weight, bias = (p.requires_grad_() for p in make_head(WIDTHS, heads * (2 if gated else 1), weight_dtype))
    cu_seqlens = cu_seqlens_of(LENGTHS)
    grad_scores = randn(len(LENGTHS), heads)
    expected = sequence_oracle(hidden_states, weight, bias, cu_seqlens, gated, grad_scores)
    scores, _ = schema.score_sequence(hidden_states, weight, bias, cu_seqlens, gated)
    expected.scores.check(scores, "scores")
    scores.backward(grad_scores)
    expected.grad_weight.check(weight.grad, "the gradient of the weight")
    expected.grad_bias.check(bias.grad, "the gradient of the bias")
    for index in (0, 3):
        expected.grad_entries[index].check(hidden_states[index].grad, f"the gradient of entry {index}")
    assert hidden_states[1].grad is None


@gated_or_not
def test_gradients_of_gates_and_rewards(gated: bool) -> None:
    """Losses on single tokens: the two gradients add up. 61 tokens and 14 features are 100 roundings of 6e-8."""
    hidden_states = make_hidden_states(sum(LENGTHS), [9, 5])
    weight, bias = make_head([9, 5], 4)
    grads = []
    for dtype, score_sequence in ((torch.float32, schema.score_sequence), (torch.float64, reference.score_sequence)):
        parameters = [tensor.detach().to(dtype, copy=True).requires_grad_() for tensor in (weight, bias)]
        entries = [entry.to(dtype) for entry in hidden_states]
        scores, gate_reward = score_sequence(entries, *parameters, cu_seqlens_of(LENGTHS), gated)
        (scores.nansum() + (gate_reward * randn(*gate_reward.shape)).sum()).backward()
        grads.append([parameter.grad for parameter in parameters])
    for actual, expected in zip(*grads, strict=True):
        torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-5)


BAD_PROJECT = {
    "no-entries": {"hidden_states": []},
    "entry-not-2d": {"hidden_states": [torch.zeros(3, 6), torch.zeros(3, 2, 2)]},
    "tokens-differ": {"hidden_states": [torch.zeros(3, 6), torch.zeros(2, 4)]},
    "dtypes-differ": {"hidden_states": [torch.zeros(3, 6), torch.zeros(3, 4).half()]},
    "column-stride": {"hidden_states": [torch.zeros(3, 6), torch.zeros(4, 3).T]},
    "float64": {"hidden_states": [torch.zeros(3, 6).double(), torch.zeros(3, 4).double()]},
    "weight-too-narrow": {"weight": torch.zeros(2, 9)},
    "weight-no-outputs": {"weight": torch.zeros(0, 10), "bias": torch.zeros(0)},
    "weight-1d": {"weight": torch.zeros(10)},
    "weight-not-contiguous": {"weight": torch.zeros(10, 2).T},
    "weight-float16": {"weight": torch.zeros(2, 10).half(), "bias": torch.zeros(2).half()},
    "bias-other-dtype": {"bias": torch.zeros(2).bfloat16()},
    "bias-too-long": {"bias": torch.zeros(3)},
}
BAD_PROJECT_BACKWARD = {
    "no-entries": {"hidden_states": []},
    "tokens-differ": {"hidden_states": [torch.zeros(3, 6), torch.zeros(2, 4)]},
    "float64": {"hidden_states": [torch.zeros(3, 6).double(), torch.zeros(3, 4).double()]},
    "grad-float64": {"grad_logits": torch.zeros(3, 2).double()},
    "grad-1d": {"grad_logits": torch.zeros(3)},
    "grad-too-few-tokens": {"grad_logits": torch.zeros(2, 2)},
    "grad-not-contiguous": {"grad_logits": torch.zeros(2, 3).T},
}
BAD_POOL = {
    "logits-float64": {"logits": torch.zeros(3, 4).double()},
    "logits-1d": {"logits": torch.zeros(4)},
    "logits-odd": {"logits": torch.zeros(3, 3)},
    "logits-not-contiguous": {"logits": torch.zeros(4, 3).T},
    "rewards-not-contiguous": {"logits": torch.zeros(4, 3).T, "gated": False},
    "cu-seqlens-float": {"cu_seqlens": torch.tensor([0.0, 3.0])},
    "cu-seqlens-2d": {"cu_seqlens": torch.tensor([[0, 3]])},
    "cu-seqlens-of-nothing": {"cu_seqlens": torch.tensor([], dtype=torch.int64)},
    "cu-seqlens-strided": {"cu_seqlens": torch.tensor([0, 1, 3, 3])[::2]},
    "cu-seqlens-starts-late": {"cu_seqlens": torch.tensor([1, 3])},
    "cu-seqlens-decreases": {"cu_seqlens": torch.tensor([0, 2, 1, 3], dtype=torch.int32)},
    "cu-seqlens-ends-early": {"cu_seqlens": torch.tensor([0, 2])},
    "cu-seqlens-ends-late": {"cu_seqlens": torch.tensor([0, 2, 4])},
}


def check_pool_in_python(logits: Tensor, cu_seqlens: Tensor, gated: bool) -> None:
    checks.check_pool(logits, cu_seqlens, gated)
    checks.check_cu_seqlens(cu_seqlens, logits.shape[0])


def check_pool_backward_in_python(**arguments: Tensor) -> None:
    checks.check_pool_backward(**arguments)
    checks.check_cu_seqlens(arguments["cu_seqlens"], arguments["gate_reward"].shape[0])


BAD_ARGUMENTS = {
    f"{op}-{name}": (op, bad)
    for op, cases in (("project", BAD_PROJECT), ("project_backward", BAD_PROJECT_BACKWARD), ("pool", BAD_POOL))
    for name, bad in cases.items()
}


@pytest.mark.parametrize(("op", "bad"), BAD_ARGUMENTS.values(), ids=BAD_ARGUMENTS)
def test_bad_arguments_raise_the_message_of_the_schema(op: str, bad: dict[str, object]) -> None:
    entries = {"hidden_states": make_hidden_states(3, [6, 4])}
    good, check = {
        "project": (entries | {"weight": torch.zeros(2, 10), "bias": torch.zeros(2)}, checks.check_project),
        "project_backward": (entries | {"grad_logits": torch.zeros(3, 2)}, checks.check_project_backward),
        "pool": (
            {"logits": torch.zeros(3, 4), "cu_seqlens": torch.tensor([0, 1, 3]), "gated": True},
            check_pool_in_python,
        ),
    }[op]
    arguments = good | bad
    with pytest.raises(ValueError, match=r"expected|every entry") as expected:
        check(**arguments)
    with pytest.raises(ValueError, match=r"expected|every entry") as raised:
        getattr(ops, op)(*arguments.values())
    assert str(raised.value) == str(expected.value)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"grad_scores": torch.zeros(2, 3)}, "grad_scores is torch.float32 of shape [2, 3]: expected contiguous"),
        ({"scores": torch.zeros(2, 2).double()}, "scores is torch.float64 of shape [2, 2]: expected contiguous"),
        ({"gate_reward": torch.zeros(3, 2)}, "gate_reward is torch.float32 of shape [3, 2]: expected contiguous"),
        ({"cu_seqlens": torch.tensor([0, 1, 4])}, "cu_seqlens ends at 4: expected 3, the number of tokens"),
        ({"cu_seqlens": torch.tensor([0, 3])}, "grad_scores is torch.float32 of shape [2, 2]: expected contiguous"),
    ],
    ids=["grad-scores", "scores", "gate-reward", "cu-seqlens-ends-late", "cu-seqlens-too-few"],
)
def test_pool_backward_names_what_does_not_fit(bad: dict[str, Tensor], message: str) -> None:
    arguments = {
        "grad_scores": torch.zeros(2, 2),
        "scores": torch.zeros(2, 2),
        "gate_reward": torch.zeros(3, 2, 2),
        "cu_seqlens": torch.tensor([0, 1, 3]),
    } | bad
    with pytest.raises(ValueError, match="expected") as raised:
        ops.pool_backward(*arguments.values(), True)
    assert str(raised.value).startswith(message)
    with pytest.raises(ValueError, match="expected") as expected:
        check_pool_backward_in_python(**arguments)
    assert str(raised.value) == str(expected.value)


@pytest.mark.parametrize("op", ["project", "project_backward", "pool", "pool_backward"])
def test_opcheck(op: str) -> None:
    hidden_states = [entry.requires_grad_() for entry in make_hidden_states(6, [6, 1025], torch.bfloat16)]
    weight, bias = (parameter.requires_grad_() for parameter in make_head([6, 1025], 4))
    cu_seqlens = cu_seqlens_of([2, 3, 1])
    scores, gate_reward = ops.pool(randn(6, 4), cu_seqlens, True)
    arguments = {
        "project": (hidden_states, weight, bias),
        "project_backward": (make_hidden_states(6, [6, 1025], torch.bfloat16), randn(6, 4)),
        "pool": (randn(6, 4).requires_grad_(), cu_seqlens, True),
        "pool_backward": (randn(3, 2), scores, gate_reward, cu_seqlens, True),
    }
    torch.library.opcheck(getattr(ops, op).default, arguments[op])


@gated_or_not
def test_fullgraph_compile_equals_eager(gated: bool) -> None:
    hidden_states = make_hidden_states(sum(LENGTHS), [48, 1030], torch.bfloat16)
    parameters = [parameter.requires_grad_() for parameter in make_head([48, 1030], 4)]
    cu_seqlens = cu_seqlens_of(LENGTHS, torch.int32)

    def loss(weight: Tensor, bias: Tensor) -> Tensor:
        scores, _ = schema.score_sequence(hidden_states, weight, bias, cu_seqlens, gated)
        return (scores * randn_scores).nansum()

    randn_scores = randn(len(LENGTHS), 2 if gated else 4)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    results = [
        (value.detach(), *torch.autograd.grad(value, parameters))
        for value in (loss(*parameters), compiled(*parameters))
    ]
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))
