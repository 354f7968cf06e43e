"""The Triton ops of whole sequences against the float64 reference, on CUDA, or on CPU under Triton's interpreter."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

import triton.knobs

from swift_kernels import checks, reference, schema
from swift_kernels.ops import project
from swift_kernels.ops.pool import BLOCK, pool_backward_triton, pool_triton
from swift_kernels.ops.project import GRAD_BLOCK, MAX_OUTPUTS, project_backward_triton, project_triton
from tests.oracle import EPS, Bounded, dot_depth, gate_error, sequence_oracle, weighted_sum_depth

if triton.knobs.runtime.interpret:
    DEVICE = "cpu"
elif torch.cuda.is_available():
    DEVICE = "cuda"
else:
    pytest.skip("needs CUDA; test_interpreter.py runs this file on CPU", allow_module_level=True)

on_gpu = [pytest.mark.gpu, pytest.mark.skipif(DEVICE != "cuda", reason="needs a CUDA device")]
LENGTHS = [3, 0, 17, 1, 12]
UNIT_ROUNDOFF = EPS / 2
TRITON = {
    "project": project_triton,
    "project_backward": project_backward_triton,
    "pool": pool_triton,
    "pool_backward": pool_backward_triton,
}

every_dtype = pytest.mark.parametrize("dtype", checks.HIDDEN_STATE_DTYPES, ids=lambda dtype: str(dtype)[6:])
gated_or_not = pytest.mark.parametrize("gated", [True, False], ids=["gated", "no gate"])


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    """What `torch.empty` returns is NaN: an output or a partial sum that was never written shows."""
    assert torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(1, device=DEVICE).isnan()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def ops_are_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also on the CPU, where they run under the interpreter."""
    if DEVICE == "cpu":
        monkeypatch.setattr(schema, "_select", lambda device_type: ("triton", TRITON))


def randn(*shape: int, seed: int = 2) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def random_entries(
    tokens: int, widths: Sequence[int], dtype: torch.dtype = torch.bfloat16, padding: int = 0, offset: int = 0
) -> list[Tensor]:
    """`[tokens, width]` each, behind `offset` elements and with `padding` NaN between the rows."""
    entries = []
    for seed, width in enumerate(widths):
        storage = torch.full((tokens * (width + padding) + offset,), torch.nan, dtype=dtype, device=DEVICE)
        entry = storage[offset:].view(tokens, width + padding)[:, :width]
        entries.append(entry.copy_(randn(tokens, width, seed=seed)))
    return entries


