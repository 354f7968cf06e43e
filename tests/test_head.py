from __future__ import annotations

import copy
import subprocess
import sys

import pytest
import torch

from swift_kernels import HeadConfig, SwiftHead, schema, score_heads
from swift_kernels.features import resolve_layers


def test_parameters_as_the_paper_counts_them():
    for widths, parameters in (([3072] * 29, 178_178), ([4096] * 33, 270_338), ([4096] * 37, 303_106)):
        head = SwiftHead(widths)
        assert sum(parameter.numel() for parameter in head.parameters()) == parameters
        assert head.weight.shape == (2, sum(widths))
        assert head.bias.shape == (2,)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("gate", [True, False], ids=["gate", "mean"])
def test_stepping_equals_forward(gate, dtype):
    torch.manual_seed(0)
    head = SwiftHead(HeadConfig(widths=(24, 9), gate=gate, dtype=dtype))
    lengths = [4, 1, 6]
    entries = [torch.randn(sum(lengths), width) for width in head.config.widths]
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
    state = head.init_state(3)
    for token in range(max(lengths)):
        live = [row for row, length in enumerate(lengths) if token < length]
        at = torch.tensor([int(cu_seqlens[row]) + token for row in live])
        head.step([entry[at] for entry in entries], state, torch.tensor(live))
    torch.testing.assert_close(head.scores(state), head(entries, cu_seqlens).detach(), rtol=1e-5, atol=1e-6)


def test_gradients_reach_the_head_and_the_states():
    head = SwiftHead([6, 5])
    entries = [torch.randn(4, 6, requires_grad=True), torch.randn(4, 5)]
    head(entries, torch.tensor([0, 1, 4])).sum().backward()
    assert head.weight.grad.abs().sum() > 0
    assert head.bias.grad.abs().sum() > 0
    assert entries[0].grad.abs().sum() > 0


def test_it_is_a_module_like_any_other():
    head = SwiftHead([4, 4])
    twin = copy.deepcopy(head)
    twin.load_state_dict(head.state_dict())
    assert set(head.state_dict()) == {"weight", "bias"}
    assert "features=8" in repr(head)
    assert head.to(torch.bfloat16).weight.dtype == torch.bfloat16
    assert twin.weight.dtype == torch.float32


def test_stepping_with_gradients_enabled_records_none():
    head = SwiftHead([4])
    state = head.init_state(1)
    head.step([torch.randn(1, 4, requires_grad=True)], state, torch.tensor([0]))
    assert not state.sums.requires_grad


def test_warming_up_runs_the_steps_to_come_on_rows_that_count_for_nothing(monkeypatch):
    head, steps = SwiftHead([4, 3]), []
    monkeypatch.setattr(schema, "score_step", lambda *arguments: steps.append(arguments))
    assert head.warmup(dtype=torch.bfloat16, rows=2, gate_reward=True) is None
    for hidden_states, *_, gate_reward in steps:
        assert [(entry.shape, entry.dtype) for entry in hidden_states] == [((2, w), torch.bfloat16) for w in (4, 3)]
        assert gate_reward is None or gate_reward.shape == (2, 2)
    assert [arguments[-1] is None for arguments in steps] == [True, False]
    assert all((arguments[3] < 0).all() for arguments in steps)


def test_warming_up_on_the_cpu_loads_the_library():
    SwiftHead([4]).warmup()
    loaded = torch._C._dispatch_has_kernel_for_dispatch_key("swift_kernels::score_step", "CPU")
    assert loaded == (schema.implementation("cpu") == "cpp")


