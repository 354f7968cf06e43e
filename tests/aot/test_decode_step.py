"""What a decode step launches, on a few layers of the 8B shape: the relations that hold at any depth."""

from __future__ import annotations

import functools

import pytest

pytest.importorskip("triton")
pytest.importorskip("transformers")

import torch
import torch.nn.functional as F  # noqa: N812
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from swift_kernels.checks import partials_per_row
from tests.aot import decode_step
from tests.aot.decode_step import ROWS, worse
from tests.aot.fake_gpu import fake_gpu
from tests.aot.op_launches import OpCounter, called_kernels

LAYERS = 3
ENTRIES = LAYERS + 1
WIDTH = decode_step.LLAMA_8B["hidden_size"]
STATE_BYTES = 2 * ROWS * 12  # read and written


@pytest.fixture(scope="module")
def counted():
    """`decode_step.count`, each thing once."""
    return functools.cache(decode_step.count)


@pytest.fixture
def counter():
    with fake_gpu(), torch.no_grad(), OpCounter() as counter:
        yield counter


def tensor(*shape, dtype=torch.bfloat16):
    return torch.empty(*shape, dtype=dtype, device="cuda")


@pytest.mark.parametrize(
    ("call", "launches", "moved"),
    [
        (lambda x: x.view(8, 8)[1:, None].transpose(0, 2).detach().expand(8, 1, 7), 0, 0),
        (lambda x: torch.empty_like(x), 0, 0),
        (lambda x: x.contiguous().reshape(64).to(torch.bfloat16), 0, 0),
        (lambda x: x + x, 1, 2 * 128),  # read once
        (lambda x: x + 1, 1, 2 * 128),
        (lambda x: x.add_(x[0]), 1, 2 * 128 + 16),
        (lambda x: x[:, :2] + 1, 1, 2 * 32),
        (lambda x: x + x[:, :1].expand(8, 8), 1, 3 * 128 - 112),  # of the expanded column 8 elements
        (lambda x: x.clone(), 1, 2 * 128),
        (lambda x: x.copy_(torch.empty_like(x)), 1, 2 * 128),
        (lambda x: x.float(), 1, 128 + 256),
        (lambda x: x.t().contiguous(), 1, 2 * 128),
        (lambda x: F.linear(x[None], tensor(16, 8)), 1, 128 + 256 + 256),
        (lambda x: F.linear(x, tensor(16, 8), tensor(16)), 1, 128 + 256 + 32 + 256),
        (lambda x: x.sum(-1), 1, 128 + 16),
        (lambda x: torch.cat([x] * 128), 1, 128 + 128 * 128),
        (lambda x: torch.cat([x] * 129), 2, 128 + 129 * 128),
        (lambda x: F.embedding(tensor(3, dtype=torch.int64), x), 1, 24 + 2 * 48),
        (lambda x: x.index_copy_(0, tensor(1, dtype=torch.int64), tensor(1, 8)), 1, 8 + 2 * 16),
        (lambda x: F.scaled_dot_product_attention(*(x.view(1, 1, 8, 8),) * 3), 1, 128 + 128 + 8 * 4 + 3 * 8),
    ],
)
def test_the_counter_counts_launches_and_bytes(counter, call, launches, moved):
    call(tensor(8, 8))
    assert (counter.launches, counter.bytes) == (launches, moved)


def test_the_counter_refuses_what_it_does_not_know(counter):
    with pytest.raises(NotImplementedError, match="cumsum"):
        tensor(8).cumsum(0)
    with pytest.raises(NotImplementedError, match="between host and device"):
        tensor(8).cpu()


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_gather_adds_one_launch_and_what_it_reads(counted, cache):
    bare, gather = (counted("eager", variant, LAYERS, cache) for variant in ("bare", "gather"))
    assert gather["kernels"] == {**bare["kernels"], "swift_kernels::score_step": 1}
    features = ENTRIES * WIDTH
    weight = 2 * features * 4 + 2 * 4
    partials = 2 * ROWS * partials_per_row([WIDTH] * ENTRIES) * 2 * 4
    arrivals, slots = 2 * ROWS * 4, ROWS * 8
    expected = ROWS * features * 2 + weight + STATE_BYTES + partials + arrivals + slots
    assert gather["bytes"] - bare["bytes"] == expected