def random_head(widths: Sequence[int], outputs: int = 2, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    features = sum(widths)
    return (randn(outputs, features, seed=7) / max(features, 1) ** 0.5).to(dtype), randn(outputs, seed=8).to(dtype)


def cu_seqlens_of(lengths: Sequence[int], dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(DEVICE, dtype)


def features_of(entries: Sequence[Tensor]) -> Tensor:
    return torch.cat([entry.cpu().double() for entry in entries], dim=1)


def assert_project_is_right(entries: Sequence[Tensor], weight: Tensor, bias: Tensor) -> Tensor:
    """Compares with float64: `dot_depth` roundings of at most u each on the way of a product into its sum."""
    logits = project_triton(entries, weight, bias)
    features, w, b = features_of(entries), weight.cpu().double(), bias.cpu().double()
    error = dot_depth([entry.shape[1] for entry in entries]) * UNIT_ROUNDOFF
    bound = error / (1 - error) * (features.abs() @ w.abs().T + b.abs())
    Bounded(features @ w.T + b, bound).check(logits, "logits")
    return logits


def assert_project_backward_is_right(entries: Sequence[Tensor], grad_logits: Tensor) -> Tensor:
    """Compares with float64: `weighted_sum_depth` roundings of at most u each on the way of a product into its sum."""
    grad_weight = project_backward_triton(entries, grad_logits)
    features, grad = features_of(entries), grad_logits.cpu().double()
    error = weighted_sum_depth(features.shape[0]) * UNIT_ROUNDOFF
    bound = error / (1 - error) * (grad.abs().T @ features.abs())
    Bounded(grad.T @ features, bound).check(grad_weight, "the gradient of the weight")
    return grad_weight


def assert_pool_is_right(logits: Tensor, cu_seqlens: Tensor, gated: bool) -> tuple[Tensor, Tensor]:
    """A gate is off by `gate_error`; a sequence of k tokens adds k rounded products, and divides to 2 eps.

    An error of a gate moves a score by as much of (r - score) / sum(g). A relative one of every term, or of sum(g),
    moves it by as much of sum(g |r|) / sum(g).
    """
    scores, gate_reward = pool_triton(logits, cu_seqlens, gated)
    cu_seqlens = cu_seqlens.cpu()
    expected, expected_tokens = reference.pool(logits.cpu().double(), cu_seqlens, gated)
    gate, reward = expected_tokens.unbind(-1)
    assert torch.equal(gate_reward[..., 1].cpu().double(), reward)
    error_of_gate = gate_error(logits.cpu().double()[:, 0::2], gate) if gated else torch.zeros_like(gate)
    Bounded(gate, error_of_gate).check(gate_reward[..., 0], "gates")
    lengths = cu_seqlens.diff()
    sequence = torch.repeat_interleave(torch.arange(lengths.numel()), lengths)
    moved = error_of_gate * (reward - expected[sequence]).abs()
    moved, magnitude, gates = (
        torch.zeros_like(expected).index_add(0, sequence, values) for values in (moved, gate * reward.abs(), gate)
    )
    bound = 1.05 * (moved + (lengths[:, None] + 3) * EPS * magnitude) / gates.clamp_min(reference.GATE_SUM_FLOOR)
    Bounded(expected, bound).check(scores, "scores")
    return scores, gate_reward


@pytest.mark.parametrize("weight_dtype", checks.WEIGHT_DTYPES, ids=lambda dtype: f"W {str(dtype)[6:]}")
@every_dtype
def test_project_and_its_gradient_in_every_dtype(dtype, weight_dtype):
    entries = random_entries(19, (64, 1032), dtype)
    assert_project_is_right(entries, *random_head((64, 1032), 2, weight_dtype))
    assert_project_backward_is_right(entries, randn(19, 2))


@pytest.mark.parametrize(
    "widths",
    [(1,), (7,), (8,), (1021,), (2560,), (1025, 7, 64), (64, 0, 8, 0), (0, 0), (64,) * 17],
    ids=lambda widths: "+".join(map(str, widths)),
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=lambda dtype: str(dtype)[6:])
def test_project_and_its_gradient_at_every_kind_of_width(widths, dtype):
    entries = random_entries(3, widths, dtype)
    assert_project_is_right(entries, *random_head(widths))
    assert_project_backward_is_right(entries, randn(3, 2))


@pytest.mark.parametrize("outputs", [1, 3, 8, MAX_OUTPUTS, MAX_OUTPUTS + 3])
@pytest.mark.parametrize("widths", [(72,), (67,)], ids=["16-byte loads", "odd width"])
def test_project_and_its_gradient_for_every_kind_of_output_count(outputs, widths):
    entries = random_entries(5, widths)
    assert_project_is_right(entries, *random_head(widths, outputs))
    assert_project_backward_is_right(entries, randn(5, outputs))


@pytest.mark.parametrize("tokens", [1, 16, 17, 40])
def test_project_and_its_gradient_for_every_kind_of_token_count(tokens):
    for widths in ((64,), (67,)):
        entries = random_entries(tokens, widths)
        assert_project_is_right(entries, *random_head(widths))
        assert_project_backward_is_right(entries, randn(tokens, 2))


@pytest.mark.parametrize(
    ("tokens", "most_splits"),
    [(GRAD_BLOCK, 16), (GRAD_BLOCK + 1, 16), (2 * GRAD_BLOCK + 5, 1), (3 * GRAD_BLOCK + 5, 2)],
)
def test_the_gradient_over_ranges_and_blocks_of_tokens(tokens, most_splits, monkeypatch):
    monkeypatch.setattr(project, "MAX_SPLITS", most_splits)
    monkeypatch.setattr(project, "PROGRAMS", 1)
    assert_project_backward_is_right(random_entries(tokens, (64,)), randn(tokens, 3))


def test_no_range_of_tokens_is_empty_and_none_is_left_out():
    for chunks in (1, 4, 132):
        for tokens in (*range(1, 2000, 7), *range(2000, 600_000, 1777)):
            splits, length = project.token_splits(tokens, chunks)
            assert (splits - 1) * length < tokens <= splits * length
            assert splits <= max(project.MAX_SPLITS, -(-project.PROGRAMS // chunks))


def test_the_error_of_the_gradient_does_not_grow_with_the_tokens(monkeypatch):
    """Equal products round to the same side for as long as the sum has the same exponent: 3,000 of them, added one by
    one, would be off by 508 roundings of u each, and the bound is 269."""
    monkeypatch.setattr(project, "MAX_SPLITS", 1)
    monkeypatch.setattr(project, "PROGRAMS", 1)
    tokens = 70_000 if DEVICE == "cuda" else 3_000
    entry, grad_logits = torch.ones(tokens, 8, device=DEVICE), torch.full((tokens, 1), 0.1, device=DEVICE)
    assert_project_backward_is_right([entry], grad_logits)


@pytest.mark.parametrize(
    ("padding", "offset"), [(8, 0), (1, 0), (0, 3), (3, 5)], ids=["padded", "padded by 1", "shifted", "both"]
)
def test_bits_do_not_depend_on_how_the_rows_lie(padding, offset):
    for widths in ((64, 576), (67, 8)):
        entries, lying = random_entries(5, widths), random_entries(5, widths, padding=padding, offset=offset)
        weight, bias = random_head(widths)
        shifted = torch.zeros(weight.numel() + 1, device=DEVICE)[1:].view_as(weight).copy_(weight)
        assert torch.equal(project_triton(lying, shifted, bias), project_triton(entries, weight, bias))
        grad = randn(5, 2)
        assert torch.equal(project_backward_triton(lying, grad), project_backward_triton(entries, grad))


@pytest.mark.parametrize("widths", [(64, 8), (67,)], ids=["16-byte loads", "odd width"])
def test_the_logits_of_a_token_are_bitwise_the_same_alone_anywhere_and_beside_nan(widths):
    weight, bias = random_head(widths, 3)
    entries = random_entries(40, widths)
    together = project_triton(entries, weight, bias)
    assert torch.equal(project_triton(entries, weight[:1], bias[:1]), together[:, :1]), "an output knows the others"
    for tokens in (torch.tensor([7]), torch.arange(3, 20), torch.randperm(40)):
        batch = [entry[tokens.to(DEVICE)] for entry in entries]
        assert torch.equal(project_triton(batch, weight, bias), together[tokens.to(DEVICE)])
        beside_nan = [torch.stack([entry, torch.full_like(entry, torch.nan)], dim=1).flatten(0, 1) for entry in batch]
        assert torch.equal(project_triton(beside_nan, weight, bias)[::2], together[tokens.to(DEVICE)])


def test_the_gradient_of_a_column_is_bitwise_the_same_beside_nan_and_for_any_outputs():
    entries, grad_logits = random_entries(30, (64, 136)), randn(30, 3)
    expected = project_backward_triton(entries, grad_logits)
    assert torch.equal(project_backward_triton(entries, grad_logits), expected)
    assert torch.equal(project_backward_triton(entries, grad_logits[:, 2:].contiguous())[0], expected[2])
    entries[1][5, 7] = torch.nan
    grad_weight = project_backward_triton(entries, grad_logits)
    assert grad_weight[:, 64 + 7].isnan().all()
    grad_weight[:, 64 + 7] = expected[:, 64 + 7]
    assert torch.equal(grad_weight, expected)


@gated_or_not
@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=["int32", "int64"])
def test_pool(dtype, heads, gated):
    lengths = [*LENGTHS, BLOCK + 76, 2]
    assert_pool_is_right(3 * randn(sum(lengths), heads * (2 if gated else 1)), cu_seqlens_of(lengths, dtype), gated)


@gated_or_not
def test_the_score_of_a_sequence_is_bitwise_the_same_alone_and_beside_nan(gated):
    logits = randn(sum(LENGTHS), 4)
    scores, gate_reward = pool_triton(logits, cu_seqlens_of(LENGTHS), gated)
    alone, _ = pool_triton(logits[3:20].clone(), cu_seqlens_of([17]), gated)
    assert torch.equal(alone[0], scores[2])
    grad_scores = randn(*scores.shape)
    grad = pool_backward_triton(grad_scores, scores, gate_reward, cu_seqlens_of(LENGTHS), gated)
    logits[1] = torch.nan
    poisoned, poisoned_tokens = pool_triton(logits, cu_seqlens_of(LENGTHS), gated)
    assert poisoned[:2].isnan().all()
    assert torch.equal(poisoned[2:], scores[2:])
    poisoned_grad = pool_backward_triton(grad_scores, poisoned, poisoned_tokens, cu_seqlens_of(LENGTHS), gated)
    assert torch.equal(poisoned_grad[3:], grad[3:])


def test_gates_that_underflow_give_zero_and_the_gradient_of_the_clamp():
    """The gates of 3e-10 are off by 26 eps (`gate_error`), and a score of three of them is 0.3 at most: by 9e-7."""
    logits = randn(9, 4)
    logits[2:6, 0] = -200.0
    logits[6:, 2] = math.log(1e-9 / 3)
    cu_seqlens = cu_seqlens_of([2, 4, 3])
    scores, gate_reward = pool_triton(logits, cu_seqlens, True)
    assert scores[1, 0] == 0
    expected = logits.double().requires_grad_()
    reference_scores, _ = reference.pool(expected, cu_seqlens)
    torch.testing.assert_close(scores.double(), reference_scores, rtol=1e-6, atol=1e-6)
    grad_scores = randn(3, 2)
    reference_scores.backward(grad_scores.double())
    grad = pool_backward_triton(grad_scores, scores, gate_reward, cu_seqlens, True)
    assert (grad[2:6, 0] == 0).all()
    torch.testing.assert_close(grad.double(), expected.grad, rtol=2e-6, atol=2e-6)


@pytest.mark.usefixtures("ops_are_triton")
@gated_or_not
@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize(
    ("dtype", "weight_dtype"),
    [(torch.bfloat16, torch.float32), (torch.float16, torch.bfloat16), (torch.float32, torch.float32)],
    ids=["bfloat16", "float16, W bfloat16", "float32"],
)
def test_scores_and_gradients_of_whole_sequences(dtype, weight_dtype, heads, gated):
    widths = [72, 64]
    entries = random_entries(sum(LENGTHS), widths, dtype)
    entries[1].requires_grad_()
    weight, bias = (p.requires_grad_() for p in random_head(widths, heads * (2 if gated else 1), weight_dtype))
    grad_scores = randn(len(LENGTHS), heads)
    on_cpu = [tensor.detach().cpu() for tensor in (weight, bias, cu_seqlens_of(LENGTHS))]
    expected = sequence_oracle([entry.cpu() for entry in entries], *on_cpu, gated, grad_scores.cpu())
    scores, gate_reward = schema.score_sequence(entries, weight, bias, cu_seqlens_of(LENGTHS), gated)
    assert gate_reward.shape == (sum(LENGTHS), heads, 2)
    expected.scores.check(scores, "scores")
    scores.backward(grad_scores)
    expected.grad_weight.check(weight.grad, "the gradient of the weight")
    expected.grad_bias.check(bias.grad, "the gradient of the bias")
    expected.grad_entries[1].check(entries[1].grad, "the gradient of an entry")


@pytest.mark.usefixtures("ops_are_triton")
@gated_or_not
def test_nothing_to_score(gated):
    weight, bias = random_head([5, 3], 6)
    weight.requires_grad_()
    for lengths in ([], [0, 0]):
        entries = random_entries(0, [5, 3])
        scores, gate_reward = schema.score_sequence(entries, weight, bias, cu_seqlens_of(lengths), gated)
        heads = 3 if gated else 6
        assert scores.shape == (len(lengths), heads)
        assert scores.isnan().all()
        assert gate_reward.shape == (0, heads, 2)
        (grad_weight,) = torch.autograd.grad(scores.nansum(), weight)
        assert torch.equal(grad_weight, torch.zeros_like(weight))


def test_what_does_not_fit_is_named():
    entries = random_entries(3, (6, 4))
    with pytest.raises(ValueError, match=r"weight has shape \[2, 9\]"):
        project_triton(entries, *random_head((9,)))
    with pytest.raises(ValueError, match=r"grad_logits is torch.float32 of shape \[2, 2\]"):
        project_backward_triton(entries, randn(2, 2))
    with pytest.raises(ValueError, match=r"logits is torch.float32 of shape \[3, 3\]"):
        pool_triton(randn(3, 3), cu_seqlens_of([3]), True)
    with pytest.raises(ValueError, match="cu_seqlens ends at 4: expected 3"):
        pool_triton(randn(3, 4), cu_seqlens_of([4]), True)
    with pytest.raises(ValueError, match=r"scores is torch.float32 of shape \[2, 2\]"):
        pool_backward_triton(randn(1, 2), randn(2, 2), randn(3, 2, 2), cu_seqlens_of([3]), True)


class TestOnGpu:
    pytestmark = on_gpu

    @pytest.mark.parametrize("outputs", [2, 16])
    @pytest.mark.parametrize(
        "widths", [(4096,) * 33, (576,) * 31, (128256,), (50257,)], ids=lambda w: f"{len(w)}x{w[0]}"
    )
    def test_real_shapes(self, widths, outputs):
        tokens = 1500
        entries = random_entries(tokens, widths)
        assert_project_is_right(entries, *random_head(widths, outputs))
        assert_project_backward_is_right(entries, randn(tokens, outputs))

    def test_entries_beyond_2_31_elements_are_read(self):
        tokens, width = 2**19 + 3, 4096
        entry = torch.zeros(tokens, width, dtype=torch.bfloat16, device=DEVICE)
        entry[-3:] = randn(3, width).bfloat16()
        weight, bias = random_head((width,))
        assert torch.equal(project_triton([entry], weight, bias)[-3:], project_triton([entry[-3:]], weight, bias))
        grad_logits = torch.zeros(tokens, 2, device=DEVICE)
        grad_logits[-3:] = randn(3, 2)
        expected = project_backward_triton([entry[-3:]], grad_logits[-3:])
        torch.testing.assert_close(project_backward_triton([entry], grad_logits), expected, rtol=1e-5, atol=1e-5)

    def test_graph_replay_on_changed_inputs_is_bitwise_eager(self):
        widths = (4096, 576)
        entries, cu_seqlens = random_entries(sum(LENGTHS), widths), cu_seqlens_of(LENGTHS)
        weight, bias = random_head(widths)
        schema.score_sequence(entries, weight, bias, cu_seqlens)  # compiles
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            scores, gate_reward = schema.score_sequence(entries, weight, bias, cu_seqlens)
        for seed, lengths in enumerate((LENGTHS, LENGTHS[::-1], [sum(LENGTHS), 0, 0, 0, 0])):
            cu_seqlens.copy_(cu_seqlens_of(lengths))
            entries[0].copy_(randn(sum(LENGTHS), 4096, seed=seed))
            graph.replay()
            expected, expected_tokens = schema.score_sequence(entries, weight, bias, cu_seqlens)
            assert torch.equal(scores.nan_to_num(), expected.nan_to_num())
            assert torch.equal(gate_reward, expected_tokens)

    @pytest.mark.parametrize("op", TRITON)
    def test_opcheck(self, op):
        assert schema.implementation("cuda") == "triton"
        entries = [entry.requires_grad_() for entry in random_entries(6, [6, 1025])]
        weight, bias = (parameter.requires_grad_() for parameter in random_head([6, 1025], 4))
        cu_seqlens = cu_seqlens_of([2, 3, 1])
        scores, gate_reward = pool_triton(randn(6, 4), cu_seqlens, True)
        arguments = {
            "project": (entries, weight, bias),
            "project_backward": (random_entries(6, [6, 1025]), randn(6, 4)),
            "pool": (randn(6, 4).requires_grad_(), cu_seqlens, True),
            "pool_backward": (randn(3, 2), scores, gate_reward, cu_seqlens, True),
        }
        torch.library.opcheck(getattr(torch.ops.swift_kernels, op).default, arguments[op])

    @gated_or_not
    def test_torch_compile_takes_it_in_one_graph(self, gated):
        entries = random_entries(sum(LENGTHS), [48, 1030])
        parameters = [parameter.requires_grad_() for parameter in random_head([48, 1030], 4)]
        cu_seqlens = cu_seqlens_of(LENGTHS, torch.int32)

        def loss(weight: Tensor, bias: Tensor) -> Tensor:
            return schema.score_sequence(entries, weight, bias, cu_seqlens, gated)[0].nansum()

        compiled = torch.compile(loss, fullgraph=True)
        eager_grads, compiled_grads = (torch.autograd.grad(run(*parameters), parameters) for run in (loss, compiled))
        for grad, expected in zip(compiled_grads, eager_grads, strict=True):
            torch.testing.assert_close(grad, expected, rtol=1e-5, atol=1e-6)