@pytest.mark.parametrize(
    ("layers", "expected"),
    [("all", (0, 1, 2, 3, 4)), ([-1, 0], (0, 4)), ([3, 1], (1, 3)), ([-5], (0,))],
    ids=["all", "negative", "unordered", "first"],
)
def test_layers_resolve(layers, expected):
    assert resolve_layers(layers, 4) == expected


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([5], "layer index 5 is out of range"),
        ([-6], "layer index -6 is out of range"),
        ([0, -5], "names an entry twice"),
        ([], "layers is empty"),
        ("some", "layers is 'some'"),
        ([True], "layer index True"),
        ([1.5], "layer index 1.5"),
    ],
    ids=["high", "low", "twice", "empty", "word", "bool", "float"],
)
def test_layers_that_do_not_resolve(layers, message):
    with pytest.raises(ValueError, match=message):
        resolve_layers(layers, 4)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"widths": ()}, "widths is"),
        ({"widths": (4, 0)}, "widths is"),
        ({"widths": (4,), "features": "attention"}, "features is 'attention'"),
        ({"widths": (4,), "span": "prompt"}, "span is 'prompt'"),
        ({"widths": (4,), "dtype": "float64"}, "dtype is 'float64'"),
        ({"widths": (4, 4), "features": "logits"}, "a logits head reads one entry"),
        ({"widths": (5, 5), "features": "top_logprobs"}, "a top_logprobs head reads one entry"),
        ({"widths": (4,), "features": "top_logprobs"}, r"expected k \+ 3 for k top_logprobs, k at least 2"),
        ({"widths": (5,), "features": "top_logprobs", "span": "all"}, "the last token, which none follows"),
        ({"widths": (4,), "layers": (0, 1), "num_hidden_layers": 2}, "2 layers but 1 widths"),
        ({"widths": (4,), "layers": (0,)}, "num_hidden_layers is not"),
        ({"widths": (4, 4), "layers": (1, 0), "num_hidden_layers": 2}, "expected ascending"),
        ({"widths": (4,), "layers": (-1,), "num_hidden_layers": 2}, "expected ascending"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_configs_that_make_no_sense(fields, message):
    with pytest.raises(ValueError, match=message):
        HeadConfig(**fields)


@pytest.mark.parametrize(
    ("widths", "cu_seqlens", "message"),
    [
        ([4, 3], [0, 5], r"hidden_states\[1\] has shape \[5, 3\]: expected \[5, 4\]"),
        ([4], [0, 5], "1 hidden states: expected 2"),
        ([4, 4], [1, 5], "starts at 1: expected 0"),
        ([4, 4], [0, 3, 2, 5], r"cu_seqlens\[2\] is 2, after 3"),
        ([4, 4], [0, 4], "ends at 4: expected 5"),
        ([4, 4], [0.0, 5.0], "expected contiguous int32 or int64"),
        ([4, 4], [[0, 5]], "expected contiguous int32 or int64"),
    ],
    ids=["width", "entries", "start", "falling", "end", "float", "2d"],
)
def test_forward_names_what_is_wrong(widths, cu_seqlens, message):
    with pytest.raises(ValueError, match=message):
        SwiftHead([4, 4])([torch.randn(5, width) for width in widths], torch.tensor(cu_seqlens))


def test_a_second_derivative_is_a_clear_error():
    head = SwiftHead([8])
    entry = torch.randn(5, 8, requires_grad=True)
    scores = head([entry], torch.tensor([0, 5]))
    with pytest.raises(RuntimeError, match="has no second derivative"):
        torch.autograd.grad(scores.sum(), entry, create_graph=True)


@pytest.mark.parametrize("gate", [True, False], ids=["gate", "mean"])
@pytest.mark.parametrize("count", [1, 2, 5])
def test_heads_that_share_one_read_score_as_each_alone(count, gate):
    entries = [torch.randn(9, width) for width in (24, 7)]
    cu_seqlens = torch.tensor([0, 4, 4, 9])
    heads = [SwiftHead([24, 7], gate=gate) for _ in range(count)]
    scores = score_heads(heads, entries, cu_seqlens)
    assert scores.shape == (3, count)
    scores[[0, 2]].pow(2).sum().backward()
    together = [(head.weight.grad.clone(), head.bias.grad.clone()) for head in heads]
    for k, head in enumerate(heads):
        head.zero_grad()
        alone = head(entries, cu_seqlens)
        torch.testing.assert_close(scores[:, k], alone, equal_nan=True)
        alone[[0, 2]].pow(2).sum().backward()
        torch.testing.assert_close(together[k], (head.weight.grad, head.bias.grad))


@pytest.mark.parametrize(
    ("others", "message"),
    [
        ([], "heads is empty"),
        ([{"widths": (4, 4)}, {"widths": (4, 5)}], r"heads\[1\] reads layers None of widths \[4, 5\]"),
        (
            [
                {"widths": (4, 4), "layers": (0, 1), "num_hidden_layers": 2},
                {"widths": (4, 4), "layers": (0, 2), "num_hidden_layers": 2},
            ],
            r"heads\[1\] reads layers \(0, 2\)",
        ),
        ([{"widths": (4, 4)}, {"widths": (4, 4), "gate": False}], r"heads\[1\] has gate=False"),
        ([{"widths": (4, 4)}, {"widths": (4, 4), "dtype": "bfloat16"}], r"heads\[1\] has .*bfloat16 weights"),
    ],
    ids=["none", "widths", "layers", "gate", "dtype"],
)
def test_heads_of_different_kinds_do_not_share_a_read(others, message):
    heads = [SwiftHead(HeadConfig(**fields)) for fields in others]
    with pytest.raises(ValueError, match=message):
        score_heads(heads, [torch.randn(5, 4)] * 2, torch.tensor([0, 5]))


def test_a_state_of_another_head_is_refused():
    with pytest.raises(ValueError, match=r"the state is for widths \[8\]"):
        SwiftHead([4]).step([torch.randn(1, 4)], SwiftHead([8]).init_state(1), torch.tensor([0]))


def test_importing_needs_torch_alone_and_compiles_nothing():
    code = (
        "import sys, swift_kernels\n"
        "heavy = {'triton', 'transformers', 'numpy.testing', 'safetensors', 'huggingface_hub', 'rich', 'typer',"
        " 'torch.utils.cpp_extension', 'torch._inductor'}\n"
        "import torch; before = set(sys.modules)\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    bare = "import sys, torch; print(sorted({'triton', 'transformers', 'torch._inductor'} & set(sys.modules)))"
    found, base = (
        subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, check=True).stdout
        for text in (code, bare)
    )
    assert found == base == "[]\n"
