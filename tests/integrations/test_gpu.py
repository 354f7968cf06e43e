"""`attach` on a CUDA device: the Triton kernel, the compilation that transformers does by itself, and CUDA graphs."""

from __future__ import annotations

import copy

import pytest
import torch

from swift_kernels import SwiftHead, attach
from swift_kernels.features import top_logprobs
from swift_kernels.integrations.compatibility import eos_token_ids
from swift_kernels.schema import implementation
from tests.architectures import NAMED, randomised, tiny_model
from tests.integrations.helpers import check_parity, generate, responses_of
from tests.integrations.test_norm_path import EVERY
from tests.oracle import assert_scores, captured_tokens, oracle
from tests.recorded import decode_both_ways

pytestmark = pytest.mark.gpu


def on_gpu(name, dtype=torch.float32):
    return copy.deepcopy(tiny_model(name, dtype)).to("cuda")


@pytest.fixture
def gpu_prompts(prompts):
    return {name: value.cuda() for name, value in prompts.items()}


def test_triton_runs():
    assert implementation("cuda") == "triton"


@pytest.mark.parametrize(
    "options", [{}, {"prefill_chunk_size": 3}, {"use_cache": False}], ids=["dynamic", "chunks", "no-cache"]
)
@pytest.mark.parametrize("name", NAMED)
def test_parity(name, options, gpu_prompts):
    model = on_gpu(name)
    check_parity(model, SwiftHead.for_model(model), gpu_prompts, **options)


@pytest.mark.parametrize(
    "options", [{}, {"prefill_chunk_size": 3}, {"use_cache": False}], ids=["dynamic", "chunks", "no-cache"]
)
def test_parity_of_log_probabilities(options, gpu_prompts):
    model = on_gpu("llama")
    check_parity(model, SwiftHead.for_model(model, "top_logprobs"), gpu_prompts, **options)


@pytest.mark.parametrize("vocabulary", [96, 1001, 50257, 128256])
def test_log_probabilities_of_a_row_are_bitwise_the_same_in_any_batch(vocabulary):
    """Where the vocabulary is odd, rows begin at every alignment."""
    logits = 5 * torch.randn(257, vocabulary, device="cuda")
    next_ids = torch.randint(vocabulary, (257,), device="cuda")
    together = top_logprobs(logits, 20, next_ids)
    for row in (0, 1, 2, 3, 100, 256):
        assert torch.equal(top_logprobs(logits[row : row + 1], 20, next_ids[row : row + 1])[0], together[row])


@pytest.mark.parametrize("name", EVERY)
def test_parity_inside_the_norms(name, gpu_prompts):
    model = on_gpu(name)
    scorer = check_parity(model, SwiftHead.for_model(model), gpu_prompts, fuse="norm")
    assert "ran so far: norm" in scorer.describe()
    assert "by triton" in scorer.describe()


@pytest.mark.parametrize("fuse", ["gather", "norm"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("name", ["llama", "gemma3_text"])
def test_level_a_in_half_precision(name, dtype, fuse, gpu_prompts):
    model = on_gpu(name, dtype)
    head = SwiftHead.for_model(model)
    with attach(model, head, fuse=fuse) as scorer:
        output = generate(model, gpu_prompts, return_dict_in_generate=True, output_hidden_states=True)
        responses = responses_of(scorer, output.sequences, gpu_prompts["input_ids"].shape[1])
        tokens = captured_tokens(output, head, responses, eos_token_ids(model))
        on_cpu = [[entry.cpu() for entry in row] for row in tokens]
        assert_scores(scorer.scores(), *oracle(on_cpu, copy.deepcopy(head).cpu()))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "layers"),
    [("llama", "all"), ("gemma3_text", "all"), ("mixtral", "all"), ("llama", "top_logprobs")],
    ids=["llama", "gemma3_text", "mixtral", "top-logprobs"],
)
def test_static_cache_is_compiled_and_replayed(name, layers, gpu_prompts):
    """On a GPU transformers compiles the decode step of a static cache by itself, with CUDA graphs."""
    model = on_gpu(name)
    head = SwiftHead.for_model(model, layers)
    with attach(model, head) as scorer:
        generate(model, gpu_prompts)
        eager, counts = scorer.scores(), scorer.token_counts()
        for _ in range(3):
            generate(model, gpu_prompts, cache_implementation="static")
            assert scorer._compiled is not None
            if torch.equal(scorer.token_counts(), counts):
                torch.testing.assert_close(scorer.scores(), eager, rtol=1e-3, atol=1e-3, equal_nan=True)