def test_a_fused_norm_takes_the_launches_and_the_bytes_of_a_stock_one(counted):
    with fake_gpu(), torch.no_grad():
        norm = LlamaRMSNorm(WIDTH)
        norm.weight = torch.nn.Parameter(tensor(WIDTH))
        states = tensor(ROWS, 1, WIDTH)
        with OpCounter() as stock:
            norm(states)
    bare, fused = (counted("eager", variant, LAYERS) for variant in ("bare", "norm"))
    assert fused["kernels"]["swift_kernels::rms_norm_score"] == ENTRIES
    assert fused["kernels"]["swift_kernels::rms_norm"] == LAYERS  # after each attention
    norms = ENTRIES + LAYERS
    assert fused["launches"] == bare["launches"] - norms * (stock.launches - 1)
    slots, partial = ROWS * 8, ROWS * 2 * 4
    normalising = 2 * ROWS * WIDTH * 2 + WIDTH * 2
    scoring = ENTRIES * (2 * WIDTH * 4 + slots + partial) + 2 * 4 + (ENTRIES - 1) * partial + STATE_BYTES
    assert fused["bytes"] == bare["bytes"] - norms * (stock.bytes - normalising) + scoring


def test_the_obvious_way_launches_and_moves_more(counted):
    gather, naive = (counted("eager", variant, LAYERS) for variant in ("gather", "naive"))
    assert naive["launches"] > gather["launches"] + ENTRIES
    assert naive["bytes"] > gather["bytes"] + 3 * ROWS * ENTRIES * WIDTH * 4  # float32: written, and twice read


def test_inductor_fuses_dot_products_into_the_norms_and_cannot_fuse_a_call(counted):
    bare, gather, dots = (counted("compiled", variant, 1) for variant in ("bare", "gather", "dots"))
    assert gather["kernels"] == {**bare["kernels"], "swift_kernels::score_step": 1}
    assert dots["kernels"] == bare["kernels"]


def test_the_kernels_of_generated_code_are_its_calls():
    code = """
def unused():
    triton_poi_fused_add_0.run(buf0, 64, stream=raw_stream0)
class Runner:
    def call(self, args):
        arg0_1, = args
        args.clear()
        with torch.cuda._DeviceGuard(0):
            torch.cuda.set_device(0)
            buf0 = empty_strided_cuda((64, ), (1, ), torch.float32)
            raw_stream0 = get_raw_stream(0)
            triton_poi_fused_add_0.run(arg0_1, buf0, 64, stream=raw_stream0)
            extern_kernels.mm(reinterpret_tensor(buf0, (8, 8), (8, 1), 0), buf0, out=buf0)
            torch.ops.swift_kernels.score_step.default([buf0], buf0)
        return (buf0, )
"""
    assert called_kernels(code) == {"triton": 1, "aten::mm": 1, "swift_kernels::score_step": 1}
    with pytest.raises(NotImplementedError, match="sort"):
        called_kernels(code.replace("extern_kernels.mm", "extern_kernels.sort"))
    with pytest.raises(NotImplementedError, match="prepare"):
        called_kernels(code.replace("args.clear", "prepare"))


def test_more_than_the_baseline_is_named():
    entry = {"mode": "eager", "cache": "dynamic", "layers": 2, "variant": "gather", "launches": 10, "bytes": 100}
    assert worse([entry], [entry]) == []
    assert worse([{**entry, "launches": 9}], [entry]) == []
    [line] = worse([{**entry, "launches": 11}], [entry])
    assert line == "gather, eager, dynamic cache, 2 layers: 11 launches, 10 in the baseline"
    [line] = worse([{**entry, "bytes": 101}], [entry])
    assert "101 bytes" in line
    [line] = worse([{**entry, "layers": 3}], [entry])
    assert "not in the baseline" in line


def test_with_other_libraries_only_what_is_added_to_the_bare_model_counts():
    bare = {"mode": "eager", "cache": "dynamic", "layers": 2, "variant": "bare", "launches": 10, "bytes": 100}
    gather = {**bare, "variant": "gather", "launches": 11, "bytes": 130}
    later = [{**bare, "launches": 12, "bytes": 180}, {**gather, "launches": 13, "bytes": 210}]
    assert worse(later, [bare, gather], same_versions=False) == []
    assert len(worse(later, [bare, gather])) == 4
    [line] = worse([later[0], {**later[1], "launches": 14}], [bare, gather], same_versions=False)
    assert line == "gather, eager, dynamic cache, 2 layers: 2 launches, 1 in the baseline"