def captured(step):
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


@pytest.mark.parametrize(
    ("fuse", "layers"),
    [("gather", "all"), ("norm", "all"), ("gather", "top_logprobs")],
    ids=["gather", "norm", "top-logprobs"],
)
@pytest.mark.parametrize("capture", ["graph", "reduce-overhead"])
def test_a_recorded_decode_step(capture, fuse, layers):
    """Replayed with other inputs and other slots, a graph gives what eager steps give."""
    model = on_gpu("llama")
    head = SwiftHead.for_model(model, layers)

    def compiled(step):
        run = torch.compile(step, mode="reduce-overhead", fullgraph=True)
        for _ in range(3):
            torch.compiler.cudagraph_mark_step_begin()
            run()
        return run

    with attach(model, head, fuse=fuse) as scorer, torch.no_grad():
        make = captured if capture == "graph" else compiled
        results = decode_both_ways(scorer, make, model, "cuda")
    assert torch.equal(results[0][1], results[1][1])
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("fuse", ["gather", "norm"])
def test_nothing_compiles_after_the_warm_up(fuse):
    from triton import knobs

    compiled = []
    model = on_gpu("llama", torch.bfloat16)
    with attach(model, SwiftHead.for_model(model), fuse=fuse) as scorer, torch.no_grad():
        scorer.warmup()
        knobs.runtime.jit_post_compile_hook = lambda **kwargs: compiled.append(kwargs["repr"])
        try:
            for rows in (1, 2, 7, 16, 33, 64, 257):
                scorer.begin(torch.arange(rows, device="cuda"))
                model(input_ids=torch.full((rows, 1), 9, device="cuda"), use_cache=False)
                assert scorer.token_counts().tolist() == [1] * rows
        finally:
            knobs.runtime.jit_post_compile_hook = None
    assert compiled == []


@pytest.mark.parametrize("fuse", ["gather", "norm"])
def test_capture_without_a_warm_up_is_one_clear_error(fuse):
    """Widths that nothing else in this process has compiled for."""
    config = copy.deepcopy(tiny_model("llama").config)
    config.hidden_size, config.head_dim = {"gather": (48, 12), "norm": (56, 14)}[fuse]
    model = randomised(config).to("cuda")
    head = SwiftHead.for_model(model)
    token = torch.full((2, 1), 9, device="cuda")
    with attach(model, head, fuse=fuse) as scorer, torch.no_grad():
        scorer.begin(torch.arange(2, device="cuda"))
        model(input_ids=torch.full((2, 2), 9, device="cuda"), use_cache=False)
        with pytest.raises(RuntimeError, match="warmup"), torch.cuda.graph(torch.cuda.CUDAGraph()):
            model(input_ids=token, use_cache=False)


def test_no_synchronisation_in_a_step(gpu_prompts):
    model = on_gpu("llama")
    head = SwiftHead.for_model(model)
    state = head.init_state(3)
    entries = [torch.randn(3, 32, device="cuda") for _ in head.config.widths]
    slots = torch.tensor([0, -1, 2], device="cuda")
    head.step(entries, state, slots)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(4):
            head.step(entries, state, slots)
        state.reset_(slots)
        state.reorder_(torch.arange(3, device="cuda"))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert state.token_count.tolist() == [0, 0, 0]


@pytest.mark.parametrize("fuse", ["gather", "norm"])
def test_bytes_on_the_device_do_not_grow(fuse):
    model = on_gpu("llama")
    head = SwiftHead.for_model(model)
    held = {}
    with attach(model, head, fuse=fuse) as scorer, torch.no_grad():
        for steps in (32, 4096):
            scorer.begin(torch.arange(3, device="cuda"))
            for _ in range(steps):
                model(input_ids=torch.full((3, 1), 9, device="cuda"), use_cache=False)
            torch.cuda.synchronize()
            held[steps] = (scorer.nbytes, scorer.scratch_nbytes, torch.cuda.memory_allocated())
    assert held[32] == held[4096]
